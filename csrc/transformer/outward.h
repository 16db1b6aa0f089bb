// Included by the loops: the last step from float64 to float32, without branches.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/rounding.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr double kStep = 1.0 / 4503599627370496.0;  // 2^-52

inline double larger(double a, double b) { return a > b ? a : b; }
inline double smaller(double a, double b) { return a < b ? a : b; }
inline double at_least_zero(double a) { return a > 0.0 ? a : 0.0; }

// The greatest float that is not above, but for the smallest normal numbers, where it may be the
// one before. NaN for an infinity.
inline float float_down(double value) {
  const auto nearest = static_cast<float>(value);
  const float moves = static_cast<double>(nearest) > value ? 1.0f : 0.0f;
  return nearest - (std::fabs(nearest) * rounding::kNeighbour + rounding::kLeast) * moves;
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
}  // namespace transformer
}  // namespace pyrobust
