// The packed product of plain eager inference as one call from Python: everything is read, checked
// and allocated here. What is not wholly plain and right gives None, and the general way
// (pyrobust/ops/matmul.py) serves it or words the refusal.
//
// A function of CPython itself: pybind11's matching of twelve arguments took 0.4 us of a call of 4.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/families.h"
#include "bindings/panel_cache.h"
#include "bindings/plain_arguments.h"
#include "core/float_types.h"
#include "matmul/matmul.h"
#include "runtime/scratch.h"

namespace pyrobust {
namespace {

struct Arguments {
  py::handle x, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations;
  py::handle extras, num_threads, grad_enabled;
};
constexpr Py_ssize_t kArgumentCount = 13;

// The bias as floats: its own memory, or a converted copy in scratch.
const float* float_bias(py::handle bias, int64_t rows) {
  if (bias.is_none()) return nullptr;
  const TensorView view_of = view(bias, "bias");
  view_of.require_ndim(1).require_size(0, rows);
  const FloatType type = float_type(view_of);
  if (type == FloatType::kFloat32) return view_of.as<const float>();
  const auto bytes = rows * static_cast<int64_t>(sizeof(float));
  auto* floats = static_cast<float*>(thread_scratch(ScratchSlot::kBias, bytes));
  for (int64_t n = 0; n < rows; ++n) floats[n] = load_float(view_of.data, n, type);
  return floats;
}

py::object product(const Arguments& a) {
  const bool grad_enabled = a.grad_enabled.ptr() == Py_True;
  for (py::handle tensor : {a.x, a.codes, a.scale, a.zero, a.bias}) {
    require_tensor(tensor, grad_enabled);
  }
  require_tensors(a.extras, grad_enabled);
  require_unnegated(a.x);
  const TensorView x = view(a.x, "x");
  const int64_t cols = integer(a.in_features);
  if (x.ndim == 0 || x.shape[x.ndim - 1] != cols) throw NotPlain();
  matmul::PackedMatrix weight = packed_matrix(
      view(a.codes, "codes"), view(a.scale, "scale"), view_optional(a.zero, "zero"), cols,
      levels_of(a.bits), integer(a.group_size), static_cast<int>(integer(a.group_dim)), a.extras);
  const float* bias = float_bias(a.bias, weight.rows);
  const matmul::Mode mode = mode_of(a.activations);
  const int threads = static_cast<int>(integer(a.num_threads));
  matmul::Activations activations{x.data, float_type(x), 1};
  for (int i = 0; i + 1 < x.ndim; ++i) activations.rows *= x.shape[i];
  int64_t sizes[TensorView::kMaxDims];
  std::copy_n(x.shape, x.ndim, sizes);
  sizes[x.ndim - 1] = weight.rows;
  py::object out = new_output(a.x, sizes, x.ndim);
  void* const results = view(out, "out").data;
  const auto panels = attach_panels(a.codes, a.scale, a.zero, threads, &weight);
  const auto run = [&] {
    matmul::packed_linear(activations, weight, {0, weight.rows}, bias, mode, results, threads);
  };
  if (activations.rows * weight.rows < kLeastReleasedWork / (cols + 1)) {
    run();
  } else {
    const py::gil_scoped_release release;
    run();
  }
  return out;
}

PyObject* eager_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != kArgumentCount) {
    PyErr_Format(PyExc_TypeError, "eager_linear takes %zd arguments; got %zd.", kArgumentCount,
                 count);
    return nullptr;
  }
  return plain_or_none([&] {
    return product({values[0], values[1], values[2], values[3], values[4], values[5], values[6],
                    values[7], values[8], values[9], values[10], values[11], values[12]});
  });
}

}  // namespace

void bind_eager_linear(py::module_& m) {
  static PyMethodDef definition = {
      "eager_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_linear)),
      METH_FASTCALL, nullptr};
  m.attr("eager_linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace pyrobust
