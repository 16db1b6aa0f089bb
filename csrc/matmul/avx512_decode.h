// Included by AVX-512 files alone: 64 codes of the canonical layout to the 64 bytes of one
// register.
//
// A block of 64 codes of b bits fills 8 b bytes. They are repeated in every part of the register,
// and each part shifts its copy so that the wanted codes lie lowest; a mask finishes:
//
//   4 bits    bytes 0..31: even columns          bytes 32..63: odd columns
//   2 bits    bytes 16 l .. 16 l + 15: columns 4 i + l, from byte i
//   1 bit     bytes 8 l .. 8 l + 7: columns 8 i + l
//   3 bits    dword d of half h: columns 8 d + 4 h .. 8 d + 4 h + 3
//   8 bits    as stored
//
// No shuffle of the weights is needed but for 3 bits; x is put into the same order once a call.
#pragma once

#include <immintrin.h>

#include "matmul/avx2_decode.h"

namespace pyrobust::matmul {
namespace {

// Column, within its block, of byte p of wide_bytes().
inline int wide_order(int bits, int p) {
  switch (bits) {
    case 1:
      return 8 * (p % 8) + p / 8;
    case 2:
      return 4 * (p % 16) + p / 16;
    case 3:
      return 8 * (p % 32 / 4) + 4 * (p / 32) + p % 4;
    case 4:
      return 2 * (p % 32) + p / 32;
    default:
      return p;
  }
}

template <int kBits>
inline __m512i wide_bytes(const uint8_t* codes) {
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  if constexpr (kBits == 1) {
    int64_t bits;
    __builtin_memcpy(&bits, codes, sizeof(bits));
    const __m512i shift = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(bits), shift), mask);
  } else if constexpr (kBits == 2) {
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcast_i32x4(quarter), shift), mask);
  } else if constexpr (kBits == 3) {
    const __m512i both = _mm512_broadcast_i64x4(load_words<3>(codes).low);
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 12, 12, 12, 12, 12, 12, 12, 12);
    const __m512i four = _mm512_srlv_epi32(both, shift);  // 12 bits of each dword count
    const __m512i pairs =
        _mm512_or_si512(_mm512_and_si512(four, _mm512_set1_epi32(0x3f)),
                        _mm512_and_si512(_mm512_slli_epi32(four, 10), _mm512_set1_epi32(0x3f0000)));
    return _mm512_or_si512(
        _mm512_and_si512(pairs, _mm512_set1_epi32(0x00070007)),
        _mm512_and_si512(_mm512_slli_epi32(pairs, 5), _mm512_set1_epi32(0x07000700)));
  } else if constexpr (kBits == 4) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i64x4(half), shift), mask);
  } else {
    return _mm512_loadu_si512(codes);
  }
}

// Lane i: the sum of the lanes of v[i].
inline __m512i sums_of_16(const __m512i* v) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i *a = v + 4 * i, *b = a + 1, *c = a + 2, *d = a + 3;
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(*a, *b), _mm512_unpackhi_epi32(*a, *b));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(*c, *d), _mm512_unpackhi_epi32(*c, *d));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  };
  const __m512i low = halves(four[0], four[1]), high = halves(four[2], four[3]);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                          _mm512_shuffle_i32x4(low, high, 0xdd));
}

// Transposes 16 x 16 dwords in place.
inline void transpose_16(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // v[i + j]: column 4 L + j of rows i .. i + 3, in lane L
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);  // lanes 0, 2
    const __m512i high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);  // lanes 1, 3
    const __m512i high_odd = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

}  // namespace
}  // namespace pyrobust::matmul
