// Included by avx2.cpp and avx512.cpp: codes of the canonical layout to AVX2 registers, 64 columns
// at a time.
//
// A block of 64 codes of b bits fills 8 b bytes, so lane i of eight 32-bit lanes can hold the b
// bytes of columns 8 i .. 8 i + 7, and field j of every lane is column 8 i + j:
//
//   lane        0                  1                  ...  7
//   columns     0 1 2 3 4 5 6 7    8 9 10 ...              56 ... 63
//   step j = 0  0                  8                       56          one vector of eight floats
//   step j = 1  1                  9                       57          ... shift right by b, mask
//
// This needs no shuffle of the weights; the activations are put into the same order once a call.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/bit_layout.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kBlock = 64;

// A float whose low mantissa bits are an integer below 2^23: OR-ing a code into 2^23 converts it.
constexpr float kMagic = 8388608.0f;

template <int kBits>
struct Words {
  __m256i low, high;  // high: columns 8 i + 4 .. 8 i + 7 at 8 bits, else unused
};

template <int kBits>
inline Words<kBits> load_words(const uint8_t* codes) {
  Words<kBits> words;
  words.high = _mm256_setzero_si256();
  if constexpr (kBits == 1) {
    words.low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  } else if constexpr (kBits == 2) {
    words.low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  } else if constexpr (kBits == 3) {
    // Bytes 0..15 and 8..23: both halves stay inside the 24 bytes of the block.
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8));
    const __m256i both = _mm256_set_m128i(second, first);
    words.low = _mm256_shuffle_epi8(
        both, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                               4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1));
  } else if constexpr (kBits == 4) {
    words.low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  } else {
    const __m256 a = _mm256_loadu_ps(reinterpret_cast<const float*>(codes));
    const __m256 b = _mm256_loadu_ps(reinterpret_cast<const float*>(codes + 32));
    const auto gather = [](__m256 mixed) {
      return _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8);
    };
    words.low = gather(_mm256_shuffle_ps(a, b, 0x88));
    words.high = gather(_mm256_shuffle_ps(a, b, 0xdd));
  }
  return words;
}

// Step j of a block as floats kMagic + code; `j` is a constant after unrolling.
template <int kBits>
inline __m256 magic_codes(const Words<kBits>& words, int j) {
  __m256i field = words.low;
  if constexpr (kBits == 8) {
    field = j < 4 ? words.low : words.high;
    field = _mm256_srli_epi32(field, 8 * (j % 4));
  } else {
    field = _mm256_srli_epi32(field, kBits * j);
  }
  field = _mm256_and_si256(field, _mm256_set1_epi32((1 << kBits) - 1));
  // One bit stands for -1 and +1: the code is doubled.
  if constexpr (kBits == 1) field = _mm256_add_epi32(field, field);
  return _mm256_or_ps(_mm256_castsi256_ps(field), _mm256_set1_ps(kMagic));
}

// 64 codes of at most 4 bits as bytes, in the order of byte_order().
struct Bytes {
  __m256i even, odd;
};

template <int kBits>
inline Bytes load_bytes(const uint8_t* codes) {
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  __m256i word;
  int shift;
  if constexpr (kBits == 1) {
    int64_t bits;
    __builtin_memcpy(&bits, codes, sizeof(bits));
    word = _mm256_srlv_epi64(_mm256_set1_epi64x(bits), _mm256_setr_epi64x(0, 1, 2, 3));
    shift = 4;
  } else if constexpr (kBits == 2) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    word =
        _mm256_srlv_epi32(_mm256_set_m128i(half, half), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    shift = 2;
  } else if constexpr (kBits == 3) {
    // 24 bits a lane: spread to two times 12, then to four times 6, two codes to a byte.
    word = load_words<3>(codes).low;
    word =
        _mm256_or_si256(_mm256_and_si256(word, _mm256_set1_epi32(0xfff)),
                        _mm256_slli_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0xfff000)), 4));
    word = _mm256_or_si256(
        _mm256_and_si256(word, _mm256_set1_epi32(0x003f003f)),
        _mm256_slli_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0x0fc00fc0)), 2));
    shift = 3;
  } else {
    word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    shift = 4;
  }
  return {_mm256_and_si256(word, mask), _mm256_and_si256(_mm256_srli_epi32(word, shift), mask)};
}

// Column, within its block, of byte p of load_bytes (even: 0..31, odd: 32..63).
inline int byte_order(int bits, int p) {
  const int odd = p / 32, i = p % 32;
  if (bits == 1) return 8 * (i % 8) + i / 8 + 4 * odd;
  if (bits == 2) return 4 * (i % 16) + 2 * (i / 16) + odd;
  return 2 * i + odd;
}

// Five trits to five 2-bit codes, for every byte value.
struct TritTable {
  uint16_t codes[256];
  constexpr TritTable() : codes() {
    for (int value = 0; value < 256; ++value) {
      int rest = value, packed = 0;
      for (int t = 0; t < kTritsPerByte; ++t) {
        packed |= (rest % 3) << (2 * t);
        rest /= 3;
      }
      codes[value] = static_cast<uint16_t>(packed);
    }
  }
};
constexpr TritTable kTrits;

// A ternary row as a row of 2-bit codes; writes up to 8 bytes past the last code.
inline void ternary_to_two_bits(const uint8_t* row, int64_t bytes, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 <= bytes; i += 4, out += 5) {  // 4 bytes: 20 trits: 40 bits
    const uint64_t bits = static_cast<uint64_t>(kTrits.codes[row[i]]) |
                          static_cast<uint64_t>(kTrits.codes[row[i + 1]]) << 10 |
                          static_cast<uint64_t>(kTrits.codes[row[i + 2]]) << 20 |
                          static_cast<uint64_t>(kTrits.codes[row[i + 3]]) << 30;
    __builtin_memcpy(out, &bits, sizeof(bits));
  }
  uint64_t bits = 0;
  for (int shift = 0; i < bytes; ++i, shift += 10) {
    bits |= static_cast<uint64_t>(kTrits.codes[row[i]]) << shift;
  }
  __builtin_memcpy(out, &bits, sizeof(bits));
}

// `columns` (a multiple of 16) entries of a codebook in plain order, from a row of `bytes` bytes;
// codes past the row count as 0.
inline void codes_to_entries(const uint8_t* row, int64_t bytes, int bits, const uint8_t* codebook,
                             int levels, int64_t columns, uint8_t* out) {
  uint8_t entries[16] = {};
  __builtin_memcpy(entries, codebook, static_cast<size_t>(levels));
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
  const uint64_t field = 0x0101010101010101ull * ((1u << bits) - 1);
  for (int64_t k = 0, at = 0; k < columns; k += 16) {
    uint64_t codes[2];
    for (uint64_t& eight : codes) {  // eight codes lie in `bits` bytes
      uint64_t word = 0;
      const int64_t left = bytes - at;
      if (left >= 8) {
        __builtin_memcpy(&word, row + at, 8);
      } else if (left > 0) {
        __builtin_memcpy(&word, row + at, static_cast<size_t>(left));
      }
      eight = _pdep_u64(word, field);
      at += bits;
    }
    const __m128i indices = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm_shuffle_epi8(table, indices));
  }
}

}  // namespace
}  // namespace pyrobust::matmul
