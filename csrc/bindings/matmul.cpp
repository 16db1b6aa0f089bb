// Python entry points of the matmul kernels.
#include "matmul/matmul.h"

#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "core/bit_layout.h"
#include "runtime/check.h"

namespace pyrobust {
namespace {

FloatType float_type(const TensorView& tensor) {
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
matmul::PackedMatrix packed_matrix(const TensorView& codes, const TensorView& scale,
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

void packed_linear(py::handle x_, py::handle codes_, py::handle scale_, py::handle zero_,
                   py::handle bias_, py::handle out_, int64_t in_features, int levels,
                   int64_t group_size, int group_dim, bool int8, int num_threads) {
  const TensorView x = view(x_, "x"), bias = view_optional(bias_, "bias"), out = view(out_, "out");
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes_, "codes"), view(scale_, "scale"), view_optional(zero_, "zero"),
                    in_features, levels, group_size, group_dim);
  check(x.ndim >= 1, "x must have at least one dimension.");
  x.require_size(x.ndim - 1, in_features);
  matmul::Activations activations{x.data, float_type(x), 1};
  out.require_dtype(x.dtype).require_ndim(x.ndim).require_size(x.ndim - 1, weight.rows);
  for (int i = 0; i + 1 < x.ndim; ++i) {
    out.require_size(i, x.shape[i]);
    activations.rows *= x.shape[i];
  }
  if (bias.ndim != 0) {
    bias.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, weight.rows);
  }
  const auto mode = int8 ? matmul::Mode::kInt8 : matmul::Mode::kExact;
  py::gil_scoped_release release;
  matmul::packed_linear(activations, weight, bias.as<const float>(), mode, out.data, num_threads);
}

void dequantize(py::handle codes, py::handle scale, py::handle zero, py::handle out_,
                int64_t in_features, int levels, int64_t group_size, int group_dim,
                int num_threads) {
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                    in_features, levels, group_size, group_dim);
  const TensorView out = view(out_, "out");
  out.require_dtype(DType::kFloat32).require_ndim(2);
  out.require_size(0, weight.rows).require_size(1, in_features);
  py::gil_scoped_release release;
  matmul::dequantize(weight, out.as<float>(), num_threads);
}

struct CodeViews {
  TensorView codes, packed;
  int64_t rows = 0, cols = 0;
};

CodeViews code_views(py::handle codes, py::handle packed, int levels) {
  CodeViews out{view(codes, "codes"), view(packed, "packed"), 0, 0};
  check(code_bits(levels) >= 0, "levels must be one of 2, 3, 4, 8, 16, 256; got ", levels, ".");
  out.codes.require_dtype(DType::kUInt8).require_ndim(2);
  out.rows = out.codes.shape[0];
  out.cols = out.codes.shape[1];
  out.packed.require_dtype(DType::kUInt8).require_ndim(2).require_size(0, out.rows);
  out.packed.require_size(1, packed_row_bytes(out.cols, levels));
  return out;
}

void unpack_codes(py::handle packed, py::handle codes, int levels, int num_threads) {
  const CodeViews views = code_views(codes, packed, levels);
  py::gil_scoped_release release;
  matmul::unpack_codes(views.packed.as<const uint8_t>(), views.rows, views.cols, levels,
                       views.codes.as<uint8_t>(), num_threads);
}

void pack_codes(py::handle codes, py::handle packed, int levels, int num_threads) {
  const CodeViews views = code_views(codes, packed, levels);
  py::gil_scoped_release release;
  matmul::pack_codes(views.codes.as<const uint8_t>(), views.rows, views.cols, levels,
                     views.packed.as<uint8_t>(), num_threads);
}

}  // namespace

void bind_matmul(py::module_& m) {
  m.def("packed_linear", &packed_linear);
  m.def("dequantize", &dequantize);
  m.def("unpack_codes", &unpack_codes);
  m.def("pack_codes", &pack_codes);
}

}  // namespace pyrobust
