// The packed weight that three tensors and four numbers describe; shared by the families that take
// one.
#pragma once

#include <string>

#include "bindings/tensor_view.h"
#include "core/bit_layout.h"
#include "matmul/matmul.h"
#include "runtime/check.h"

namespace pyrobust {

inline FloatType float_type(const TensorView& tensor) {
  switch (tensor.dtype) {
    case DType::kFloat32:
      return FloatType::kFloat32;
    case DType::kFloat16:
      return FloatType::kFloat16;
    case DType::kBFloat16:
      return FloatType::kBFloat16;
    default:
      throw py::type_error(std::string(tensor.name) +
                           " must have dtype float32, float16 or bfloat16; got " +
                           dtype_name(tensor.dtype) + ".");
  }
}

// Every size the kernels rely on is checked here against the buffers that were passed.
inline matmul::PackedMatrix packed_matrix(const TensorView& codes, const TensorView& scale,
                                          const TensorView& zero, int64_t cols, int levels,
                                          int64_t group_size, int group_dim) {
  check(code_bits(levels) >= 0, "levels must be one of 2, 3, 4, 8, 16, 256; got ", levels, ".");
  check(cols >= 0, "in_features must be at least 0; got ", cols, ".");
  check(group_size >= 1, "group_size must be at least 1; got ", group_size, ".");
  check(group_dim == 0 || group_dim == 1, "group_dim must be 0 or 1; got ", group_dim, ".");
  const int64_t row_bytes = packed_row_bytes(cols, levels);
  codes.require_dtype(DType::kUInt8).require_ndim(2).require_size(1, row_bytes);
  const int64_t rows = codes.shape[0];
  const auto groups = [&](int64_t size) { return size == 0 ? 0 : (size - 1) / group_size + 1; };
  const int64_t scale_rows = group_dim == 1 ? rows : groups(rows);
  const int64_t scale_cols = group_dim == 1 ? groups(cols) : cols;
  scale.require_ndim(2).require_size(0, scale_rows).require_size(1, scale_cols);
  matmul::PackedMatrix weight;
  if (zero.ndim != 0) {
    zero.require_dtype(DType::kUInt8).require_ndim(2);
    zero.require_size(0, scale_rows).require_size(1, scale_cols);
    weight.zero = zero.as<const uint8_t>();
  }
  weight.codes = codes.as<const uint8_t>();
  weight.scale = scale.data;
  weight.scale_type = float_type(scale);
  weight.rows = rows;
  weight.cols = cols;
  weight.group_size = group_size;
  weight.group_dim = group_dim;
  weight.levels = levels;
  return weight;
}

}  // namespace pyrobust
