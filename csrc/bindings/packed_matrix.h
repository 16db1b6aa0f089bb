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

// The optional parts of a weight: None, or (row_scale, codebook, values, columns, offsets), each of
// which may be None. The tensors must outlive the weight. True where scales have two levels.
inline bool add_extras(py::handle extras, int levels, matmul::PackedMatrix* weight) {
  if (extras.is_none()) return false;
  const auto parts = py::reinterpret_borrow<py::tuple>(extras);
  check(parts.size() == 5, "extras must have 5 entries; got ", parts.size(), ".");
  const TensorView row_scale = view_optional(parts[0], "row_scale");
  const TensorView codebook = view_optional(parts[1], "codebook");
  const TensorView values = view_optional(parts[2], "values");
  const TensorView columns = view_optional(parts[3], "columns");
  const TensorView offsets = view_optional(parts[4], "offsets");
  const bool sparse = offsets.ndim != 0;
  check(sparse == (values.ndim != 0) && sparse == (columns.ndim != 0),
        "values, columns and offsets must be given together.");
  if (row_scale.ndim != 0) {
    row_scale.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, weight->rows);
    weight->row_scale = row_scale.as<const float>();
  }
  if (codebook.ndim != 0) {
    codebook.require_dtype(DType::kUInt8).require_ndim(1).require_size(0, levels);
    weight->codebook = codebook.as<const uint8_t>();
  }
  if (sparse) {
    offsets.require_dtype(DType::kInt64).require_ndim(1).require_size(0, weight->rows + 1);
    values.require_ndim(1);
    columns.require_dtype(DType::kInt32).require_ndim(1).require_size(0, values.shape[0]);
    weight->remainder = {values.data, columns.as<const int32_t>(), offsets.as<const int64_t>(),
                         float_type(values), values.shape[0]};
  }
  return row_scale.ndim != 0;
}

// Refuses numbers of columns whose bits could not be counted.
inline int64_t checked_row_bytes(int64_t cols, int levels) {
  check(cols >= 0 && cols <= int64_t{1} << 56, "in_features must lie in [0, 2^56]; got ", cols,
        ".");
  return packed_row_bytes(cols, levels);
}

// Every size the kernels rely on is checked here against the buffers that were passed.
inline matmul::PackedMatrix packed_matrix(const TensorView& codes, const TensorView& scale,
                                          const TensorView& zero, int64_t cols, int levels,
                                          int64_t group_size, int group_dim, py::handle extras) {
  check(code_bits(levels) >= 0, "levels must be one of 2, 3, 4, 8, 16, 256; got ", levels, ".");
  check(group_size >= 1, "group_size must be at least 1; got ", group_size, ".");
  check(group_dim == 0 || group_dim == 1, "group_dim must be 0 or 1; got ", group_dim, ".");
  const int64_t row_bytes = checked_row_bytes(cols, levels);
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
  weight.rows = rows;
  const bool two_level = add_extras(extras, levels, &weight);
  weight.codes = codes.as<const uint8_t>();
  weight.scale = scale.data;
  if (two_level) {
    scale.require_dtype(DType::kUInt8);
  } else {
    weight.scale_type = float_type(scale);
  }
  weight.cols = cols;
  weight.group_size = group_size;
  weight.group_dim = group_dim;
  weight.levels = levels;
  return weight;
}

}  // namespace pyrobust
