// The interval products of plain eager inference, one call from Python a layer: arguments are read,
// checked and both ends allocated here. Anything that is not wholly plain gives None
// (bindings/plain_arguments.h), and pyrobust/ops/interval.py serves it.
#include <pybind11/pybind11.h>

#include <atomic>

#include "bindings/eager_box.h"
#include "bindings/eager_ends.h"
#include "bindings/families.h"
#include "bindings/fast_methods.h"
#include "bindings/interval_call.h"
#include "bindings/panel_cache.h"
#include "bindings/plain_arguments.h"
#include "interval/interval.h"

namespace pyrobust {
namespace {

struct Options {
  py::handle rounding, rectified, num_threads, keeps;
};

// (lower, upper, whether all ends are finite), or kept ends in place of the first two
py::object image(const Box& box, const interval::Weight& weight, py::handle bias, bool int8,
                 const Options& options) {
  if (!PyUnicode_CheckExact(options.rounding.ptr())) throw NotPlain();
  const Promise promise = parse_rounding(py::str(options.rounding));
  if (promise.operand_error > 0.0f) throw NotPlain();  // weights must be looked at first
  Result result(box, weight.rows, truth(options.keeps));
  std::atomic<bool> unbounded{false};
  const interval::Call call{box.low,
                            box.high,
                            weight,
                            float_bias(bias, weight.rows),
                            promise.rounding,
                            int8,
                            promise.operand_error,
                            truth(options.rectified),
                            coarse_radius_allowed(),
                            result.low,
                            result.high,
                            &unbounded};
  const int threads = static_cast<int>(integer(options.num_threads));
  const int64_t batch = box.batch();
  if (batch * weight.rows < kLeastReleasedWork / (weight.terms + 1)) {
    interval::interval_linear(call, batch, threads);
  } else {
    const py::gil_scoped_release release;
    interval::interval_linear(call, batch, threads);
  }
  return py::make_tuple(std::move(result.first), std::move(result.second), py::bool_(!unbounded));
}

// lower, upper, weight, bias, rounding, rectified, num_threads, grad_enabled, keeps
constexpr Py_ssize_t kDenseCount = 9;

py::object dense_image(PyObject* const* a) {
  const bool grad_enabled = a[7] == Py_True;
  require_ends(a[0], a[1], grad_enabled);
  if (a[2] == Py_None) throw NotPlain();
  for (int i : {2, 3}) require_tensor(a[i], grad_enabled);
  require_unnegated(a[2]);
  const TensorView weight = view(a[2], "weight");
  weight.require_dtype(DType::kFloat32).require_ndim(2);
  if (a[3] != Py_None) require_unnegated(a[3]);
  const Box box(a[0], a[1]);
  box.require_terms(weight.shape[1]);
  return image(box, {weight.as<float>(), nullptr, weight.shape[0], weight.shape[1]}, a[3], false,
               {a[4], a[5], a[6], a[8]});
}

// lower, upper, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations,
// extras, rounding, rectified, num_threads, grad_enabled, keeps
constexpr Py_ssize_t kPackedCount = 17;

py::object packed_image(PyObject* const* a) {
  const bool grad_enabled = a[15] == Py_True;
  require_ends(a[0], a[1], grad_enabled);
  for (int i = 2; i < 6; ++i) require_tensor(a[i], grad_enabled);
  require_tensors(a[11], grad_enabled);
  if (a[5] != Py_None) require_unnegated(a[5]);
  const int64_t columns = integer(a[6]);
  matmul::PackedMatrix weight =
      packed_matrix(view(a[2], "codes"), view(a[3], "scale"), view_optional(a[4], "zero"), columns,
                    levels_of(a[7]), integer(a[8]), static_cast<int>(integer(a[9])), a[11]);
  const bool int8 = mode_of(a[10]) == matmul::Mode::kInt8;
  const Box box(a[0], a[1]);
  box.require_terms(columns);
  std::shared_ptr<const PanelMemory> panels;  // for the sums of few inputs
  if (!int8 && box.batch() <= interval::kFewInputs) {
    panels = attach_panels(a[2], a[3], a[4], static_cast<int>(integer(a[14])), &weight,
                           kElementsOfBounds);
  }
  return image(box, {nullptr, &weight, weight.rows, weight.cols}, a[5], int8,
               {a[12], a[13], a[14], a[16]});
}

// --- Interval in, Interval out
// ------------------------------------------------------------------------------------------------

// The box of an image; one with infinite ends is made, and refused with its place, elsewhere.
py::object box_of(const py::object& done, const Held& input) {
  if (PyTuple_GET_ITEM(done.ptr(), 2) != Py_True) throw NotPlain();
  return new_box(PyTuple_GET_ITEM(done.ptr(), 0), PyTuple_GET_ITEM(done.ptr(), 1), input.rounding,
                 false, Py_False);
}

// box, weight, bias, num_threads, grad_enabled
constexpr Py_ssize_t kBoxLinearCount = 5;

py::object box_linear(PyObject* const* a) {
  const Held box(a[0], a[4]);
  PyObject* const arguments[kDenseCount] = {box.first.ptr(),
                                            box.second.ptr(),
                                            a[1],
                                            a[2],
                                            box.rounding.ptr(),
                                            box.rectified.ptr(),
                                            a[3],
                                            a[4],
                                            Py_True};
  return box_of(dense_image(arguments), box);
}

// box, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations, extras,
// num_threads, grad_enabled
constexpr Py_ssize_t kBoxPackedCount = 13;

py::object box_packed_linear(PyObject* const* a) {
  const Held box(a[0], a[12]);
  PyObject* const arguments[kPackedCount] = {box.first.ptr(),
                                             box.second.ptr(),
                                             a[1],
                                             a[2],
                                             a[3],
                                             a[4],
                                             a[5],
                                             a[6],
                                             a[7],
                                             a[8],
                                             a[9],
                                             a[10],
                                             box.rounding.ptr(),
                                             box.rectified.ptr(),
                                             a[11],
                                             a[12],
                                             Py_True};
  return box_of(packed_image(arguments), box);
}

// box, grad_enabled -> the box of kept ends whose ReLU is still to come
py::object box_relu(PyObject* const* a) {
  const BoxNames& names = box_names();
  const bool known = reinterpret_cast<PyObject*>(Py_TYPE(a[0])) == names.type;
  if (!known || attribute(a[0], names.kept).is_none()) return py::none();  // sooner than a throw
  const Held box(a[0], a[1]);
  return new_box(box.first, box.second, box.rounding, true, a[1]);
}

}  // namespace

void bind_eager_interval(py::module_& m) {
  static PyMethodDef methods[] = {
      method("eager_interval_linear", &entry<&dense_image, kDenseCount>),
      method("eager_interval_packed", &entry<&packed_image, kPackedCount>),
      method("box_linear", &entry<&box_linear, kBoxLinearCount>),
      method("box_packed_linear", &entry<&box_packed_linear, kBoxPackedCount>),
      method("box_relu", &entry<&box_relu, 2>),
  };
  add_methods(m, methods);
  m.def("set_box_type", [](py::object type) { box_names().type = type.release().ptr(); });
}

}  // namespace pyrobust
