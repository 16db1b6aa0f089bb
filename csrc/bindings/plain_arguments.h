// Arguments of the calls that plain eager inference makes straight from Python: a tensor is taken
// only where it means what its memory holds and nothing watches it. Whatever is not wholly plain
// throws NotPlain, and the general way serves it or words the refusal.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/packed_matrix.h"
#include "bindings/tensor_view.h"

namespace pyrobust {

// Multiply-adds below which the GIL is kept: a few microseconds of work.
constexpr int64_t kLeastReleasedWork = int64_t{1} << 19;

struct NotPlain {};  // the general way is needed

inline PyObject* attribute_of_module(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();  // never given back
}

// torch.Tensor and torch.nn.Parameter, but no subclass: those may mean something else.
inline bool is_tensor(py::handle object) {
  static PyObject* const types[2] = {attribute_of_module("torch", "Tensor"),
                                     attribute_of_module("torch.nn", "Parameter")};
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == types[0] || type == types[1];
}

inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

inline void require_tensor(py::handle tensor, bool grad_enabled) {
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
inline void require_tensors(py::handle extras, bool grad_enabled) {
  if (extras.is_none()) return;
  if (!PyTuple_Check(extras.ptr())) throw NotPlain();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(extras.ptr()); ++i) {
    require_tensor(PyTuple_GET_ITEM(extras.ptr(), i), grad_enabled);
  }
}

// Memory with the negative bit of torch set holds the opposite of what it means.
inline void require_unnegated(py::handle tensor) {
  static PyObject* const name = interned("is_neg");
  PyObject* const answer = PyObject_CallMethodNoArgs(tensor.ptr(), name);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  if (answer != Py_False) throw NotPlain();
}

inline int64_t integer(py::handle object) {
  if (!PyLong_CheckExact(object.ptr())) throw NotPlain();
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

inline int levels_of(py::handle bits) {
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

inline matmul::Mode mode_of(py::handle activations) {
  if (activations.is_none()) return matmul::Mode::kExact;
  const bool text = PyUnicode_CheckExact(activations.ptr());
  if (!text || PyUnicode_CompareWithASCIIString(activations.ptr(), "int8") != 0) throw NotPlain();
  return matmul::Mode::kInt8;
}

// x.new_empty(sizes): the dtype of x, an inference tensor where that is the mode.
inline py::object new_output(py::handle x, const int64_t* sizes, int ndim) {
  static PyObject* const name = interned("new_empty");
  PyObject* arguments[TensorView::kMaxDims + 1] = {x.ptr()};
  py::object numbers[TensorView::kMaxDims];
  for (int i = 0; i < ndim; ++i) {
    numbers[i] = py::int_(sizes[i]);
    arguments[i + 1] = numbers[i].ptr();
  }
  PyObject* const out = PyObject_VectorcallMethod(
      name, arguments, static_cast<size_t>(ndim + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (out == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
}

// What `run` returns, or None where it throws: the general way finds the reason.
template <typename Run>
PyObject* plain_or_none(const Run& run) {
  try {
    return run().release().ptr();
  } catch (const NotPlain&) {
  } catch (const py::error_already_set&) {  // clears the error as it goes
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

}  // namespace pyrobust
