// Included by avx2_gradient.h and avx512_gradient.h: rows of g meet a tile of W (kernels.h), sums
// in registers.
#pragma once

#include "matmul/kernels.h"
#include "matmul/registers.h"

namespace pyrobust::matmul {
namespace {

inline void add_to_totals(Floats sum, double* totals) {
#if defined(__AVX512F__)
  const auto add_half = [](__m256 half, double* to) {
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(half)));
  };
  add_half(_mm512_castps512_ps256(sum), totals);
  add_half(_mm512_extractf32x8_ps(sum, 1), totals + kFloats / 2);
#else
  const auto add_half = [](__m128 half, double* to) {
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(half)));
  };
  add_half(_mm256_castps256_ps128(sum), totals);
  add_half(_mm256_extractf128_ps(sum, 1), totals + kFloats / 2);
#endif
}

// kRows rows of g, all columns of the tile, kRegisters registers of them at a time.
template <int kRows, int kRegisters>
void add_gradient_rows(const float* g, int64_t count, const float* tile, double* totals) {
  for (int64_t k = 0; k < kGradientColumns; k += kRegisters * kFloats) {
    Floats sum[kRows][kRegisters];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r) sum[m][r] = broadcast(0.0f);
    }
    for (int64_t n = 0; n < count; ++n) {
      Floats w[kRegisters];
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r)
        w[r] = load(tile + n * kGradientColumns + k + r * kFloats);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Floats a = broadcast(g[m * kGradientRows + n]);
#pragma GCC unroll 8
        for (int r = 0; r < kRegisters; ++r) sum[m][r] = fused(a, w[r], sum[m][r]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r) {
        add_to_totals(sum[m][r], totals + m * kGradientColumns + k + r * kFloats);
      }
    }
  }
}

// At least eight sums, which hide the latency of one, and no more than there are registers.
template <int kRows>
void add_gradient_rows_of(const float* g, int64_t count, const float* tile, double* totals) {
  constexpr int kRegisters = kRows == 1 ? 8 : kRows <= 4 ? (kFloats == 16 ? 4 : 2) : 2;
  add_gradient_rows<kRows, kRegisters>(g, count, tile, totals);
}

void add_gradient_tile(const float* g, int64_t rows, int64_t count, const float* tile,
                       double* totals) {
  constexpr int64_t kMost = kFloats == 16 ? 8 : 4;
  for (int64_t m = 0; m < rows; m += kMost) {
    const float* part = g + m * kGradientRows;
    double* to = totals + m * kGradientColumns;
    switch (rows - m < kMost ? rows - m : kMost) {
      case 1:
        add_gradient_rows_of<1>(part, count, tile, to);
        break;
      case 2:
        add_gradient_rows_of<2>(part, count, tile, to);
        break;
      case 3:
        add_gradient_rows_of<3>(part, count, tile, to);
        break;
      case 4:
        add_gradient_rows_of<4>(part, count, tile, to);
        break;
#if defined(__AVX512F__)
      case 5:
        add_gradient_rows_of<5>(part, count, tile, to);
        break;
      case 6:
        add_gradient_rows_of<6>(part, count, tile, to);
        break;
      case 7:
        add_gradient_rows_of<7>(part, count, tile, to);
        break;
      default:
        add_gradient_rows_of<8>(part, count, tile, to);
#endif
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
