// Python entry points of the relaxation kernels.
#include "relaxation/relaxation.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/families.h"
#include "bindings/tensor_view.h"

namespace pyrobust {
namespace {

// A dense float32 tensor of the given shape; null where the argument is None.
float* numbers(py::handle tensor, const char* name, const std::vector<int64_t>& shape) {
  const TensorView seen = view_optional(tensor, name);
  if (seen.ndim == 0) return nullptr;
  seen.require_dtype(DType::kFloat32).require_ndim(static_cast<int>(shape.size()));
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    seen.require_size(static_cast<int>(axis), shape[axis]);
  }
  return seen.as<float>();
}

relaxation::Bend bend_of(py::handle a_, const std::array<py::object, 4>& lines, py::handle bias) {
  const TensorView a = view(a_, "a");
  a.require_dtype(DType::kFloat32).require_ndim(3);
  const int64_t images = a.shape[1], size = a.shape[2];
  const float* ends[4];
  for (int i = 0; i < 4; ++i) {
    view(lines[i], "lines").require_ndim(2);
    ends[i] = numbers(lines[i], "lines", {images, size});
  }
  return {a.as<float>(), ends[0], ends[1], ends[2], ends[3], numbers(bias, "bias", {size}),
          a.shape[0],    images,  size};
}

void bend(py::handle a, const std::array<py::object, 4>& lines, py::handle bias, py::handle pulled_,
          py::handle value_, int num_threads) {
  const relaxation::Bend work = bend_of(a, lines, bias);
  view(pulled_, "pulled").require_ndim(3);
  float* pulled = numbers(pulled_, "pulled", {work.rows, work.images, work.size});
  float* value = numbers(value_, "value", {work.rows, work.images});
  const py::gil_scoped_release release;
  relaxation::bend(work, pulled, value, num_threads);
}

void unbend(py::handle a, const std::array<py::object, 4>& lines, py::handle bias,
            py::handle by_pulled, py::handle by_value, py::handle by_a,
            const std::array<py::object, 4>& by_lines, py::handle by_bias, int num_threads) {
  const relaxation::Bend work = bend_of(a, lines, bias);
  const std::vector<int64_t> whole = {work.rows, work.images, work.size};
  const std::vector<int64_t> image = {work.images, work.size};
  view(by_pulled, "by_pulled").require_ndim(3);
  view(by_value, "by_value").require_ndim(2);
  const relaxation::Gradients gradients{numbers(by_pulled, "by_pulled", whole),
                                        numbers(by_value, "by_value", {work.rows, work.images}),
                                        numbers(by_a, "by_a", whole),
                                        numbers(by_lines[0], "by_lines", image),
                                        numbers(by_lines[1], "by_lines", image),
                                        numbers(by_lines[2], "by_lines", image),
                                        numbers(by_lines[3], "by_lines", image),
                                        numbers(by_bias, "by_bias", image)};
  const py::gil_scoped_release release;
  relaxation::unbend(work, gradients, num_threads);
}

}  // namespace

void bind_relaxation(py::module_& m) {
  m.def("relaxation_bend", &bend);
  m.def("relaxation_unbend", &unbend);
}

}  // namespace pyrobust
