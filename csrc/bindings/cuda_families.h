// One registration function per kernel family; cuda.cpp calls each, and so does the test module
// that runs the kernels on the CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace pyrobust {

void bind_cuda_interval(pybind11::module_& m);
void bind_cuda_matmul(pybind11::module_& m);
void bind_cuda_sampling(pybind11::module_& m);

}  // namespace pyrobust
