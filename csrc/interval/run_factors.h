// Included by dispatch.cpp alone: packed weights as whole numbers times a factor of each group, for
// radii in bfloat16 ("Coarse radii" in interval.h).
#pragma once

#include <cmath>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "interval/plan.h"
#include "matmul/weights.h"

namespace pyrobust {
namespace interval {
namespace {

inline float factor_of(const matmul::PackedMatrix& w, int64_t n, int64_t group) {
  const float scale = std::fabs(matmul::scale_at(w, matmul::scale_row(w, n) + group));
  return w.row_scale != nullptr ? scale * std::fabs(w.row_scale[n]) : scale;  // 23 bits: exact
}

// Whether groups are whole runs of a row and factors are far from overflow and underflow.
inline bool has_run_factors(const matmul::PackedMatrix& w) {
  constexpr float kLeast = 0x1p-100f, kMost = 0x1p100f;
  if (w.group_dim != 1 || w.remainder.offsets != nullptr) return false;
  if (w.group_size % kRun != 0 && w.group_size < w.cols) return false;
  const int64_t groups = matmul::scale_cols(w);
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const float factor = factor_of(w, n, g);
      if (factor != 0.0f && !(factor >= kLeast && factor <= kMost)) return false;
    }
  }
  return true;
}

inline int64_t runs_of(int64_t terms) { return (terms + kRun - 1) / kRun; }

// Those of rows [n, n + rows) and terms [from, from + count).
inline RunFactors run_factors(const matmul::PackedMatrix& w, int64_t n, int64_t rows, int64_t from,
                              int64_t count, float* values) {
  const int64_t runs = runs_of(count), of_group = runs_of(std::min(w.group_size, w.cols));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t run = 0; run < runs; ++run) {
      values[i * runs + run] = factor_of(w, n + i, (from / kRun + run) / of_group);
    }
  }
  return {values, runs, of_group, from / kRun};
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
