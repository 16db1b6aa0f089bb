// Functions of CPython itself that take plain arguments: pybind11's matching of arguments costs
// more than what they do.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/plain_arguments.h"

namespace pyrobust {

// What kFunction returns, or None (plain_or_none).
template <py::object (*kFunction)(PyObject* const*), Py_ssize_t kCount>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "takes %zd arguments; got %zd.", kCount, count);
    return nullptr;
  }
  return plain_or_none([&] { return kFunction(values); });
}

using Entry = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef method(const char* name, Entry function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

template <size_t kMethods>
void add_methods(py::module_& m, PyMethodDef (&methods)[kMethods]) {
  for (PyMethodDef& definition : methods) {
    m.attr(definition.ml_name) =
        py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
  }
}

}  // namespace pyrobust
