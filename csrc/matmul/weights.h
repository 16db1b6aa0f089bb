// Internal: one row of the packed weight as integers and as floats, shared by every path.
#pragma once

#include <cstdint>

#include "core/bit_layout.h"
#include "matmul/kernels.h"

namespace pyrobust::matmul {

// The weight is scale * (multiplier * code - zero): one bit stands for -1 and +1.
PYROBUST_HD int code_multiplier(const PackedMatrix& w) {
  return w.codebook == nullptr && w.levels == 2 ? 2 : 1;
}

PYROBUST_HD int symmetric_zero(const PackedMatrix& w) {
  if (w.codebook != nullptr) return 128;
  return w.levels == 2 ? 1 : w.levels / 2;
}

// Up to so many columns the total of a row with integer scales and x in 8 bits fits in int32: it is
// at most columns * 127 * 511 by the bound of matmul.h on scale times |code - zero|.
constexpr int64_t kMostIntegerColumns = 32768;

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
  return w.zero != nullptr ? w.zero[index] : symmetric_zero(w);
}

// A group's scale: an integer where the weight has row scales.
PYROBUST_HD float scale_at(const PackedMatrix& w, int64_t index) {
  return w.row_scale != nullptr ? static_cast<float>(static_cast<const uint8_t*>(w.scale)[index])
                                : load_float(w.scale, index, w.scale_type);
}

PYROBUST_HD int value_at(const PackedMatrix& w, const uint8_t* row, int64_t k, int multiplier) {
  const int code = get_code(row, k, w.levels);
  return w.codebook != nullptr ? w.codebook[code] : multiplier * code;
}

// out[k] = multiplier * code - zero, in [-255, 255].
PYROBUST_HD void integer_row(const PackedMatrix& w, int64_t n, int16_t* out) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += run, ++group) {
    const int64_t end = w.cols - begin > run ? begin + run : w.cols;
    const int zero = zero_at(w, first + group);
    for (int64_t k = begin; k < end; ++k) {
      out[k] = static_cast<int16_t>(value_at(w, row, k, multiplier) - zero);
    }
  }
}

// out[k] = the exact weight without row scale and remainder.
PYROBUST_HD void float_row(const PackedMatrix& w, int64_t n, float* out) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += run, ++group) {
    const int64_t end = w.cols - begin > run ? begin + run : w.cols;
    const int zero = zero_at(w, first + group);
    const float scale = scale_at(w, first + group);
    for (int64_t k = begin; k < end; ++k) {
      out[k] = scale * static_cast<float>(value_at(w, row, k, multiplier) - zero);
    }
  }
}

// Entries [*begin, *end) of row n of the remainder, clamped to what there is.
PYROBUST_HD void remainder_range(const PackedMatrix& w, int64_t n, int64_t* begin, int64_t* end) {
  const Remainder& s = w.remainder;
  *begin = s.offsets[n] < 0 ? 0 : s.offsets[n];
  *end = s.offsets[n + 1] > s.count ? s.count : s.offsets[n + 1];
}

// Writes one result: `total` is the dense sum without the row scale.
PYROBUST_HD void store_result(const Output& out, int64_t m, int64_t n, double total, double step) {
  if (out.row_scale != nullptr) total *= out.row_scale[n];
  if (out.remainder != nullptr) {
    total += out.remainder[(n - out.remainder_row) * out.remainder_stride + m];
  }
  const double bias = out.bias != nullptr ? out.bias[n] : 0.0;
  store_float(out.data, (out.row + m) * out.stride + n - out.first, out.type,
              static_cast<float>(total * step + bias));
}

}  // namespace pyrobust::matmul
