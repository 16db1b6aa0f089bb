// Sums with packed weights in plain loops; included by portable.cpp alone. Elements of float16 and
// bfloat16 are widened, added to and rounded to nearest even, with the bits of core/float_types.h;
// the forms here have no branches, so that the compiler turns them into vectors.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "matmul/decode_rows.h"

namespace pyrobust::matmul {
namespace {

struct BFloat16 {
  static float widen(uint16_t half) { return float_from_bfloat16(half); }

  // `value` comes out of arithmetic or has at most 15 significant bits: a NaN then is quiet, or
  // its low bits are 0, and rounding leaves it one.
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of_float(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

// `yes` where the condition holds, else `no`, by a mask: a choice between results of float
// operations would become a branch, which keeps the loop from becoming vectors.
inline int32_t choose(bool condition, int32_t yes, int32_t no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

struct Float16 {
  static float widen(uint16_t half) {
    const int32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    const int32_t special = choose(magnitude >= 0x7c00, 0x38000000, 0);
    const int32_t normal = (magnitude << 13) + 0x38000000 + special;
    const auto shifted = static_cast<uint32_t>((magnitude << 13) + 0x38800000);
    const float small = float_from_bits(shifted) - 6.103515625e-5f;  // 2^-14
    const int32_t subnormal = static_cast<int32_t>(bits_of_float(small));
    const int32_t bits = sign | choose(magnitude < 0x400, subnormal, normal);
    return float_from_bits(static_cast<uint32_t>(bits));
  }

  static uint16_t narrow(float value) {
    const auto bits = static_cast<int32_t>(bits_of_float(value));
    const int32_t magnitude = bits & 0x7fffffff;
    const float raised = float_from_bits(static_cast<uint32_t>(magnitude)) + 0.5f;
    const int32_t subnormal = static_cast<int32_t>(bits_of_float(raised)) - 0x3f000000;
    const int32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    int32_t half = choose(magnitude >= 0x38800000, normal, subnormal);
    half = choose(magnitude >= 0x477ff000, 0x7c00, half);
    half = choose(magnitude > 0x7f800000, 0x7e00, half);
    return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
  }
};

template <typename Half>
inline float round_to(float value) {
  return Half::widen(Half::narrow(value));
}

// target[k] += alpha * value[k], the value rounded to the target's type first.
template <typename Half>
void add_rounded(const float* __restrict value, int64_t count, float alpha,
                 uint16_t* __restrict target) {
  for (int64_t k = 0; k < count; ++k) {
    target[k] = Half::narrow(Half::widen(target[k]) + alpha * round_to<Half>(value[k]));
  }
}

// target[k] += table[code[k]], in floats on the stack.
template <typename Half>
void add_table(const uint8_t* __restrict code, int64_t count, const float* __restrict table,
               uint16_t* __restrict target) {
  alignas(64) float sum[kSpan];
  for (int64_t k = 0; k < count; ++k) sum[k] = table[code[k]];
  for (int64_t k = 0; k < count; ++k) target[k] = Half::narrow(Half::widen(target[k]) + sum[k]);
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
      table[i] = alpha * round_to<Half>(scale * static_cast<float>(integers.of_code[i] - zero));
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

template <typename Codes>
void add_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target) {
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
                     int64_t end, FloatType type, void* target) {
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

}  // namespace
}  // namespace pyrobust::matmul
