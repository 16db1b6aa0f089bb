// Included by avx512.cpp alone: the totals of a panel of 32 rows of W as results.
#pragma once

#include "matmul/avx512_panel_pending.h"

namespace pyrobust::matmul {
namespace {

inline __m512d eight_totals(const double* total) { return _mm512_load_pd(total); }
inline __m512d eight_totals(const int32_t* total) { return _mm512_cvtepi32_pd(eight_sums(total)); }

// Whole panels of 32 results a row of x, as store_16() of each half, with what a row of W brings in
// registers.
struct PanelResults {
  __m512d row_scale[4], bias[4];

  PanelResults(const Output& out, int64_t first) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t n = first + 8 * i;
      row_scale[i] = out.row_scale == nullptr ? _mm512_set1_pd(1.0)
                                              : _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n));
      bias[i] = out.bias == nullptr ? _mm512_setzero_pd()
                                    : _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n));
    }
  }

  template <typename Total>
  __m512 half(const Total* total, double step, int t) const {
    __m256 part[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512d sum = _mm512_mul_pd(eight_totals(total + 8 * i), row_scale[2 * t + i]);
      part[i] =
          _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(sum, _mm512_set1_pd(step)), bias[2 * t + i]));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
  }
};

template <FloatType kType, typename Total>
void store_whole_panel(const Output& out, int64_t rows, const double* step, int64_t first,
                       const Total* total) {
  const PanelResults results(out, first);
  int64_t at = out.row * out.stride + first - out.first;
  for (int64_t m = 0; m < rows; ++m, total += kPanelRows, at += out.stride) {
    const double factor = step == nullptr ? 1.0 : step[m];
    store_floats(out.data, kType, at, results.half(total, factor, 0));
    store_floats(out.data, kType, at + kLanes, results.half(total + kLanes, factor, 1));
  }
}

// Results of rows [begin, end) of W for `rows` rows of x, times their step, if any, within the
// panel from row `first` on, from their totals.
template <typename Total>
void store_panel_rows(const Output& out, int64_t rows, const double* step, int64_t first,
                      int64_t begin, int64_t end, const Total* total) {
  if (end - begin == kPanelRows && out.remainder == nullptr) {
    if (out.type == FloatType::kFloat32) {
      return store_whole_panel<FloatType::kFloat32>(out, rows, step, first, total);
    }
    if (out.type == FloatType::kBFloat16) {
      return store_whole_panel<FloatType::kBFloat16>(out, rows, step, first, total);
    }
    return store_whole_panel<FloatType::kFloat16>(out, rows, step, first, total);
  }
  for (int64_t m = 0; m < rows; ++m, total += kPanelRows) {
    const double factor = step == nullptr ? 1.0 : step[m];
    for (int64_t n = begin; n < end; ++n) store_result(out, m, n, total[n - first], factor);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
