// Included by avx2.cpp and avx512_rows.h: codes of a span of columns to bytes in plain order.
//
// Whole blocks of 64 columns are split by halves: bytes to nibbles, nibbles to pairs of bits, each
// time the low half before the high one, which is the order of the columns.
#pragma once

#include "matmul/add_registers.h"
#include "matmul/avx2_decode.h"
#include "matmul/avx2_tables.h"
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

// Codes of 32 columns in plain order, from 4 kBits bytes.
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
    int32_t last;
    __builtin_memcpy(&last, codes + 8, sizeof(last));
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_insert_epi32(first, last, 2));
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

// 160 columns in 32 bytes, 32 columns at a time: two registers of words, which packing by lanes
// then brings into order, each with its byte and 2^16 / 3^(t + 1) for its digit t. Rounding that up
// errs by less than the 2^16 / 243 between two fractions, as bytes are below 243.
struct TernaryRound {
  static constexpr int kColumns = 160;
  int first[5];
  alignas(32) uint8_t byte[5][2][32];
  alignas(32) uint16_t factor[5][2][16];

  constexpr TernaryRound() : first(), byte(), factor() {
    for (int i = 0; i < 5; ++i) {
      first[i] = i < 4 ? 32 * i / kTritsPerByte : 24;  // eight bytes are read
      for (int p = 0; p < 32; ++p) {                   // h, lane and word of column 32 i + p
        const int column = 32 * i + p, h = p / 8 % 2, word = 8 * (p / 16) + p % 8;
        byte[i][h][2 * word] = static_cast<uint8_t>(column / kTritsPerByte - first[i]);
        byte[i][h][2 * word + 1] = 0x80;
        int power = 3;
        for (int t = column % kTritsPerByte; t > 0; --t) power *= 3;
        factor[i][h][word] = static_cast<uint16_t>((65536 + power - 1) / power);
      }
    }
  }
};
constexpr TernaryRound kTernary;

struct Avx2Codes {
#if !defined(__AVX512F__)
  template <bool kWide>
  using Table = TwoRegisters<kWide>;
  using Table256 = ManyLoads;
  static constexpr bool kHalfTable256 = false;
  static constexpr bool kReadsPacked = true;
  template <int kBits>
  using PackedTable = PackedTableOf<kBits>;
#endif

  // Whole runs of 32 columns.
  template <int kBits>
  static int64_t expand_runs(const uint8_t* codes, int64_t count, uint8_t* out) {
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k),
                          plain_codes<kBits>(codes + k * kBits / 8));
    }
    return k;
  }

  // Digit t of a byte b is the whole part of 3 frac(b / 3^(t + 1)), as a fraction of 2^16.
  static void expand_ternary(const uint8_t* codes, int64_t count, uint8_t* out) {
    constexpr int64_t kRound = TernaryRound::kColumns;
    int64_t k = 0;
    for (; k + kRound <= count; k += kRound, out += kRound, codes += kRound / kTritsPerByte) {
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) {
        const __m256i both = _mm256_broadcastsi128_si256(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + kTernary.first[i])));
        __m256i digits[2];
        for (int h = 0; h < 2; ++h) {
          const auto* places = reinterpret_cast<const __m256i*>(kTernary.byte[i][h]);
          const auto* factors = reinterpret_cast<const __m256i*>(kTernary.factor[i][h]);
          const __m256i bytes = _mm256_shuffle_epi8(both, _mm256_load_si256(places));
          const __m256i fraction = _mm256_mullo_epi16(bytes, _mm256_load_si256(factors));
          digits[h] = _mm256_mulhi_epu16(fraction, _mm256_set1_epi16(3));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i),
                            _mm256_packus_epi16(digits[0], digits[1]));
      }
    }
    expand_digits(codes, count - k, out);
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
