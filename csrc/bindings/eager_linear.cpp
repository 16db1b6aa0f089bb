// The packed product of plain eager inference as one call from Python: everything is read, checked
// and allocated here. What is not wholly plain and right gives None, and the general way
// (pyrobust/ops/matmul.py) serves it or words the refusal.
//
// A function of CPython itself: pybind11's matching of twelve arguments took 0.4 us of a call of 4.
#include <pybind11/pybind11.h>

#include "bindings/families.h"
#include "bindings/packed_matrix.h"
#include "bindings/tensor_view.h"
#include "core/float_types.h"
#include "matmul/matmul.h"
#include "runtime/scratch.h"

namespace pyrobust {
namespace {

// Multiply-adds below which the GIL is kept: a few microseconds of work.
constexpr int64_t kLeastReleasedWork = int64_t{1} << 19;

struct NotPlain {};  // the general way is needed

struct Arguments {
  py::handle x, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations;
  py::handle extras, num_threads, grad_enabled;
};
constexpr Py_ssize_t kArgumentCount = 13;

PyObject* attribute_of_module(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();  // never given back
}

// torch.Tensor and torch.nn.Parameter, but no subclass: those may mean something else.
bool is_tensor(py::handle object) {
  static PyObject* const types[2] = {attribute_of_module("torch", "Tensor"),
                                     attribute_of_module("torch.nn", "Parameter")};
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == types[0] || type == types[1];
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

void require_tensor(py::handle tensor, bool grad_enabled) {
  static PyObject* const name = interned("requires_grad");
  if (tensor.is_none()) return;
  if (!is_tensor(tensor)) throw NotPlain();
  if (!grad_enabled) return;
  PyObject* const answer = PyObject_GetAttr(tensor.ptr(), name);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);  // True and False are immortal
  if (answer != Py_False) throw NotPlain();
}

// The optional parts of a weight: None or a tuple.
void require_tensors(py::handle extras, bool grad_enabled) {
  if (extras.is_none()) return;
  if (!PyTuple_Check(extras.ptr())) throw NotPlain();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(extras.ptr()); ++i) {
    require_tensor(PyTuple_GET_ITEM(extras.ptr(), i), grad_enabled);
  }
}

// Memory with the negative bit of torch set holds the opposite of what it means.
void require_unnegated(py::handle tensor) {
  static PyObject* const name = interned("is_neg");
  PyObject* const answer = PyObject_CallMethodNoArgs(tensor.ptr(), name);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  if (answer != Py_False) throw NotPlain();
}

int64_t integer(py::handle object) {
  if (!PyLong_CheckExact(object.ptr())) throw NotPlain();
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

int levels_of(py::handle bits) {
  double value = 0;
  if (PyFloat_CheckExact(bits.ptr())) {
    value = PyFloat_AS_DOUBLE(bits.ptr());
    if (value == 1.58) return kTernaryLevels;
  } else {
    value = static_cast<double>(integer(bits));
  }
  if (value != 1 && value != 2 && value != 3 && value != 4 && value != 8) throw NotPlain();
  return 1 << static_cast<int>(value);
}

matmul::Mode mode_of(py::handle activations) {
  if (activations.is_none()) return matmul::Mode::kExact;
  const bool text = PyUnicode_CheckExact(activations.ptr());
  if (!text || PyUnicode_CompareWithASCIIString(activations.ptr(), "int8") != 0) throw NotPlain();
  return matmul::Mode::kInt8;
}

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

// x.new_empty(*x.shape[:-1], columns): the dtype of x, an inference tensor where that is the mode.
py::object new_output(py::handle x, const TensorView& shape, int64_t columns) {
  static PyObject* const name = interned("new_empty");
  PyObject* arguments[TensorView::kMaxDims + 1] = {x.ptr()};
  py::object sizes[TensorView::kMaxDims];
  for (int i = 0; i < shape.ndim; ++i) {
    sizes[i] = py::int_(i + 1 < shape.ndim ? shape.shape[i] : columns);
    arguments[i + 1] = sizes[i].ptr();
  }
  PyObject* const out = PyObject_VectorcallMethod(
      name, arguments, static_cast<size_t>(shape.ndim + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
      nullptr);
  if (out == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
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
  const matmul::PackedMatrix weight = packed_matrix(
      view(a.codes, "codes"), view(a.scale, "scale"), view_optional(a.zero, "zero"), cols,
      levels_of(a.bits), integer(a.group_size), static_cast<int>(integer(a.group_dim)), a.extras);
  const float* bias = float_bias(a.bias, weight.rows);
  const matmul::Mode mode = mode_of(a.activations);
  const int threads = static_cast<int>(integer(a.num_threads));
  matmul::Activations activations{x.data, float_type(x), 1};
  for (int i = 0; i + 1 < x.ndim; ++i) activations.rows *= x.shape[i];
  py::object out = new_output(a.x, x, weight.rows);
  void* const results = view(out, "out").data;
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
  try {
    return product({values[0], values[1], values[2], values[3], values[4], values[5], values[6],
                    values[7], values[8], values[9], values[10], values[11], values[12]})
        .release()
        .ptr();
  } catch (const NotPlain&) {
  } catch (const py::error_already_set&) {  // clears the error as it goes
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

}  // namespace

void bind_eager_linear(py::module_& m) {
  static PyMethodDef definition = {
      "eager_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_linear)),
      METH_FASTCALL, nullptr};
  m.attr("eager_linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace pyrobust
