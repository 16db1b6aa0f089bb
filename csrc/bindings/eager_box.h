// Intervals as plain eager layers take and make them: their attributes, read and set from here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/plain_arguments.h"
#include "bindings/tensor_view.h"

namespace pyrobust {

inline bool truth(py::handle object) {
  if (object.ptr() != Py_True && object.ptr() != Py_False) throw NotPlain();
  return object.ptr() == Py_True;
}

inline const float* float_bias(py::handle bias, int64_t rows) {
  if (bias.is_none()) return nullptr;
  const TensorView values = view(bias, "bias");
  values.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, rows);
  return values.as<const float>();
}

// Both ends as tensors, or kept.
inline void require_ends(py::handle first, py::handle second, bool grad_enabled) {
  if (PyByteArray_CheckExact(first.ptr())) return;
  for (py::handle end : {first, second}) {
    if (end.is_none()) throw NotPlain();
    require_tensor(end, grad_enabled);
  }
}

// The attributes of pyrobust.interval.type.Interval, and the class.
struct BoxNames {
  PyObject* type = nullptr;
  PyObject* lower = interned("_lower");
  PyObject* upper = interned("_upper");
  PyObject* kept = interned("_kept");
  PyObject* rounding = interned("rounding");
  PyObject* memory = interned("_memory");
  PyObject* seen = interned("_seen");
  PyObject* rectified = interned("_rectified");
  PyObject* graded = interned("_graded");
  PyObject* deferred = interned("_deferred");
  PyObject* source = interned("_source");
};

inline BoxNames& box_names() {
  static auto* const names = new BoxNames();  // never destroyed: the interpreter may be gone
  return *names;
}

inline py::object attribute(py::handle object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline void set_attribute(py::handle object, PyObject* name, py::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) != 0) throw py::error_already_set();
}

// What an Interval holds: kept ends as (bytearray, shape), or two tensors.
struct Held {
  py::object first, second, rounding, rectified;
  bool kept;

  Held(py::handle box, PyObject* grad_enabled) {
    const BoxNames& names = box_names();
    if (reinterpret_cast<PyObject*>(Py_TYPE(box.ptr())) != names.type) throw NotPlain();
    // A box whose memory was changed in place under another name is refused elsewhere.
    const py::object memory = attribute(box, names.memory), seen = attribute(box, names.seen);
    if (!PyList_CheckExact(memory.ptr()) || PyList_GET_SIZE(memory.ptr()) != 1 ||
        integer(PyList_GET_ITEM(memory.ptr(), 0)) != integer(seen)) {
      throw NotPlain();
    }
    rounding = attribute(box, names.rounding);
    rectified = attribute(box, names.rectified);
    const py::object both = attribute(box, names.kept);
    kept = !both.is_none();
    if (kept) {
      first = py::reinterpret_borrow<py::object>(PyTuple_GetItem(both.ptr(), 0));
      second = py::reinterpret_borrow<py::object>(PyTuple_GetItem(both.ptr(), 1));
      return;
    }
    // A ReLU that was asked for under another setting of gradients is carried out under that one.
    if (truth(rectified) && attribute(box, names.graded).ptr() != grad_enabled) throw NotPlain();
    first = attribute(box, names.lower);
    second = attribute(box, names.upper);
  }
};

// Gives a box that is only being made all that it holds.
inline void fill_box(py::handle box, py::handle first, py::handle second, py::handle rounding,
                     bool rectified, PyObject* graded) {
  const BoxNames& names = box_names();
  if (PyByteArray_CheckExact(first.ptr())) {
    set_attribute(box, names.kept, py::make_tuple(first, second));
  } else {
    set_attribute(box, names.lower, first);
    set_attribute(box, names.upper, second);
    set_attribute(box, names.kept, py::none());
  }
  const py::int_ zero(0);
  auto memory = py::reinterpret_steal<py::object>(PyList_New(1));
  if (!memory) throw py::error_already_set();
  PyList_SET_ITEM(memory.ptr(), 0, py::object(zero).release().ptr());
  set_attribute(box, names.memory, memory);
  set_attribute(box, names.seen, zero);
  set_attribute(box, names.rounding, rounding);
  set_attribute(box, names.rectified, py::bool_(rectified));
  set_attribute(box, names.graded, graded);
}

inline py::object new_box(py::handle first, py::handle second, py::handle rounding, bool rectified,
                          PyObject* graded) {
  auto* const type = reinterpret_cast<PyTypeObject*>(box_names().type);
  auto box = py::reinterpret_steal<py::object>(type->tp_alloc(type, 0));
  if (!box) throw py::error_already_set();
  fill_box(box, first, second, rounding, rectified, graded);
  return box;
}

// Tensors of their own, (lower, upper), of kept ends.
py::object tensors_of(py::handle memory, py::handle shape);

}  // namespace pyrobust
