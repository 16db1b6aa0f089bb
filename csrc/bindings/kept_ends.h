// Large ends of boxes as torch tensors in memory that is kept between calls
// (runtime/kept_memory.h).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyrobust {

namespace py = pybind11;

// new_output(like, sizes, ndim); where `like` is a plain float32 tensor on the CPU and the result
// large, in kept memory, to which it returns with the last tensor that shares it. The storage of
// such a tensor cannot grow.
py::object new_end(py::handle like, const int64_t* sizes, int ndim);

}  // namespace pyrobust
