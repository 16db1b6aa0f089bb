// Included by avx512.cpp alone: few rows of x times ternary codes, five in a byte, without
// unpacking them. With q_i = v / 3^i rounded down, the five codes of a byte v are q_i - 3 q_(i+1),
// so that
//
//   sum over i of code_i x_i  =  v x_0 + q_1 (x_1 - 3 x_0) + ... + q_4 (x_4 - 3 x_3)
//
// whose factors of v and q_i are prepared once a call, 16 bits each. 32 bytes, which are more than
// a group of 128 columns, take one load and five products (vpdpwssd) a row of x:
//
//   group g   bytes from floor(first column / 5) on, 32 a step; columns of its neighbours count as
//   0 factors   (rows of bytes, groups, steps, 5, 32)
#pragma once

#include "matmul/avx512_lanes.h"
#include "matmul/avx512_parts.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kStepBytes = 32;
constexpr int64_t kStepFactors = kTritsPerByte * kStepBytes;

// The factors of a part of row m, from its bytes in plain order.
inline void spread_trits(const PackedMatrix& w, const WideRows& x, int64_t m, int part) {
  const int64_t row = part * x.rows + m, groups = groups_of(w), width = group_blocks(w) * kBlock;
  const int8_t* q = x.q + row * x.stride;
  int16_t* out = x.trits + row * groups * x.trit_steps * kStepFactors;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * width, end = w.cols - begin < width ? w.cols : begin + width;
    int64_t column = begin / kTritsPerByte * kTritsPerByte;
    for (int64_t step = 0; step < x.trit_steps; ++step, out += kStepFactors) {
      for (int64_t j = 0; j < kStepBytes; ++j) {
        int before = 0;
        for (int64_t i = 0; i < kTritsPerByte; ++i, ++column) {
          const int own = column >= begin && column < end ? q[column] : 0;
          out[i * kStepBytes + j] = static_cast<int16_t>(own - 3 * before);
          before = own;
        }
      }
    }
  }
}

// sum += a b, two products of 16 bits a lane; an asm statement as add_dots().
inline void add_word_dots(__m512i& sum, __m512i a, const __m512i& b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
}

// sum[m * kWide + i] += group g of row i of W times row m of x.
template <int kRows, int kWide>
__attribute__((always_inline)) inline void add_trits(const uint8_t* base, int64_t pitch,
                                                     int64_t first_byte, int64_t steps,
                                                     const int16_t* factors, int64_t row_factors,
                                                     __m512i (&sum)[kRows * kWide]) {
  for (int64_t step = 0; step < steps; ++step, factors += kStepFactors) {
    const int64_t byte = first_byte + step * kStepBytes, left = pitch - byte;
    const __mmask32 mask = left >= kStepBytes ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0u;
    const uint8_t* at = base + byte;
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i, at += pitch) {
      const __m256i read = _mm256_maskz_loadu_epi8(mask, at);
      // Bytes above 242 are no code; they count modulo 243, as elsewhere.
      const __m256i bytes = _mm256_min_epu8(read, _mm256_add_epi8(read, _mm256_set1_epi8(13)));
      const __m512i v = _mm512_cvtepu8_epi16(bytes);
      const __m512i q[kTritsPerByte] = {v, _mm512_mulhi_epu16(v, _mm512_set1_epi16(21846)),
                                        _mm512_mulhi_epu16(v, _mm512_set1_epi16(7282)),
                                        _mm512_mulhi_epu16(v, _mm512_set1_epi16(2428)),
                                        _mm512_mulhi_epu16(v, _mm512_set1_epi16(810))};
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const auto* own = reinterpret_cast<const __m512i*>(factors + m * row_factors);
#pragma GCC unroll 5
        for (int t = 0; t < kTritsPerByte; ++t) add_word_dots(sum[m * kWide + i], q[t], own[t]);
      }
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
