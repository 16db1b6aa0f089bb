// Boxes made of tensors, and tensors of boxes, in one call from Python each. As elsewhere in plain
// eager mode, what is not wholly plain and right gives None (bindings/plain_arguments.h), and
// pyrobust/interval/type.py serves it or words the refusal.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bindings/eager_box.h"
#include "bindings/eager_ends.h"
#include "bindings/families.h"
#include "bindings/fast_methods.h"
#include "bindings/interval_call.h"
#include "core/rounding.h"
#include "interval/elementwise.h"
#include "runtime/float_environment.h"

namespace pyrobust {
namespace {

// Ends of at most so many elements are looked at here; beyond, torch's threads are faster.
constexpr int64_t kMostElements = int64_t{1} << 15;

// Whether lower <= upper and both are finite.
template <typename T>
bool in_order(const T* lower, const T* upper, int64_t count) {
  constexpr T kMost = std::numeric_limits<T>::max();
  int32_t wrong = 0;  // without branches, so that the loop becomes vectors; a NaN is in no order
  for (int64_t i = 0; i < count; ++i) {
    wrong |= 1 ^ static_cast<int32_t>(lower[i] <= upper[i]);
    wrong |= static_cast<int32_t>(lower[i] < -kMost) | static_cast<int32_t>(upper[i] > kMost);
    wrong |= static_cast<int32_t>(lower[i] > kMost) | static_cast<int32_t>(upper[i] < -kMost);
  }
  return wrong == 0;
}

// Whether a lower end above zero or an upper one below is denormal.
template <typename T>
bool ends_in_denormals(const T* lower, const T* upper, int64_t count) {
  constexpr T kTiny = std::numeric_limits<T>::min();
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= static_cast<int32_t>(lower[i] > 0) & static_cast<int32_t>(lower[i] < kTiny);
    found |= static_cast<int32_t>(upper[i] < 0) & static_cast<int32_t>(upper[i] > -kTiny);
  }
  return found != 0;
}

// What `run(lower, upper, count)` says of two tensors that agree, of at most so many elements.
template <typename Run>
bool of_ends(PyObject* const* a, int64_t most, const Run& run) {
  for (int i : {0, 1}) {
    if (a[i] == Py_None) throw NotPlain();
    require_tensor(a[i], false);
    require_unnegated(a[i]);
  }
  const TensorView low = view(a[0], "lower"), high = view(a[1], "upper");
  if (low.dtype != high.dtype || low.ndim != high.ndim) throw NotPlain();
  for (int i = 0; i < low.ndim; ++i) {
    if (low.shape[i] != high.shape[i]) throw NotPlain();
  }
  const int64_t count = low.numel();
  if (count > most) throw NotPlain();
  if (low.dtype == DType::kFloat32) return run(low.as<float>(), high.as<float>(), count);
  if (low.dtype != DType::kFloat64) throw NotPlain();
  return run(low.as<double>(), high.as<double>(), count);
}

// lower, upper -> True, or False where it is not so
py::object box_is_finite(PyObject* const* a) {
  return py::bool_(
      of_ends(a, kMostElements, [](const auto* lower, const auto* upper, int64_t count) {
        return in_order(lower, upper, count);
      }));
}

// lower, upper -> whether flushing may take zero from the box
py::object box_ends_in_denormals(PyObject* const* a) {
  const DefaultFloatEnvironment environment;  // the caller's may read denormals as zeros
  // of any number: torch operations in its place would pass over memory several times
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  return py::bool_(of_ends(a, kAny, [](const auto* lower, const auto* upper, int64_t count) {
    return ends_in_denormals(lower, upper, count);
  }));
}

Promise promise_of(py::handle rounding) {
  if (!PyUnicode_CheckExact(rounding.ptr())) throw NotPlain();
  return parse_rounding(py::str(rounding));
}

// box, lower, upper, rounding -> True once the box holds these ends, as Interval.__init__ has it
py::object hold_ends(PyObject* const* a) {
  const bool deployed = promise_of(a[3]).rounding == interval::Rounding::kDeployed;
  const DefaultFloatEnvironment environment;
  const bool right = of_ends(a + 1, kMostElements,
                             [deployed](const auto* lower, const auto* upper, int64_t count) {
                               return in_order(lower, upper, count) &&
                                      !(deployed && ends_in_denormals(lower, upper, count));
                             });
  if (!right) return py::none();
  const BoxNames& names = box_names();
  fill_box(a[0], a[1], a[2], a[3], false, Py_False);
  set_attribute(a[0], names.deferred, py::none());
  set_attribute(a[0], names.source, py::none());
  return py::bool_(true);
}

// A Python float or a small integer.
double number(py::handle object) {
  if (PyFloat_CheckExact(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
  constexpr int64_t kMost = int64_t{1} << 53;
  const int64_t value = integer(object);
  if (value > kMost || value < -kMost) throw NotPlain();
  return static_cast<double>(value);
}

// The lowest and the highest value of the data, rounded outward.
struct Range {
  float first = -rounding::infinity(), last = rounding::infinity();

  explicit Range(py::handle clamp) {
    if (clamp.is_none()) return;
    if (!PyTuple_CheckExact(clamp.ptr()) || PyTuple_GET_SIZE(clamp.ptr()) != 2) throw NotPlain();
    const double least = number(PyTuple_GET_ITEM(clamp.ptr(), 0));
    const double most = number(PyTuple_GET_ITEM(clamp.ptr(), 1));
    if (!(least <= most)) throw NotPlain();
    first = rounding::to_float_down(least);
    last = rounding::to_float_up(most);
  }
};

bool flushes_denormals() {
  volatile float tiny = std::numeric_limits<float>::min();
  return tiny * 0.5f == 0.0f;
}

// x, eps, clamp, rounding, num_threads, grad_enabled -> Interval.ball
constexpr Py_ssize_t kBallCount = 6;

py::object ball(PyObject* const* a) {
  if (a[0] == Py_None || flushes_denormals()) return py::none();
  require_tensor(a[0], a[5] == Py_True);
  require_unnegated(a[0]);
  const TensorView x = view(a[0], "x");
  const double radius = number(a[1]);
  const bool plain = x.dtype == DType::kFloat32 && x.ndim > 0 && radius >= 0.0;
  if (!plain || !std::isfinite(radius)) return py::none();
  const Range range(a[2]);
  const Promise promise = promise_of(a[3]);
  const Result ends(a[0], x);
  const interval::Ball work{x.as<const float>(), x.numel(),        radius,   range.first,
                            range.last,          promise.rounding, ends.low, ends.high};
  const int threads = static_cast<int>(integer(a[4]));
  bool right;
  if (work.count < kMostElements) {
    right = interval::ball_ends(work, threads);
  } else {
    const py::gil_scoped_release release;
    right = interval::ball_ends(work, threads);
  }
  if (!right) return py::none();
  return new_box(ends.first, ends.second, a[3], false, Py_False);
}

// memory, shape -> lower, upper
py::object tensors_of_kept(PyObject* const* a) { return tensors_of(a[0], a[1]); }

}  // namespace

py::object tensors_of(py::handle memory, py::handle shape) {
  static PyObject* const like = [] {
    return py::object(py::module_::import("torch").attr("empty")(0)).release().ptr();  // float32
  }();
  const Box box(memory, shape);
  const auto bytes = static_cast<size_t>(box.numel()) * sizeof(float);
  py::object lower = new_output(like, box.shape, box.ndim);
  py::object upper = new_output(like, box.shape, box.ndim);
  std::memcpy(view(lower, "lower").data, box.low, bytes);
  std::memcpy(view(upper, "upper").data, box.high, bytes);
  return py::make_tuple(std::move(lower), std::move(upper));
}

void bind_eager_boxes(py::module_& m) {
  static PyMethodDef methods[] = {
      method("box_is_finite", &entry<&box_is_finite, 2>),
      method("box_ends_in_denormals", &entry<&box_ends_in_denormals, 2>),
      method("hold_ends", &entry<&hold_ends, 4>),
      method("ball", &entry<&ball, kBallCount>),
      method("tensors_of_kept", &entry<&tensors_of_kept, 2>),
  };
  add_methods(m, methods);
}

}  // namespace pyrobust
