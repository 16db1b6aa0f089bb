// Included by avx512.cpp alone: as avx2_rows.h, with tables of up to 16 floats in one register.
#pragma once

#include "matmul/avx2_rows.h"

namespace pyrobust::matmul {
namespace {

// 256 floats in sixteen registers: a permutation of each pair takes the low five bits of the code,
// three rounds of blending the others.
class WideTable : public PlainSum {
 public:
  static constexpr int kBits = 8;

  explicit WideTable(const float* table) {
    for (int i = 0; i < 16; ++i) part_[i] = _mm512_loadu_ps(table + 16 * i);
  }

  template <bool kAlternate>
  Pair at(const uint8_t* codes) const {
    const Indices index = load_indices<kAlternate>(codes);
    return {entries(index.first), entries(index.second)};
  }

 private:
  __m512 entries(__m512i code) const {
    __m512 value[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      value[i] = _mm512_permutex2var_ps(part_[2 * i], code, part_[2 * i + 1]);
    }
    int bit = 32;
#pragma GCC unroll 3
    for (int half = 4; half > 0; half /= 2, bit *= 2) {
      const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) {
        value[i] = _mm512_mask_blend_ps(upper, value[2 * i], value[2 * i + 1]);
      }
    }
    return value[0];
  }

  __m512 part_[16];
};

// 256 values of 16 bits in eight registers: a permutation of each pair takes the low six bits of
// the code, two rounds of blending the others.
class WideHalfTable {
 public:
  explicit WideHalfTable(const LevelTable& table) {
    for (int i = 0; i < 8; ++i) part_[i] = _mm512_loadu_si512(table.half + 32 * i);
  }

  Ints at(const uint8_t* codes) const {
    const __m512i code =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __mmask32 bit_6 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __mmask32 bit_7 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
    const auto half = [&](int i) {
      return _mm512_mask_blend_epi16(bit_6, _mm512_permutex2var_epi16(part_[i], code, part_[i + 1]),
                                     _mm512_permutex2var_epi16(part_[i + 2], code, part_[i + 3]));
    };
    return _mm512_mask_blend_epi16(bit_7, half(0), half(4));
  }

 private:
  __m512i part_[8];
};

// Up to 16 floats in one register. Where there are fewer the rest is not read.
template <bool kWide>
class OneRegister : public PlainSum {
 public:
  static constexpr int kBits = 8, kEntries = 16;

  explicit OneRegister(const float* table)
      : table_(kWide ? _mm512_loadu_ps(table) : _mm512_castps256_ps512(_mm256_loadu_ps(table))) {}

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Indices index = load_indices<kAlternate>(code);
    return {_mm512_permutexvar_ps(index.first, table_),
            _mm512_permutexvar_ps(index.second, table_)};
  }

 private:
  __m512 table_;
};

// The entries of 32 packed codes, which spares expanding them to bytes: each lane of 32 bits is
// shifted until its code is in the lowest bits. A permutation looks at four of them, so that
// entries repeat for the bits of the next code.
template <int kBitsOfCode>
class PackedRegister : public PlainSum {
 public:
  static constexpr int kBits = kBitsOfCode, kEntries = 16;

  explicit PackedRegister(const float* table) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 entries =
        kBits == 4 ? _mm512_loadu_ps(table) : _mm512_castps256_ps512(_mm256_loadu_ps(table));
    table_ = kBits == 4 ? entries
                        : _mm512_permutexvar_ps(
                              _mm512_and_si512(lane, _mm512_set1_epi32((1 << kBits) - 1)), entries);
  }

  // Lanes hold codes 0, 2, ... and, kBits higher, 1, 3, ...; or 0 to 15, and in the second half of
  // the bytes 16 to 31.
  template <bool kAlternate>
  Pair at(const uint8_t* packed) const {
    constexpr int kStep = kAlternate ? 2 : 1;
    if constexpr (kBits == 3) {
      const __m512i shift = mod_8(_mm512_mullo_epi32(lanes(), _mm512_set1_epi32(3 * kStep)));
      const __m512i both = twelve_bytes(packed);
      const __m512i first = _mm512_shuffle_epi8(both, places<kStep>(0));
      if constexpr (kAlternate) return {entries(first, shift), entries(first, more(shift, 3))};
      return {entries(first, shift), entries(_mm512_shuffle_epi8(both, places<kStep>(6)), shift)};
    } else {
      const __m512i first = words<kStep>(packed);
      const __m512i shift = _mm512_and_si512(
          _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(kBits * kStep)), _mm512_set1_epi32(31));
      if constexpr (kAlternate) return {entries(first, shift), entries(first, more(shift, kBits))};
      if constexpr (kBits == 1) return {entries(first, shift), entries(first, more(shift, 16))};
      return {entries(first, shift), entries(words<kStep>(packed + 2 * kBits), shift)};
    }
  }

 private:
  static __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static __m512i mod_8(__m512i value) { return _mm512_and_si512(value, _mm512_set1_epi32(7)); }
  static __m512i more(__m512i shift, int by) {
    return _mm512_add_epi32(shift, _mm512_set1_epi32(by));
  }

  // Lane i: the 32 bits from `packed` on that hold its code, number kStep i.
  template <int kStep>
  static __m512i words(const uint8_t* packed) {
    constexpr int kBytes = 2 * kBits * kStep;  // of 16 lanes
    __m128i bytes;
    if constexpr (kBytes <= 4) {
      int32_t word;
      __builtin_memcpy(&word, packed, sizeof(word));
      return _mm512_set1_epi32(word);
    } else if constexpr (kBytes == 8) {
      bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    } else {
      bytes = load_128(packed);
    }
    constexpr int kShare = 32 / (kBits * kStep);  // lanes with one word
    const __m512i word = _mm512_srli_epi32(lanes(), kShare == 8 ? 3 : 2);
    return _mm512_permutexvar_epi32(word, _mm512_castsi128_si512(bytes));
  }

  // 12 bytes in every quarter.
  static __m512i twelve_bytes(const uint8_t* packed) {
    int32_t last;
    __builtin_memcpy(&last, packed + 8, sizeof(last));
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    return _mm512_broadcast_i32x4(_mm_insert_epi32(first, last, 2));
  }

  // Lane i takes the two bytes with bit 3 kStep i, counted from byte `first`.
  template <int kStep>
  static __m512i places(int first) {
    const __m512i byte = _mm512_add_epi32(
        _mm512_srli_epi32(_mm512_mullo_epi32(lanes(), _mm512_set1_epi32(3 * kStep)), 3),
        _mm512_set1_epi32(first));
    const __m512i two = _mm512_or_si512(byte, _mm512_slli_epi32(more(byte, 1), 8));
    return _mm512_or_si512(two, _mm512_set1_epi32(static_cast<int>(0x80800000u)));
  }

  __m512 entries(__m512i bits, __m512i shift) const {
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bits, shift), table_);
  }

  __m512 table_;
};

struct Avx512Codes : Avx2Codes {
  template <bool kWide>
  using Table = OneRegister<kWide>;
  using Table256 = WideTable;
  static constexpr bool kHalfTable256 = true;
  using HalfTable256 = WideHalfTable;
  static constexpr bool kReadsPacked = true;
  template <int kBits>
  using PackedTable = PackedRegister<kBits>;
};

}  // namespace
}  // namespace pyrobust::matmul
