// Included by AVX-512 files alone: 64 codes of the canonical layout to the 64 bytes of one
// register.
//
// A block of 64 codes of b bits fills 8 b bytes. They are repeated in every part of the register,
// and each part shifts its copy so that the wanted codes lie lowest; a mask finishes:
//
//   4 bits    bytes 0..31: even columns          bytes 32..63: odd columns
//   2 bits    bytes 16 l .. 16 l + 15: columns 4 i + l, from byte i
//   1 bit     bytes 8 l .. 8 l + 7: columns 8 i + l
//   3 bits    as stored, after two shuffles
//   8 bits    as stored
//
// x is put into the same order once a call.
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
    case 4:
      return 2 * (p % 32) + p / 32;
    default:
      return p;
  }
}

// Three bits where the processor has AVX-512 VBMI, which these files are not compiled for: stands
// for the width in templates.
constexpr int kThreeByVbmi = -3;
// Codes of five to a byte (avx512_trits.h).
constexpr int kFiveToAByte = -5;
constexpr int width_of(int bits) {
  return bits == kThreeByVbmi ? 3 : bits == kFiveToAByte ? 2 : bits;
}

// The three bytes of eight codes to each qword, then the byte from bit 0, 3, 6, ... 21 on of it.
inline __m512i wide_bytes_by_vbmi(const uint8_t* codes) {
  const __m512i step =
      _mm512_setr_epi64(0, 0x030303, 0x060606, 0x090909, 0x0c0c0c, 0x0f0f0f, 0x121212, 0x151515);
  const __m512i places = _mm512_add_epi8(_mm512_set1_epi64(0x020100), step);
  const __m512i bits = _mm512_set1_epi64(0x15120f0c09060300);
  __m512i v = _mm512_maskz_loadu_epi64(0x07, codes);
  __asm__("vpermb %0, %1, %0" : "+v"(v) : "v"(places));
  __asm__("vpmultishiftqb %0, %1, %0" : "+v"(v) : "v"(bits));
  return _mm512_and_si512(v, _mm512_set1_epi8(7));
}

template <int kBits>
inline __m512i wide_bytes(const uint8_t* codes) {
  const __m512i mask = _mm512_set1_epi8((1 << width_of(kBits)) - 1);
  if constexpr (kBits == kThreeByVbmi) {
    return wide_bytes_by_vbmi(codes);
  } else if constexpr (kBits == 1) {
    int64_t bits;
    __builtin_memcpy(&bits, codes, sizeof(bits));
    const __m512i shift = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(bits), shift), mask);
  } else if constexpr (kBits == 2) {
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcast_i32x4(quarter), shift), mask);
  } else if constexpr (kBits == 3) {
    // Each quarter of the register gets the dwords that hold its 16 codes, each word of it the two
    // bytes that hold two codes; a shift a word brings those down.
    const __m512i dwords = _mm512_maskz_loadu_epi64(0x07, codes);
    const __m512i quarters = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 4, 5, 0, 0), dwords);
    const __m128i even = _mm_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6);
    const __m128i odd = _mm_add_epi8(even, _mm_set1_epi8(2));
    const __m256i both = _mm256_set_m128i(odd, even);
    const __m512i words = _mm512_shuffle_epi8(quarters, _mm512_broadcast_i64x4(both));
    const __m512i shift = _mm512_set1_epi64(0x0002000400060000);
    const __m512i pairs =
        _mm512_and_si512(_mm512_srlv_epi16(words, shift), _mm512_set1_epi16(0x3f));
    return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 5)),
                            _mm512_set1_epi16(0x0707));
  } else if constexpr (kBits == 4) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i64x4(half), shift), mask);
  } else {
    return _mm512_loadu_si512(codes);
  }
}

// Bytes of 64 columns to the order of wide_bytes().
inline void store_ordered(int bits, __m512i q, int8_t* out) {
  switch (bits) {
    case 1:
      for (int l = 0; l < 8; ++l, q = _mm512_srli_epi64(q, 8)) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * l), _mm512_cvtepi64_epi8(q));
      }
      return;
    case 2:
      for (int l = 0; l < 4; ++l, q = _mm512_srli_epi32(q, 8)) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * l), _mm512_cvtepi32_epi8(q));
      }
      return;
    case 4:
      for (int l = 0; l < 2; ++l, q = _mm512_srli_epi16(q, 8)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * l), _mm512_cvtepi16_epi8(q));
      }
      return;
    default:
      _mm512_storeu_si512(out, q);
  }
}

// 32 bytes of ternary codes to 40 bytes of 2-bit ones; writes up to 6 bytes more. With q_i = v /
// 3^i rounded down, the digits q_i - 3 q_(i+1) in two bits each are v + q_1 + 4 q_2 + 16 q_3 + 64
// q_4.
inline void wide_two_bits(__m256i bytes, uint8_t* out) {
  const __m512i five = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, 3, 4, 8, 9, 10, 11, 12, -1, -1, -1, -1, -1, -1));
  const __m512i v = _mm512_cvtepu8_epi16(bytes);
  const auto quotient = [&](short inverse, int shift) {  // exact below 256
    return _mm512_slli_epi16(_mm512_mulhi_epu16(v, _mm512_set1_epi16(inverse)), shift);
  };
  const __m512i two = _mm512_add_epi16(_mm512_add_epi16(quotient(21846, 0), quotient(7282, 2)),
                                       _mm512_add_epi16(quotient(2428, 4), quotient(810, 6)));
  // Bytes above 242 are no code; their last digit is taken modulo 3 as elsewhere.
  const __mmask32 odd = _mm512_cmpgt_epu16_mask(v, _mm512_set1_epi16(242));
  const __m512i sum = _mm512_add_epi16(v, two);
  const __m512i ten =
      _mm512_mask_sub_epi16(sum, odd, sum, _mm512_set1_epi16(3 << 8));           // bits a word
  const __m512i twenty = _mm512_madd_epi16(ten, _mm512_set1_epi32(0x04000001));  // a dword
  const __m512i forty = _mm512_or_si512(_mm512_and_si512(twenty, _mm512_set1_epi64(0xfffff)),
                                        _mm512_slli_epi64(_mm512_srli_epi64(twenty, 32), 20));
  const __m512i packed = _mm512_shuffle_epi8(forty, five);
  const auto store = [&](int at, __m128i part) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), part);
  };
  store(0, _mm512_castsi512_si128(packed));
  store(10, _mm512_extracti32x4_epi32(packed, 1));
  store(20, _mm512_extracti32x4_epi32(packed, 2));
  store(30, _mm512_extracti32x4_epi32(packed, 3));
}

// ternary_to_two_bits() of 32 bytes at a time.
inline void wide_ternary_to_two_bits(const uint8_t* row, int64_t bytes, uint8_t* out) {
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    wide_two_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)), out + i / 4 * 5);
  }
  ternary_to_two_bits(row + i, bytes - i, out + i / 4 * 5);
}

// sum += codes x, four products a lane. An asm statement because gcc 12 copies the sums of the
// intrinsic from register to register and spills some: a panel ran at half its speed.
inline void add_dots(__m512i& sum, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// Lane i: the sum of the lanes of v[i]. kSmall: sums of two lanes fit in 16 bits, so that packing
// to these and adding neighbours takes the place of two shuffles and an addition.
template <bool kSmall>
inline __m512i sums_of_16(const __m512i* v) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i *a = v + 4 * i, *b = a + 1, *c = a + 2, *d = a + 3;
    if constexpr (kSmall) {
      const auto neighbours = [](__m512i low, __m512i high) {
        return _mm512_madd_epi16(_mm512_packs_epi32(low, high), _mm512_set1_epi16(1));
      };
      four[i] = neighbours(neighbours(*a, *b), neighbours(*c, *d));
      continue;
    }
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
