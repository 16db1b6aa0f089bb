// Python entry points of the matmul kernels.
#include "matmul/matmul.h"

#include "bindings/families.h"
#include "bindings/packed_matrix.h"
#include "bindings/panel_cache.h"
#include "bindings/tensor_view.h"
#include "core/bit_layout.h"
#include "matmul/complex.h"
#include "runtime/check.h"

namespace pyrobust {
namespace {

// `count` rows of W from `first` on, of which there must be as many; no sum that could overflow.
matmul::RowRange row_range(int64_t first, int64_t count, int64_t rows) {
  check(first >= 0 && first <= rows && count <= rows - first, "rows must lie in [0, ", rows,
        "]; got ", count, " from ", first, " on.");
  return {first, first + count};
}

void packed_linear(py::handle x_, py::handle codes_, py::handle scale_, py::handle zero_,
                   py::handle bias_, py::handle out_, int64_t in_features, int levels,
                   int64_t group_size, int group_dim, bool int8, py::handle extras,
                   int64_t first_row, int num_threads) {
  const TensorView x = view(x_, "x"), bias = view_optional(bias_, "bias"), out = view(out_, "out");
  matmul::PackedMatrix weight =
      packed_matrix(view(codes_, "codes"), view(scale_, "scale"), view_optional(zero_, "zero"),
                    in_features, levels, group_size, group_dim, extras);
  check(x.ndim >= 1, "x must have at least one dimension.");
  x.require_size(x.ndim - 1, in_features);
  matmul::Activations activations{x.data, float_type(x), 1};
  out.require_dtype(x.dtype).require_ndim(x.ndim);
  const matmul::RowRange rows = row_range(first_row, out.shape[x.ndim - 1], weight.rows);
  for (int i = 0; i + 1 < x.ndim; ++i) {
    out.require_size(i, x.shape[i]);
    activations.rows *= x.shape[i];
  }
  if (bias.ndim != 0) {
    bias.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, weight.rows);
  }
  const auto mode = int8 ? matmul::Mode::kInt8 : matmul::Mode::kExact;
  const auto panels = attach_panels(codes_, scale_, zero_, num_threads, &weight);
  py::gil_scoped_release release;
  matmul::packed_linear(activations, weight, rows, bias.as<const float>(), mode, out.data,
                        num_threads);
}

void packed_linear_transpose(py::handle grad_, py::handle codes, py::handle scale, py::handle zero,
                             py::handle out_, int64_t in_features, int levels, int64_t group_size,
                             int group_dim, py::handle extras, int64_t first_row, int num_threads) {
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                    in_features, levels, group_size, group_dim, extras);
  const TensorView grad = view(grad_, "grad"), out = view(out_, "out");
  grad.require_ndim(2);
  out.require_dtype(grad.dtype).require_ndim(2);
  out.require_size(0, grad.shape[0]).require_size(1, in_features);
  const matmul::RowRange rows = row_range(first_row, grad.shape[1], weight.rows);
  const matmul::Activations g{grad.data, float_type(grad), grad.shape[0]};
  py::gil_scoped_release release;
  matmul::packed_linear_transpose(g, weight, rows, out.data, num_threads);
}

void dequantize(py::handle codes, py::handle scale, py::handle zero, py::handle out_,
                int64_t in_features, int levels, int64_t group_size, int group_dim,
                py::handle extras, int64_t first_row, int num_threads) {
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                    in_features, levels, group_size, group_dim, extras);
  const TensorView out = view(out_, "out");
  out.require_dtype(DType::kFloat32).require_ndim(2);
  out.require_size(1, in_features);
  const matmul::RowRange rows = row_range(first_row, out.shape[0], weight.rows);
  py::gil_scoped_release release;
  matmul::dequantize(weight, rows, out.as<float>(), num_threads);
}

void gather_rows(py::handle indices_, py::handle codes, py::handle scale, py::handle zero,
                 py::handle out_, int64_t in_features, int levels, int64_t group_size,
                 int group_dim, py::handle extras, int num_threads) {
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                    in_features, levels, group_size, group_dim, extras);
  const TensorView indices = view(indices_, "indices"), out = view(out_, "out");
  indices.require_dtype(DType::kInt64).require_ndim(1);
  out.require_dtype(DType::kFloat32).require_ndim(2);
  out.require_size(0, indices.shape[0]).require_size(1, in_features);
  py::gil_scoped_release release;
  matmul::gather_rows(weight, indices.as<const int64_t>(), indices.shape[0], out.as<float>(),
                      num_threads);
}

struct ComplexViews {
  TensorView real, imag, codes;
  matmul::ComplexProblem problem;

  ComplexViews(py::handle x_real, py::handle x_imag, py::handle codes_, int64_t in_features)
      : real(view(x_real, "x_real")), imag(view(x_imag, "x_imag")), codes(view(codes_, "codes")) {
    const int64_t row_bytes = checked_row_bytes(in_features, 4);
    real.require_dtype(DType::kInt8).require_ndim(2).require_size(1, in_features);
    imag.require_dtype(DType::kInt8).require_ndim(2).require_size(1, in_features);
    imag.require_size(0, real.shape[0]);
    codes.require_dtype(DType::kUInt8).require_ndim(2);
    codes.require_size(1, row_bytes);
    problem = {codes.as<const uint8_t>(), codes.shape[0],          in_features,
               real.as<const int8_t>(),   imag.as<const int8_t>(), real.shape[0]};
  }
};

void complex_sums(py::handle x_real, py::handle x_imag, py::handle codes, py::handle out_,
                  int64_t in_features, int num_threads) {
  const ComplexViews views(x_real, x_imag, codes, in_features);
  const TensorView out = view(out_, "out");
  out.require_dtype(DType::kInt32).require_ndim(3).require_size(0, 4);
  out.require_size(1, views.problem.count).require_size(2, views.problem.rows);
  py::gil_scoped_release release;
  matmul::complex_sums(views.problem, out.as<int32_t>(), num_threads);
}

void complex_linear(py::handle x_real, py::handle x_imag, py::handle codes, float scale_real,
                    float scale_imag, py::handle step_real, py::handle step_imag,
                    py::handle y_real_, py::handle y_imag_, int64_t in_features, int num_threads) {
  const ComplexViews views(x_real, x_imag, codes, in_features);
  const TensorView t = view(step_real, "step_real"), r = view(step_imag, "step_imag");
  const TensorView y_real = view(y_real_, "y_real"), y_imag = view(y_imag_, "y_imag");
  for (const TensorView* step : {&t, &r}) {
    step->require_dtype(DType::kFloat32).require_ndim(1).require_size(0, views.problem.count);
  }
  for (const TensorView* y : {&y_real, &y_imag}) {
    y->require_dtype(DType::kFloat32).require_ndim(2);
    y->require_size(0, views.problem.count).require_size(1, views.problem.rows);
  }
  const matmul::ComplexScales scales{scale_real, scale_imag, t.as<const float>(),
                                     r.as<const float>()};
  py::gil_scoped_release release;
  matmul::complex_linear(views.problem, scales, y_real.as<float>(), y_imag.as<float>(),
                         num_threads);
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
  out.packed.require_size(1, checked_row_bytes(out.cols, levels));
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
  m.def("packed_linear_transpose", &packed_linear_transpose);
  m.def("dequantize", &dequantize);
  m.def("gather_rows", &gather_rows);
  m.def("complex_sums", &complex_sums);
  m.def("complex_linear", &complex_linear);
  m.def("unpack_codes", &unpack_codes);
  m.def("pack_codes", &pack_codes);
}

}  // namespace pyrobust
