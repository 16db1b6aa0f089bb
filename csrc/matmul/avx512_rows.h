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

  __m512 operator()(__m512i code) const {
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

 private:
  __m512 part_[16];
};

struct Avx512Codes : Avx2Codes {
  static void add_table(const uint8_t* code, int64_t count, int levels, const float* table,
                        float* target) {
    int64_t k = 0;
    const auto add = [&](const auto& value_of) {
      for (; k + 16 <= count; k += 16) {
        const __m512 value = value_of(_mm512_cvtepu8_epi32(load_128(code + k)));
        _mm512_storeu_ps(target + k, _mm512_add_ps(_mm512_loadu_ps(target + k), value));
      }
    };
    if (levels == 256) {
      add(WideTable(table));
    } else {
      float entries[16] = {};
      for (int i = 0; i < levels; ++i) entries[i] = table[i];
      const __m512 all = _mm512_loadu_ps(entries);
      add([all](__m512i index) { return _mm512_permutexvar_ps(index, all); });
    }
    for (; k < count; ++k) target[k] += table[code[k]];
  }
};

}  // namespace
}  // namespace pyrobust::matmul
