// The interval products of plain eager inference, one call from Python a layer: arguments are read,
// checked and both ends allocated here. Anything that is not wholly plain gives None
// (bindings/plain_arguments.h), and pyrobust/ops/interval.py serves it.
#include <pybind11/pybind11.h>

#include <atomic>
#include <cmath>

#include "bindings/families.h"
#include "bindings/interval_call.h"
#include "bindings/plain_arguments.h"
#include "interval/interval.h"

namespace pyrobust {
namespace {

struct Box {
  py::handle lower, upper;
  TensorView low, high;

  Box(py::handle lower, py::handle upper, int64_t terms) : lower(lower), upper(upper) {
    low = view(lower, "lower");
    high = view(upper, "upper");
    const bool alike = low.dtype == DType::kFloat32 && high.dtype == DType::kFloat32 &&
                       low.ndim > 0 && low.ndim == high.ndim;
    if (!alike || low.shape[low.ndim - 1] != terms) throw NotPlain();
    for (int i = 0; i < low.ndim; ++i) {
      if (low.shape[i] != high.shape[i]) throw NotPlain();
    }
  }

  int64_t batch() const {
    int64_t count = 1;
    for (int i = 0; i + 1 < low.ndim; ++i) count *= low.shape[i];
    return count;
  }
};

const float* float_bias(py::handle bias, int64_t rows) {
  if (bias.is_none()) return nullptr;
  const TensorView values = view(bias, "bias");
  values.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, rows);
  return values.as<const float>();
}

bool truth(py::handle object) {
  if (object.ptr() != Py_True && object.ptr() != Py_False) throw NotPlain();
  return object.ptr() == Py_True;
}

struct Options {
  py::handle rounding, rectified, num_threads;
};

// (lower, upper, whether all ends are finite)
py::object image(const Box& box, const interval::Weight& weight, py::handle bias, bool int8,
                 const Options& options) {
  if (!PyUnicode_CheckExact(options.rounding.ptr())) throw NotPlain();
  const Promise promise = parse_rounding(py::str(options.rounding));
  if (promise.operand_error > 0.0f) throw NotPlain();  // weights must be looked at first
  int64_t sizes[TensorView::kMaxDims];
  for (int i = 0; i < box.low.ndim; ++i) sizes[i] = box.low.shape[i];
  sizes[box.low.ndim - 1] = weight.rows;
  py::object lower = new_output(box.lower, sizes, box.low.ndim);
  py::object upper = new_output(box.lower, sizes, box.low.ndim);
  std::atomic<bool> unbounded{false};
  const interval::Call call{box.low.as<float>(),
                            box.high.as<float>(),
                            weight,
                            float_bias(bias, weight.rows),
                            promise.rounding,
                            int8,
                            promise.operand_error,
                            truth(options.rectified),
                            coarse_radius_allowed(),
                            view(lower, "lower").as<float>(),
                            view(upper, "upper").as<float>(),
                            &unbounded};
  const int threads = static_cast<int>(integer(options.num_threads));
  const int64_t batch = box.batch();
  if (batch * weight.rows < kLeastReleasedWork / (weight.terms + 1)) {
    interval::interval_linear(call, batch, threads);
  } else {
    const py::gil_scoped_release release;
    interval::interval_linear(call, batch, threads);
  }
  return py::make_tuple(std::move(lower), std::move(upper), py::bool_(!unbounded));
}

// lower, upper, weight, bias, rounding, rectified, num_threads, grad_enabled
constexpr Py_ssize_t kDenseCount = 8;

py::object dense_image(PyObject* const* a) {
  const bool grad_enabled = a[7] == Py_True;
  for (int i = 0; i < 4; ++i) require_tensor(a[i], grad_enabled);
  for (int i = 0; i < 3; ++i) {
    if (a[i] == Py_None) throw NotPlain();
    require_unnegated(a[i]);
  }
  const TensorView weight = view(a[2], "weight");
  weight.require_dtype(DType::kFloat32).require_ndim(2);
  if (a[3] != Py_None) require_unnegated(a[3]);
  const Box box(a[0], a[1], weight.shape[1]);
  return image(box, {weight.as<float>(), nullptr, weight.shape[0], weight.shape[1]}, a[3], false,
               {a[4], a[5], a[6]});
}

// lower, upper, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations,
// extras, rounding, rectified, num_threads, grad_enabled
constexpr Py_ssize_t kPackedCount = 16;

py::object packed_image(PyObject* const* a) {
  const bool grad_enabled = a[15] == Py_True;
  for (int i = 0; i < 6; ++i) require_tensor(a[i], grad_enabled);
  require_tensors(a[11], grad_enabled);
  for (int i : {0, 1}) require_unnegated(a[i]);
  if (a[5] != Py_None) require_unnegated(a[5]);
  const int64_t columns = integer(a[6]);
  const matmul::PackedMatrix weight =
      packed_matrix(view(a[2], "codes"), view(a[3], "scale"), view_optional(a[4], "zero"), columns,
                    levels_of(a[7]), integer(a[8]), static_cast<int>(integer(a[9])), a[11]);
  const bool int8 = mode_of(a[10]) == matmul::Mode::kInt8;
  return image(Box(a[0], a[1], columns), {nullptr, &weight, weight.rows, weight.cols}, a[5], int8,
               {a[12], a[13], a[14]});
}

// Whether lower <= upper and both are finite, for at most so many elements; beyond, torch's
// threads are faster.
constexpr int64_t kMostElements = int64_t{1} << 15;

template <typename T>
bool in_order(const T* lower, const T* upper, int64_t count) {
  bool ordered = true;
  T sum = 0;  // of zeros; NaN where an end is not finite
  for (int64_t i = 0; i < count; ++i) {
    ordered &= lower[i] <= upper[i];
    sum += (lower[i] - lower[i]) + (upper[i] - upper[i]);
  }
  return ordered && sum == 0;
}

// lower, upper -> True, or False where it is not so or cannot be told
py::object box_is_finite(PyObject* const* a) {
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
  if (count > kMostElements) throw NotPlain();
  if (low.dtype == DType::kFloat32) {
    return py::bool_(in_order(low.as<float>(), high.as<float>(), count));
  }
  if (low.dtype != DType::kFloat64) throw NotPlain();
  return py::bool_(in_order(low.as<double>(), high.as<double>(), count));
}

template <py::object (*kFunction)(PyObject* const*), Py_ssize_t kCount>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "takes %zd arguments; got %zd.", kCount, count);
    return nullptr;
  }
  return plain_or_none([&] { return kFunction(values); });
}

using Entry = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Entry function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

}  // namespace

void bind_eager_interval(py::module_& m) {
  static PyMethodDef methods[] = {
      method("eager_interval_linear", &entry<&dense_image, kDenseCount>),
      method("eager_interval_packed", &entry<&packed_image, kPackedCount>),
      method("box_is_finite", &entry<&box_is_finite, 2>),
  };
  for (PyMethodDef& definition : methods) {
    m.attr(definition.ml_name) =
        py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
  }
}

}  // namespace pyrobust
