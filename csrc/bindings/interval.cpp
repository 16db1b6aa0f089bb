// Python entry points of the interval kernels.
#include "interval/interval.h"

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
  if (!bias.is_none()) b.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, rows);
  const interval::LinearCall call{low.as<float>(),
                                  high.as<float>(),
                                  w.as<float>(),
                                  b.as<float>(),
                                  batch,
                                  terms,
                                  rows,
                                  parse_rounding(rounding),
                                  out_low.as<float>(),
                                  out_high.as<float>()};
  const py::gil_scoped_release release;
  interval::interval_linear(call, num_threads);
}

}  // namespace

void bind_interval(py::module_& m) {
  m.def("interval_linear", &interval_linear, py::arg("lower"), py::arg("upper"), py::arg("weight"),
        py::arg("bias"), py::arg("rounding"), py::arg("out_lower"), py::arg("out_upper"),
        py::arg("num_threads"));
}

}  // namespace pyrobust
