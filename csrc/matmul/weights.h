// Internal: one row of the packed weight as integers and as floats, shared by every path.
#pragma once

#include <cstdint>

#include "core/bit_layout.h"
#include "matmul/matmul.h"

namespace pyrobust::matmul {

// The weight is scale * (multiplier * code - zero): one bit stands for -1 and +1.
PYROBUST_HD int code_multiplier(int levels) { return levels == 2 ? 2 : 1; }

PYROBUST_HD int symmetric_zero(int levels) { return levels == 2 ? 1 : levels / 2; }

PYROBUST_HD int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a - 1) / b + 1 : 0; }

// Columns of scale and zero.
PYROBUST_HD int64_t scale_cols(const PackedMatrix& w) {
  return w.group_dim == 1 ? ceil_div(w.cols, w.group_size) : w.cols;
}

PYROBUST_HD const uint8_t* code_row(const PackedMatrix& w, int64_t n) {
  return w.codes + n * packed_row_bytes(w.cols, w.levels);
}

// Index of row n's first scale; the scale of column k is at + k / group_size (group_dim 1) or + k.
PYROBUST_HD int64_t scale_row(const PackedMatrix& w, int64_t n) {
  return (w.group_dim == 1 ? n : n / w.group_size) * scale_cols(w);
}

PYROBUST_HD int zero_at(const PackedMatrix& w, int64_t index) {
  return w.zero != nullptr ? w.zero[index] : symmetric_zero(w.levels);
}

// out[k] = multiplier * code - zero, in [-255, 255].
PYROBUST_HD void integer_row(const PackedMatrix& w, int64_t n, int16_t* out) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w.levels);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += run, ++group) {
    const int64_t end = w.cols - begin > run ? begin + run : w.cols;
    const int zero = zero_at(w, first + group);
    for (int64_t k = begin; k < end; ++k) {
      out[k] = static_cast<int16_t>(multiplier * get_code(row, k, w.levels) - zero);
    }
  }
}

// out[k] = the exact float32 weight.
PYROBUST_HD void float_row(const PackedMatrix& w, int64_t n, float* out) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w.levels);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += run, ++group) {
    const int64_t end = w.cols - begin > run ? begin + run : w.cols;
    const int zero = zero_at(w, first + group);
    const float scale = load_float(w.scale, first + group, w.scale_type);
    for (int64_t k = begin; k < end; ++k) {
      out[k] = scale * static_cast<float>(multiplier * get_code(row, k, w.levels) - zero);
    }
  }
}

}  // namespace pyrobust::matmul
