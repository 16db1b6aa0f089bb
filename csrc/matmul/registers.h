// Included by sources.h alone: one set of names for registers of floats, 16 wide where the
// file is compiled for AVX-512 and 8 wide for AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pyrobust::matmul {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kFloats = 16;
using Floats = __m512;
using Ints = __m512i;
using Float16s = __m256i;

inline Ints load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline Ints load(const uint16_t* from) { return _mm512_loadu_si512(from); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Ints broadcast(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fused_negative(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats difference(Ints a, Ints b) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b)); }
inline Floats exponent_of(Floats value) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(-0x800000)));
}
// Past the caches; `to` is a multiple of the register's size.
inline void stream(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#else
constexpr int64_t kFloats = 8;
using Floats = __m256;
using Ints = __m256i;
using Float16s = __m128i;

inline Ints load(const int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Ints load(const uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Ints broadcast(int32_t value) { return _mm256_set1_epi32(value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fused_negative(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats difference(Ints a, Ints b) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b)); }
inline Floats exponent_of(Floats value) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(-0x800000)));
}
// Past the caches; `to` is a multiple of the register's size.
inline void stream(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#endif

// Elements 0 .. 2 kFloats - 1: the first half and the second, or the even and the odd ones.
struct Pair {
  Floats first, second;
};

struct Pairs {
  Pair pair[2];
};

// Low bits of each are a code; what lies above them is of no meaning.
struct Indices {
  Ints first, second;
};

#if defined(__AVX512F__)

template <bool kAlternate>
inline Indices load_indices(const uint8_t* code) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  if constexpr (kAlternate) {
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    return {words, _mm512_srli_epi32(words, 16)};
  }
  return {_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)),
          _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1))};
}

// 2 kFloats bytes less `zero`.
template <bool kAlternate>
inline Pair differences(const uint8_t* code, int zero) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  const __m512i words =
      _mm512_sub_epi16(_mm512_cvtepu8_epi16(bytes), _mm512_set1_epi16(static_cast<int16_t>(zero)));
  if constexpr (kAlternate) {  // a product of words and 1 widens those that it does not drop
    return {_mm512_cvtepi32_ps(_mm512_madd_epi16(words, _mm512_set1_epi32(1))),
            _mm512_cvtepi32_ps(_mm512_madd_epi16(words, _mm512_set1_epi32(0x10000)))};
  }
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words))),
          _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)))};
}

inline Pair even_and_odd(Pair p) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(p.first, even, p.second),
          _mm512_permutex2var_ps(p.first, odd, p.second)};
}

// Bits whose upper halves are the value as bfloat16; the lower ones are of no meaning.
inline Ints rounded_to_upper(Floats value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

inline Floats clear_lower(Ints bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
}

inline Pair widen_bfloat16(Ints both) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), clear_lower(both)};
}

// To nearest even: the upper half of 32 bits, and 1 where the lower half is above 0x8000, or is
// that and the upper one odd.
inline void store_bfloat16(uint16_t* to, Pair value) {
  const __m512i even = _mm512_castps_si512(value.first), odd = _mm512_castps_si512(value.second);
  const __m512i upper = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
  const __m512i lower = _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
  const __m512i is_even = _mm512_andnot_si512(upper, _mm512_set1_epi16(1));
  const __m512i carry = _mm512_srli_epi16(_mm512_subs_epu16(lower, is_even), 15);
  _mm512_storeu_si512(to, _mm512_add_epi16(upper, carry));
}

inline Floats from_float16(Float16s halves) { return _mm512_cvtph_ps(halves); }
inline Floats widen_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Pair widen_float16(Ints both) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}
inline Float16s to_float16(Floats value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(uint16_t* to, Float16s value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
inline bool has_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }

#else

template <bool kAlternate>
inline Indices load_indices(const uint8_t* code) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
  if constexpr (kAlternate) {
    const __m256i words = _mm256_cvtepu8_epi16(bytes);
    return {words, _mm256_srli_epi32(words, 16)};
  }
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

// 2 kFloats bytes less `zero`.
template <bool kAlternate>
inline Pair differences(const uint8_t* code, int zero) {
  const auto eight = [](const uint8_t* from) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  };
  if constexpr (kAlternate) {  // a product of words and 1 widens those that it does not drop
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
    const __m256i words = _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes),
                                           _mm256_set1_epi16(static_cast<int16_t>(zero)));
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(words, _mm256_set1_epi32(1))),
            _mm256_cvtepi32_ps(_mm256_madd_epi16(words, _mm256_set1_epi32(0x10000)))};
  }
  return {difference(_mm256_cvtepu8_epi32(eight(code)), broadcast(zero)),
          difference(_mm256_cvtepu8_epi32(eight(code + 8)), broadcast(zero))};
}

inline Pair even_and_odd(Pair p) {
  const auto in_order = [](__m256 mixed) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
  };
  return {in_order(_mm256_shuffle_ps(p.first, p.second, 0x88)),
          in_order(_mm256_shuffle_ps(p.first, p.second, 0xdd))};
}

inline Ints rounded_to_upper(Floats value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

inline Floats clear_lower(Ints bits) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)));
}

inline Pair widen_bfloat16(Ints both) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), clear_lower(both)};
}

inline void store_bfloat16(uint16_t* to, Pair value) {
  const __m256i even = _mm256_castps_si256(value.first), odd = _mm256_castps_si256(value.second);
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  const __m256i lower = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
  const __m256i is_even = _mm256_andnot_si256(upper, _mm256_set1_epi16(1));
  // As compared rather than shifted, since shifts are what is scarce.
  const __m256i carry =
      _mm256_cmpgt_epi16(_mm256_setzero_si256(), _mm256_subs_epu16(lower, is_even));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi16(upper, carry));
}

inline Floats from_float16(Float16s halves) { return _mm256_cvtph_ps(halves); }
inline Floats widen_float16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Pair widen_float16(Ints both) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(both)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
}
inline Float16s to_float16(Floats value) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}
inline void store(uint16_t* to, Float16s value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}
inline bool has_nan(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}

#endif

}  // namespace
}  // namespace pyrobust::matmul
