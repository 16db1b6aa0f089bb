// Sums with packed weights in plain loops; included by portable.cpp alone. Elements of float16 and
// bfloat16 are widened, added to and rounded to nearest even, with the bits of core/float_types.h;
// the forms here have no branches, so that the compiler turns them into vectors.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "matmul/decode_rows.h"
#include "runtime/stream_copy.h"

namespace pyrobust::matmul {
namespace {

struct BFloat16 {
  static constexpr bool kNarrowApart = false;
  static float widen(uint16_t half) { return float_from_bfloat16(half); }

  // `value` comes out of arithmetic or has at most 15 significant bits: a NaN then is quiet, or
  // its low bits are 0, and rounding leaves it one.
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of_float(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }

  static float round(float value) { return widen(narrow(value)); }
};

// `yes` where the condition holds, else `no`, by a mask: a choice between results of float
// operations would become a branch, which keeps the loop from becoming vectors.
inline int32_t choose(bool condition, int32_t yes, int32_t no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Rounding to nearest even adds a float so large that the sum has no bits below the last one
// wanted: 1.5 * 2^13 times the value's power of two, or times 2^-14 for what becomes subnormal.
struct Float16 {
  static constexpr bool kNarrowApart = true;
  static constexpr int32_t kLeastPower = 0x38800000;  // 2^-14
  static constexpr int32_t kOverflow = 0x477ff000;    // 65520 and above round to infinity
  static constexpr int32_t kInfinity = 0x7f800000;

  // Exponent and mantissa in the places of a float's are 2^-112 times the value; subnormal ones
  // too.
  static float widen(uint16_t half) {
    const int32_t moved = static_cast<int32_t>(static_cast<uint32_t>(half) << 16) >> 3;
    const float value = float_from_bits(static_cast<uint32_t>(moved) & 0x8fffe000u) * 0x1p112f;
    const int32_t special = choose((moved & 0x0f800000) == 0x0f800000, kInfinity, 0);
    return float_from_bits(bits_of_float(value) | static_cast<uint32_t>(special));
  }

  static int32_t power(int32_t magnitude) {
    const int32_t own = magnitude & kInfinity;
    return choose(own > kLeastPower, own, kLeastPower);
  }

  // Without meaning from kOverflow on.
  static uint32_t lift(int32_t power) { return static_cast<uint32_t>(power) + 0x06c00000u; }

  static uint32_t narrow(float value) {
    const auto bits = static_cast<int32_t>(bits_of_float(value));
    const int32_t magnitude = bits & 0x7fffffff, own = power(magnitude);
    const float sum =
        float_from_bits(static_cast<uint32_t>(magnitude)) + float_from_bits(lift(own));
    const auto steps = static_cast<int32_t>(bits_of_float(sum) - lift(own));
    int32_t half = steps + ((own - kLeastPower) >> 13);
    half = choose(magnitude >= kOverflow, 0x7c00, half);
    half = choose(magnitude > kInfinity, 0x7e00, half);
    return static_cast<uint32_t>(half | ((bits >> 16) & 0x8000));
  }

  // widen(narrow(value)).
  static float round(float value) {
    const auto bits = static_cast<int32_t>(bits_of_float(value));
    const int32_t magnitude = bits & 0x7fffffff;
    const float large = float_from_bits(lift(power(magnitude)));
    const float sum = float_from_bits(static_cast<uint32_t>(magnitude)) + large;
    auto rounded = static_cast<int32_t>(bits_of_float(sum - large));
    rounded = choose(magnitude >= kOverflow, kInfinity, rounded);
    rounded = choose(magnitude > kInfinity, 0x7fc00000, rounded);
    return float_from_bits(static_cast<uint32_t>(rounded | (bits & ~0x7fffffff)));
  }
};

// target[k] += value(k). What float16 holds is narrowed to 16 bits in a loop of its own: the
// compiler would do parts of the rounding in 16 bits and narrow each of their operands, by seven
// instructions for eight elements. Sums are in another, as registers would not do for both.
template <typename Half, typename Value>
inline void add_each(const Value& value, int64_t count, uint16_t* __restrict target) {
  if constexpr (Half::kNarrowApart) {
    alignas(64) float sum[kSpan];
    alignas(64) uint32_t half[kSpan];
    for (int64_t k = 0; k < count; ++k) sum[k] = Half::widen(target[k]) + value(k);
    for (int64_t k = 0; k < count; ++k) half[k] = Half::narrow(sum[k]);
    for (int64_t k = 0; k < count; ++k) target[k] = static_cast<uint16_t>(half[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) {
      target[k] = Half::narrow(Half::widen(target[k]) + value(k));
    }
  }
}

// target[k] += alpha * value[k], the value rounded to the target's type first.
template <typename Half>
void add_rounded(const float* __restrict value, int64_t count, float alpha,
                 uint16_t* __restrict target) {
  add_each<Half>([=](int64_t k) { return alpha * Half::round(value[k]); }, count, target);
}

// target[k] += table[code[k]]. Looked up in a loop of its own, which leaves vectors to the other.
template <typename Half>
void add_table(const uint8_t* __restrict code, int64_t count, const float* __restrict table,
               uint16_t* __restrict target) {
  alignas(64) float sum[kSpan];
  for (int64_t k = 0; k < count; ++k) sum[k] = table[code[k]];
  const float* looked_up = sum;
  add_each<Half>([=](int64_t k) { return looked_up[k]; }, count, target);
}

inline void add_table(const uint8_t* __restrict code, int64_t count, const float* __restrict table,
                      float* __restrict target) {
  for (int64_t k = 0; k < count; ++k) target[k] += table[code[k]];
}

// A group's few values are rounded once rather than at every weight.
template <typename Codes, typename Half>
void add_groups(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
                uint16_t* target) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = span_codes<Codes>(w, n, begin, end, expanded);
  const GroupIntegers integers(w);
  for_groups(w, n, begin, end, [&](int64_t group, int64_t k, int64_t count) {
    const int zero = zero_at(w, group);
    const float scale = scale_at(w, group);
    float table[16];
    for (int i = 0; i < w.levels; ++i) {
      table[i] = alpha * Half::round(scale * static_cast<float>(integers.of_code[i] - zero));
    }
    add_table<Half>(code + k, count, table, target + k);
  });
}

template <typename Codes, typename Half>
void add_span_to_halves(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
                        uint16_t* target) {
  if (has_group_tables(w)) return add_groups<Codes, Half>(w, n, begin, end, alpha, target);
  alignas(64) float value[kSpan];
  decode_span<Codes>(w, n, begin, end, value);
  add_rounded<Half>(value, end - begin, alpha, target);
}

// What a span held is in the first-level cache when the sums are made.
inline void save_span(const void* target, int64_t count, FloatType type, void* saved) {
  if (saved != nullptr) stream_copy(saved, target, count * float_type_bytes(type));
}

template <typename Codes>
void add_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target, void* saved) {
  save_span(target, end - begin, type, saved);
  if (type == FloatType::kFloat16) {
    auto* halves = static_cast<uint16_t*>(target);
    return add_span_to_halves<Codes, Float16>(w, n, begin, end, alpha, halves);
  }
  if (type == FloatType::kBFloat16) {
    auto* halves = static_cast<uint16_t*>(target);
    return add_span_to_halves<Codes, BFloat16>(w, n, begin, end, alpha, halves);
  }
  alignas(64) float value[kSpan];
  decode_span<Codes>(w, n, begin, end, value);
  auto* out = static_cast<float*>(target);
  for (int64_t k = 0; k < end - begin; ++k) out[k] += alpha * value[k];
}

// target[k] += table.scaled[code of column begin + k].
template <typename Codes>
void add_levels_span(const LevelCodes& codes, const LevelTable& table, int64_t n, int64_t begin,
                     int64_t end, FloatType type, void* target, void* saved) {
  save_span(target, end - begin, type, saved);
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = span_codes<Codes>(codes, n, begin, end, expanded);
  if (type == FloatType::kFloat16) {
    add_table<Float16>(code, end - begin, table.scaled, static_cast<uint16_t*>(target));
  } else if (type == FloatType::kBFloat16) {
    add_table<BFloat16>(code, end - begin, table.scaled, static_cast<uint16_t*>(target));
  } else {
    add_table(code, end - begin, table.scaled, static_cast<float*>(target));
  }
}

template <typename Half>
void add_values_to_halves(const void* value, FloatType value_type, int64_t count, float alpha,
                          uint16_t* target) {
  if (value_type == FloatType::kFloat32) {
    return add_rounded<Half>(static_cast<const float*>(value), count, alpha, target);
  }
  const auto* halves = static_cast<const uint16_t*>(value);
  add_each<Half>([=](int64_t k) { return alpha * Half::widen(halves[k]); }, count, target);
}

inline void add_values_run(const void* value, FloatType value_type, int64_t count, float alpha,
                           FloatType type, void* target, void* saved) {
  save_span(target, count, type, saved);
  if (type != FloatType::kFloat32) {
    auto* halves = static_cast<uint16_t*>(target);
    return type == FloatType::kFloat16
               ? add_values_to_halves<Float16>(value, value_type, count, alpha, halves)
               : add_values_to_halves<BFloat16>(value, value_type, count, alpha, halves);
  }
  const auto* floats = static_cast<const float*>(value);
  auto* out = static_cast<float*>(target);
  for (int64_t k = 0; k < count; ++k) out[k] += alpha * floats[k];
}

}  // namespace
}  // namespace pyrobust::matmul
