// float16 and bfloat16 elements of one span: widened, added to, rounded to nearest even. Included
// through decode_rows.h and compiled with each set's flags. All sets give the bits of
// core/float_types.h; the forms here have no branches, so that the compiler turns them into
// vectors, and where the set has instructions for float16 they are used.
#pragma once

#include <cstdint>

#include "core/float_types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

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
inline void widen_span(const uint16_t* __restrict half, int64_t count, float* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = Half::widen(half[k]);
}

template <typename Half>
inline void narrow_span(const float* __restrict value, int64_t count, uint16_t* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = Half::narrow(value[k]);
}

// target[k] += alpha * value[k], the value rounded to the target's type first.
template <typename Half>
inline void add_rounded(const float* __restrict value, int64_t count, float alpha,
                        uint16_t* __restrict target) {
  for (int64_t k = 0; k < count; ++k) {
    const float rounded = Half::widen(Half::narrow(value[k]));
    target[k] = Half::narrow(Half::widen(target[k]) + alpha * rounded);
  }
}

#if defined(__F16C__)

#if defined(__AVX512F__)
constexpr int64_t kHalves = 16;
using Halves = __m256i;
using Floats = __m512;

inline Floats load_floats(const float* value) { return _mm512_loadu_ps(value); }
inline Floats load_halves(const uint16_t* half) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}
inline Halves to_halves(Floats value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats round_to_halves(Floats value) { return _mm512_cvtph_ps(to_halves(value)); }
inline Floats add_product(Floats sum, float alpha, Floats value) {
  return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(alpha), value));
}
inline bool has_nan(Floats value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q) != 0; }
inline void store(float* out, Floats value) { _mm512_storeu_ps(out, value); }
inline void store(uint16_t* out, Halves value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value);
}
#else
constexpr int64_t kHalves = 8;
using Halves = __m128i;
using Floats = __m256;

inline Floats load_floats(const float* value) { return _mm256_loadu_ps(value); }
inline Floats load_halves(const uint16_t* half) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
}
inline Halves to_halves(Floats value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
inline Floats round_to_halves(Floats value) { return _mm256_cvtph_ps(to_halves(value)); }
inline Floats add_product(Floats sum, float alpha, Floats value) {
  return _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(alpha), value));
}
inline bool has_nan(Floats value) {
  return _mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)) != 0;
}
inline void store(float* out, Floats value) { _mm256_storeu_ps(out, value); }
inline void store(uint16_t* out, Halves value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), value);
}
#endif

// The instruction keeps a NaN's payload; Float16::narrow has one NaN of each sign.
inline void narrow_vector(Floats value, uint16_t* out) {
  store(out, to_halves(value));
  if (!has_nan(value)) return;
  for (int64_t k = 0; k < kHalves; ++k) {
    if ((out[k] & 0x7fff) > 0x7c00) out[k] = static_cast<uint16_t>((out[k] & 0x8000) | 0x7e00);
  }
}

template <>
inline void widen_span<Float16>(const uint16_t* __restrict half, int64_t count,
                                float* __restrict out) {
  int64_t k = 0;
  for (; k + kHalves <= count; k += kHalves) store(out + k, load_halves(half + k));
  for (; k < count; ++k) out[k] = Float16::widen(half[k]);
}

template <>
inline void narrow_span<Float16>(const float* __restrict value, int64_t count,
                                 uint16_t* __restrict out) {
  int64_t k = 0;
  for (; k + kHalves <= count; k += kHalves) narrow_vector(load_floats(value + k), out + k);
  for (; k < count; ++k) out[k] = Float16::narrow(value[k]);
}

template <>
inline void add_rounded<Float16>(const float* __restrict value, int64_t count, float alpha,
                                 uint16_t* __restrict target) {
  int64_t k = 0;
  for (; k + kHalves <= count; k += kHalves) {
    const Floats rounded = round_to_halves(load_floats(value + k));
    narrow_vector(add_product(load_halves(target + k), alpha, rounded), target + k);
  }
  for (; k < count; ++k) {
    const float rounded = Float16::widen(Float16::narrow(value[k]));
    target[k] = Float16::narrow(Float16::widen(target[k]) + alpha * rounded);
  }
}

#endif

}  // namespace
}  // namespace pyrobust::matmul
