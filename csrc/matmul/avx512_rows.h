// Included by avx512.cpp alone: as avx2_rows.h, with tables of up to 16 floats in one register.
#pragma once

#include "matmul/avx2_rows.h"

namespace pyrobust::matmul {
namespace {

// 256 floats in sixteen registers: a permutation of each pair takes the low five bits of the code,
// three rounds of blending the others.
class WideTable {
 public:
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
class OneRegister {
 public:
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

struct Avx512Codes : Avx2Codes {
  template <bool kWide>
  using Table = OneRegister<kWide>;
  using Table256 = WideTable;
  static constexpr bool kHalfTable256 = true;
  using HalfTable256 = WideHalfTable;
};

}  // namespace
}  // namespace pyrobust::matmul
