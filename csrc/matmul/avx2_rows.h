// Included by avx2.cpp and avx512_rows.h: codes of a span of columns to bytes in plain order, and
// sums with a table of floats.
//
// Whole blocks of 64 columns are split by halves: bytes to nibbles, nibbles to pairs of bits, each
// time the low half before the high one, which is the order of the columns.
#pragma once

#include "matmul/avx2_decode.h"
#include "matmul/decode_rows.h"

namespace pyrobust::matmul {
namespace {

inline __m128i load_128(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// 16 bytes that each hold two fields of `width` bits to 32 bytes, fields in order.
template <int kWidth>
inline __m256i split_fields(__m128i both) {
  const __m128i mask = _mm_set1_epi8((1 << kWidth) - 1);
  const __m128i low = _mm_and_si128(both, mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(both, kWidth), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

// Codes of 32 columns in plain order, from 4 kBits bytes (and up to 16 read).
template <int kBits>
inline __m256i plain_codes(const uint8_t* codes) {
  if constexpr (kBits == 1) {
    int32_t bits;
    __builtin_memcpy(&bits, codes, sizeof(bits));
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(bits),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_and_si256(set, _mm256_set1_epi8(1));
  } else if constexpr (kBits == 2) {
    const __m256i nibbles =
        split_fields<4>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return split_fields<2>(_mm256_castsi256_si128(nibbles));
  } else if constexpr (kBits == 3) {
    // 3 bytes to each 64-bit lane; 24 bits spread to two times 12, four times 6, eight times 3.
    const __m256i both = _mm256_broadcastsi128_si256(load_128(codes));
    __m256i word = _mm256_shuffle_epi8(
        both, _mm256_setr_epi8(0, 1, 2, -1, -1, -1, -1, -1, 3, 4, 5, -1, -1, -1, -1, -1,  //
                               6, 7, 8, -1, -1, -1, -1, -1, 9, 10, 11, -1, -1, -1, -1, -1));
    const auto spread = [&word](int shift, int64_t mask) {
      word = _mm256_and_si256(_mm256_or_si256(word, _mm256_slli_epi64(word, shift)),
                              _mm256_set1_epi64x(mask));
    };
    spread(20, 0x00000fff00000fff);
    spread(10, 0x003f003f003f003f);
    spread(5, 0x0707070707070707);
    return word;
  } else {
    return split_fields<4>(load_128(codes));
  }
}

struct Avx2Codes {
  // Whole runs of 32 columns of which 16 bytes may be read.
  template <int kBits>
  static int64_t expand_runs(const uint8_t* codes, int64_t bytes, int64_t count, uint8_t* out) {
    int64_t k = 0;
    for (; k + 32 <= count && k * kBits / 8 + 16 <= bytes; k += 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k),
                          plain_codes<kBits>(codes + k * kBits / 8));
    }
    return k;
  }

  static void add_table(const uint8_t* code, int64_t count, int levels, const float* table,
                        float* target) {
    int64_t k = 0;
    if (levels < 256) {
      // 16 entries lie in two registers: a permutation of each, the fourth bit of the code chooses.
      float entries[16] = {};
      for (int i = 0; i < levels; ++i) entries[i] = table[i];
      const __m256 low = _mm256_loadu_ps(entries), high = _mm256_loadu_ps(entries + 8);
      for (; k + 8 <= count; k += 8) {
        const __m256i index =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + k)));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                              _mm256_permutevar8x32_ps(high, index), upper);
        _mm256_storeu_ps(target + k, _mm256_add_ps(_mm256_loadu_ps(target + k), value));
      }
    }
    for (; k < count; ++k) target[k] += table[code[k]];  // faster than gathering at 256 entries
  }

  // At most 16 entries: one shuffle. Reads and writes up to 31 bytes of slack.
  static void look_up(const uint8_t* codebook, int levels, int64_t count, uint8_t* out) {
    uint8_t entries[16] = {};
    __builtin_memcpy(entries, codebook, static_cast<size_t>(levels));
    const __m256i table = _mm256_broadcastsi128_si256(load_128(entries));
    for (int64_t k = 0; k < count; k += 32) {
      auto* place = reinterpret_cast<__m256i*>(out + k);
      _mm256_storeu_si256(place, _mm256_shuffle_epi8(table, _mm256_loadu_si256(place)));
    }
  }
};

}  // namespace
}  // namespace pyrobust::matmul
