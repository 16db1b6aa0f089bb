// The ends of an Interval after everything that waits, as attributes that are computed in C.
//
// Dynamo traces properties written in Python, and so would trace how a box carries out what waits.
// A descriptor in C it reads on the box at hand, and its guards read it on every further box: both
// settle that box, and neither sees what it was that waited.
#include <pybind11/pybind11.h>

#include "bindings/eager_box.h"
#include "bindings/families.h"

namespace pyrobust {
namespace {

// pyrobust.interval.type.settle, and whether a reader's mode would change what is made here; never
// given back.
PyObject *settle = nullptr, *watches = nullptr;

// Whether a ReLU is still to come, or the memory was changed in place under another name.
bool waits(py::handle box) {
  const BoxNames& names = box_names();
  if (attribute(box, names.rectified).ptr() != Py_False) return true;
  const py::object memory = attribute(box, names.memory);
  if (!PyList_CheckExact(memory.ptr()) || PyList_GET_SIZE(memory.ptr()) != 1) return true;
  return !attribute(box, names.seen).equal(py::handle(PyList_GET_ITEM(memory.ptr(), 0)));
}

// Makes tensors of kept ends, unless the reader's mode wants a way of its own.
void make_tensors(py::handle box) {
  const BoxNames& names = box_names();
  const py::object kept = attribute(box, names.kept);
  if (!PyTuple_CheckExact(kept.ptr()) || PyTuple_GET_SIZE(kept.ptr()) != 2) return;
  const auto watched = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(watches));
  if (!watched) throw py::error_already_set();
  if (watched.ptr() != Py_False) return;
  const py::object ends =
      tensors_of(PyTuple_GET_ITEM(kept.ptr(), 0), PyTuple_GET_ITEM(kept.ptr(), 1));
  set_attribute(box, names.lower, PyTuple_GET_ITEM(ends.ptr(), 0));
  set_attribute(box, names.upper, PyTuple_GET_ITEM(ends.ptr(), 1));
  set_attribute(box, names.kept, py::none());
}

PyObject* read(PyObject* box, void* name) {
  try {
    if (waits(box)) {
      const auto done = py::reinterpret_steal<py::object>(PyObject_CallOneArg(settle, box));
      if (!done) return nullptr;
    }
    make_tensors(box);
    return attribute(box, static_cast<PyObject*>(name)).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

int write(PyObject* box, PyObject* end, void* name) {
  return PyObject_SetAttr(box, static_cast<PyObject*>(name), end);
}

void add_settled_ends(const py::object& type, py::object function, py::object reader_watches) {
  const BoxNames& names = box_names();
  static PyGetSetDef ends[] = {
      {"_settled_lower", &read, &write, "The lower ends, settled.", names.lower},
      {"_settled_upper", &read, &write, "The upper ends, settled.", names.upper},
  };
  settle = function.release().ptr();
  watches = reader_watches.release().ptr();
  for (PyGetSetDef& end : ends) {
    auto* const kind = reinterpret_cast<PyTypeObject*>(type.ptr());
    auto descriptor = py::reinterpret_steal<py::object>(PyDescr_NewGetSet(kind, &end));
    if (!descriptor) throw py::error_already_set();
    type.attr(end.name) = descriptor;
  }
}

}  // namespace

void bind_settled_ends(py::module_& m) { m.def("add_settled_ends", &add_settled_ends); }

}  // namespace pyrobust
