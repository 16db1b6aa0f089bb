// Python entry points of the transformer kernels.
#include "transformer/transformer.h"

#include "bindings/families.h"
#include "bindings/interval_call.h"
#include "bindings/tensor_view.h"
#include "runtime/check.h"

namespace pyrobust {
namespace {

// Of a dense float32 tensor with `count` elements.
float* numbers(py::handle tensor, const char* name, int64_t count) {
  const TensorView seen = view(tensor, name);
  seen.require_dtype(DType::kFloat32);
  check(seen.numel() == count, name, " must have ", count, " elements; got ", seen.numel(), ".");
  return seen.as<float>();
}

// Rows of `count` numbers, 1 for None.
int64_t rows_of(py::handle tensor, const char* name, int64_t count) {
  return tensor.is_none() ? 1 : view(tensor, name).numel() / count;
}

bool deployed(const std::string& rounding) {
  return parse_rounding(rounding).rounding == interval::Rounding::kDeployed;
}

bool row_norm(py::handle lower, py::handle upper, py::handle weight, py::handle bias, int64_t count,
              double eps, bool centred, const std::string& rounding, py::handle out_lower,
              py::handle out_upper, int num_threads) {
  const int64_t elements = view(lower, "lower").numel();
  check(count >= 1 && elements % count == 0, "rows must divide lower; got ", count, " and ",
        elements, " elements.");
  const int64_t lines =
      weight.is_none() ? rows_of(bias, "bias", count) : rows_of(weight, "weight", count);
  check(lines >= 1, "weight and bias must have rows of ", count, " elements.");
  const auto optional = [&](py::handle tensor, const char* name) {
    return tensor.is_none() ? nullptr : numbers(tensor, name, lines * count);
  };
  const transformer::RowNorm work{numbers(lower, "lower", elements),
                                  numbers(upper, "upper", elements),
                                  elements / count,
                                  count,
                                  optional(weight, "weight"),
                                  optional(bias, "bias"),
                                  lines,
                                  eps,
                                  centred,
                                  deployed(rounding),
                                  numbers(out_lower, "out_lower", elements),
                                  numbers(out_upper, "out_upper", elements)};
  const py::gil_scoped_release release;
  return transformer::row_norm(work, num_threads);
}

// (batch, rows, terms) times (batch, terms, columns), or (batch, columns, terms) where
// `transposed`.
bool product(py::handle low_a, py::handle high_a, py::handle low_b, py::handle high_b,
             bool transposed, double gain, py::handle out_lower, py::handle out_upper,
             int num_threads) {
  const TensorView a = view(low_a, "low_a"), b = view(low_b, "low_b");
  a.require_dtype(DType::kFloat32).require_ndim(3);
  b.require_dtype(DType::kFloat32).require_ndim(3).require_size(0, a.shape[0]);
  b.require_size(transposed ? 2 : 1, a.shape[2]);
  const int64_t batch = a.shape[0], rows = a.shape[1], terms = a.shape[2];
  const int64_t columns = b.shape[transposed ? 1 : 2], elements = batch * rows * columns;
  const transformer::BoxProduct work{
      {a.as<float>(), numbers(high_a, "high_a", a.numel()), false},
      {b.as<float>(), numbers(high_b, "high_b", b.numel()), transposed},
      batch,
      rows,
      terms,
      columns,
      gain,
      numbers(out_lower, "out_lower", elements),
      numbers(out_upper, "out_upper", elements)};
  const py::gil_scoped_release release;
  return transformer::box_product(work, num_threads);
}

bool softmax(py::handle lower, py::handle upper, int64_t count, const std::string& rounding,
             py::handle out_lower, py::handle out_upper, int num_threads) {
  const int64_t elements = view(lower, "lower").numel();
  check(count >= 1 && elements % count == 0, "rows must divide lower; got ", count, " and ",
        elements, " elements.");
  const transformer::RowSoftmax work{numbers(lower, "lower", elements),
                                     numbers(upper, "upper", elements),
                                     elements / count,
                                     count,
                                     deployed(rounding),
                                     numbers(out_lower, "out_lower", elements),
                                     numbers(out_upper, "out_upper", elements)};
  const py::gil_scoped_release release;
  return transformer::row_softmax(work, num_threads);
}

// Constants between `first` and `last`: float64, one or as many as a row has; `bent`: of what is
// below zero.
bool scale(py::handle lower, py::handle upper, py::handle first_, py::handle last_, bool bent,
           const std::string& rounding, py::handle out_lower, py::handle out_upper,
           int num_threads) {
  const int64_t elements = view(lower, "lower").numel();
  const TensorView first = view(first_, "first"), last = view(last_, "last");
  first.require_dtype(DType::kFloat64);
  last.require_dtype(DType::kFloat64);
  const int64_t constants = first.numel();
  check(constants >= 1 && last.numel() == constants && elements % constants == 0,
        "rows must divide lower; got ", constants, " and ", elements, " elements.");
  const transformer::BoxScale work{numbers(lower, "lower", elements),
                                   numbers(upper, "upper", elements),
                                   elements / constants,
                                   constants,
                                   first.as<double>(),
                                   last.as<double>(),
                                   constants == 1,
                                   bent,
                                   deployed(rounding),
                                   numbers(out_lower, "out_lower", elements),
                                   numbers(out_upper, "out_upper", elements)};
  const py::gil_scoped_release release;
  return transformer::box_scale(work, num_threads);
}

}  // namespace

void bind_transformer(py::module_& m) {
  m.def("box_row_norm", &row_norm);
  m.def("box_product", &product);
  m.def("box_softmax", &softmax);
  m.def("box_scale", &scale);
}

}  // namespace pyrobust
