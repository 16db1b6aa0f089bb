// Included by loops over elements, compiled once for each instruction set: rounding down from
// float64 without branches, so that the compiler's vectors are as fast as memory.
#pragma once

#include <cstdint>

#include "core/float_types.h"

namespace pyrobust {
namespace rounding {
namespace {

// `value`, or the float below it where all bits of `moves` are set instead of none. On bits, as a
// condition would not become vectors, and arithmetic misses the neighbour of the smallest numbers.
inline float moved_down(float value, uint32_t moves) {
  const uint32_t bits = bits_of_float(-(0.0f - value));  // of -0 for either zero
  const uint32_t below = bits + ((bits >> 31) << 1) - 1u;
  return float_from_bits((below & moves) | (bits_of_float(value) & ~moves));
}

// All bits, or none.
inline uint32_t mask_of(bool condition) { return 0u - static_cast<uint32_t>(condition); }

// The greatest float that is not above.
inline float float_down(double value) {
  const auto nearest = static_cast<float>(value);
  return moved_down(nearest, mask_of(static_cast<double>(nearest) > value));
}

inline float float_up(double value) { return -float_down(-value); }

// A lower end between zero and `least` becomes zero: it may be read as that.
inline float flushed(float low, float least) {
  const float negative = low < 0.0f ? low : 0.0f;
  return low < least ? negative : low;
}

// 0 for a finite number.
inline int32_t odd(float value) { return value - value == 0.0f ? 0 : 1; }

}  // namespace
}  // namespace rounding
}  // namespace pyrobust
