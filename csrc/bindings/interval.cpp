// Python entry points of the interval kernels.
#include "interval/interval.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "runtime/check.h"

namespace pyrobust {
namespace {

interval::Rounding parse_rounding(const std::string& name) {
  if (name == "nearest") return interval::Rounding::kNearest;
  if (name == "real") return interval::Rounding::kReal;
  if (name == "deployed") return interval::Rounding::kDeployed;
  fail("interval: rounding must be one of real, deployed, nearest; got '", name, "'.");
}

const TensorView& matrix(const TensorView& tensor, int64_t rows, int64_t columns) {
  return tensor.require_dtype(DType::kFloat32)
      .require_ndim(2)
      .require_size(0, rows)
      .require_size(1, columns);
}

const float* bias_of(const TensorView& bias, int64_t rows) {
  if (bias.ndim == 0) return nullptr;
  return bias.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, rows).as<float>();
}

void interval_linear(py::handle lower, py::handle upper, py::handle weight, py::handle bias,
                     const std::string& rounding, py::handle out_lower, py::handle out_upper,
                     int num_threads) {
  const TensorView low = view(lower, "lower"), high = view(upper, "upper"),
                   w = view(weight, "weight"), b = view_optional(bias, "bias"),
                   out_low = view(out_lower, "out_lower"), out_high = view(out_upper, "out_upper");
  low.require_dtype(DType::kFloat32).require_ndim(2);
  w.require_dtype(DType::kFloat32).require_ndim(2);
  const int64_t batch = low.shape[0], terms = w.shape[1], rows = w.shape[0];
  matrix(low, batch, terms);
  matrix(high, batch, terms);
  matrix(out_low, batch, rows);
  matrix(out_high, batch, rows);
  const interval::Call call{
      low.as<float>(),          high.as<float>(),    {w.as<float>(), rows, terms}, bias_of(b, rows),
      parse_rounding(rounding), out_low.as<float>(), out_high.as<float>()};
  const py::gil_scoped_release release;
  interval::interval_linear(call, batch, num_threads);
}

const TensorView& images(const TensorView& tensor, const std::array<int64_t, 4>& shape) {
  tensor.require_dtype(DType::kFloat32).require_ndim(4);
  for (int axis = 0; axis < 4; ++axis) tensor.require_size(axis, shape[axis]);
  return tensor;
}

using Pair = std::array<int64_t, 2>;

void interval_conv2d(py::handle lower, py::handle upper, py::handle weight, py::handle bias,
                     Pair stride, Pair pad, Pair dilation, int64_t groups,
                     const std::string& rounding, py::handle out_lower, py::handle out_upper,
                     int num_threads) {
  const TensorView low = view(lower, "lower"), high = view(upper, "upper"),
                   w = view(weight, "weight"), b = view_optional(bias, "bias"),
                   out_low = view(out_lower, "out_lower"), out_high = view(out_upper, "out_upper");
  low.require_dtype(DType::kFloat32).require_ndim(4);
  w.require_dtype(DType::kFloat32).require_ndim(4);
  out_low.require_dtype(DType::kFloat32).require_ndim(4);
  const interval::Images size{low.shape[0], low.shape[1], low.shape[2], low.shape[3]};
  const int64_t rows = w.shape[0];
  const interval::Window window{w.shape[2], w.shape[3],       stride[0],       stride[1],
                                pad[0],     pad[1],           dilation[0],     dilation[1],
                                groups,     out_low.shape[2], out_low.shape[3]};
  images(high, {size.batch, size.channels, size.height, size.width});
  images(out_low, {size.batch, rows, window.out_height, window.out_width});
  images(out_high, {size.batch, rows, window.out_height, window.out_width});
  const interval::Call call{low.as<float>(),
                            high.as<float>(),
                            {w.as<float>(), rows, w.shape[1] * w.shape[2] * w.shape[3]},
                            bias_of(b, rows),
                            parse_rounding(rounding),
                            out_low.as<float>(),
                            out_high.as<float>()};
  const py::gil_scoped_release release;
  interval::interval_conv2d(call, size, window, num_threads);
}

}  // namespace

void bind_interval(py::module_& m) {
  m.def("interval_linear", &interval_linear, py::arg("lower"), py::arg("upper"), py::arg("weight"),
        py::arg("bias"), py::arg("rounding"), py::arg("out_lower"), py::arg("out_upper"),
        py::arg("num_threads"));
  m.def("interval_conv2d", &interval_conv2d, py::arg("lower"), py::arg("upper"), py::arg("weight"),
        py::arg("bias"), py::arg("stride"), py::arg("pad"), py::arg("dilation"), py::arg("groups"),
        py::arg("rounding"), py::arg("out_lower"), py::arg("out_upper"), py::arg("num_threads"));
}

}  // namespace pyrobust
