// The complex member of the family: y = conj(x) W^T with weights in {1, i, -1, -i}.
//
// W is (rows, cols) in 2-bit codes of the canonical layout; code c stands for i^c times its scale:
//
//     code   0   1   2   3            c = 0, 2: scale_real * u       c = 1, 3: i * scale_imag * v
//     u      1   0  -1   0
//     v      0   1   0  -1
//
// x = a + i b is (M, cols) in two int8 matrices, any value from -128 to 127. Four integer sums over
// the columns say everything; they are exact (cols is at most 2^23):
//
//     A_re = sum a u     B_re = sum b v     A_im = sum a v     B_im = -sum b u
//
// With a step per row for the real parts (t) and the imaginary parts (r) of x, in double:
//
//     y_re = (float) ((scale_real t) A_re + (scale_imag r) B_re)
//     y_im = (float) ((scale_imag t) A_im + (scale_real r) B_im)
//
// so the results have the same bits on every instruction set, thread count and batch split.
// Source: F. Wang et al., "iFairy: the First 2-bit Complex LLM with All Parameters in {1, -1, i,
// -i}", 2025, arXiv 2508.05571 (the conjugate convention, the scale per part).
#pragma once

#include <cstdint>

namespace pyrobust::matmul {

constexpr int64_t kComplexMaxCols = int64_t{1} << 23;

struct ComplexProblem {
  const uint8_t* codes = nullptr;  // (rows, packed_row_bytes(cols))
  int64_t rows = 0;
  int64_t cols = 0;
  const int8_t* x_real = nullptr;  // (count, cols)
  const int8_t* x_imag = nullptr;
  int64_t count = 0;  // M
};

// out: (4, count, rows): A_re, B_re, A_im, B_im.
void complex_sums(const ComplexProblem& problem, int32_t* out, int num_threads);

// Scales of the two kinds of weights; steps of each row of x, (count) each.
struct ComplexScales {
  float real = 1.0f;
  float imag = 1.0f;
  const float* step_real = nullptr;
  const float* step_imag = nullptr;
};

// y_real, y_imag: (count, rows).
void complex_linear(const ComplexProblem& problem, const ComplexScales& scales, float* y_real,
                    float* y_imag, int num_threads);

}  // namespace pyrobust::matmul
