// The product with the sparse remainder. Included by the file of each instruction set and compiled
// with its flags; plain loops that the compiler turns into vectors over the rows of x.
#pragma once

#include "core/activation_int8.h"
#include "matmul/kernels.h"
#include "matmul/weights.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kSparseRows = 16;  // rows of x whose sums stay in registers

void sparse_prepare(Mode mode, const Activations& x, int64_t cols, int64_t first, int64_t rows,
                    float* prepared, float* scratch) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < cols; ++k) {
      scratch[k] = load_float(x.data, (first + m) * cols + k, x.type);
    }
    if (mode == Mode::kInt8) {
      const double step = activation_step(scratch, cols);
      for (int64_t k = 0; k < cols; ++k) scratch[k] = quantized_activation(scratch[k], step);
    }
    for (int64_t k = 0; k < cols; ++k) prepared[k * rows + m] = scratch[k];
  }
}

// The sums of kRows rows of x with entries [begin, end); every product is exact in double.
template <int64_t kRows>
void sparse_row(const Remainder& s, int64_t cols, int64_t begin, int64_t end, const float* x,
                int64_t stride, double* sums) {
  double sum[kRows] = {};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = s.columns[i];
    if (k < 0 || k >= cols) continue;
    const double value = load_float(s.values, i, s.type);
    const float* column = x + k * stride;
    for (int64_t m = 0; m < kRows; ++m) sum[m] += value * column[m];
  }
  for (int64_t m = 0; m < kRows; ++m) sums[m] = sum[m];
}

void sparse_multiply(const PackedMatrix& w, const float* prepared, int64_t rows, int64_t begin,
                     int64_t end, double* sums) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t from, to;
    remainder_range(w, n, &from, &to);
    double* out = sums + (n - begin) * rows;
    int64_t m = 0;
    for (; m + kSparseRows <= rows; m += kSparseRows) {
      sparse_row<kSparseRows>(w.remainder, w.cols, from, to, prepared + m, rows, out + m);
    }
    for (; m < rows; ++m) {
      sparse_row<1>(w.remainder, w.cols, from, to, prepared + m, rows, out + m);
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
