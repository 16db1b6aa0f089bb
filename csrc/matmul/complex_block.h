// Internal: what the instruction sets share of the complex product.
#pragma once

#include <cstdint>

#include "core/bit_layout.h"
#include "matmul/complex.h"

namespace pyrobust::matmul {

constexpr int64_t kComplexBlock = 64;       // columns at a time
constexpr int64_t kComplexBlockBytes = 16;  // of codes

// x ready to multiply: rows of whole blocks, columns of a block in the order that the instruction
// set asks for, zeros past the end; and the sums of each row.
struct ComplexBlock {
  const ComplexProblem* problem = nullptr;
  const int8_t* real = nullptr;  // (count, blocks * kComplexBlock)
  const int8_t* imag = nullptr;
  const int32_t* sum_real = nullptr;  // (count)
  const int32_t* sum_imag = nullptr;
  int64_t blocks = 0;
  // Where results go: integers if `sums` is set, else floats.
  int32_t* sums = nullptr;
  ComplexScales scales;
  float* y_real = nullptr;
  float* y_imag = nullptr;
};

// Results of row m of x and row n of W from the four sums of matmul/complex.h.
PYROBUST_HD void store_complex(const ComplexBlock& b, int64_t m, int64_t n, int32_t a_re,
                               int32_t b_re, int32_t a_im, int32_t b_im) {
  const int64_t rows = b.problem->rows, at = m * rows + n, plane = b.problem->count * rows;
  if (b.sums != nullptr) {
    b.sums[at] = a_re;
    b.sums[plane + at] = b_re;
    b.sums[2 * plane + at] = a_im;
    b.sums[3 * plane + at] = b_im;
    return;
  }
  const double real = b.scales.real, imag = b.scales.imag;
  const double t = b.scales.step_real[m], r = b.scales.step_imag[m];
  b.y_real[at] = static_cast<float>(real * t * a_re + imag * r * b_re);
  b.y_imag[at] = static_cast<float>(imag * t * a_im + real * r * b_im);
}

// The last block of a row of codes may be short: `tail` then holds a copy of it.
struct ComplexRow {
  const uint8_t* row;
  int64_t whole;  // blocks that may be read in place
  uint8_t tail[kComplexBlockBytes];
};

PYROBUST_HD void load_complex_row(const ComplexProblem& p, int64_t n, ComplexRow* out) {
  const int64_t bytes = packed_row_bytes(p.cols, 4);
  out->row = p.codes + n * bytes;
  out->whole = bytes / kComplexBlockBytes;
  for (int64_t i = 0; i < kComplexBlockBytes; ++i) {
    const int64_t at = out->whole * kComplexBlockBytes + i;
    out->tail[i] = at < bytes ? out->row[at] : uint8_t{0};
  }
}

PYROBUST_HD const uint8_t* complex_codes(const ComplexRow& row, int64_t block) {
  return block < row.whole ? row.row + block * kComplexBlockBytes : row.tail;
}

}  // namespace pyrobust::matmul
