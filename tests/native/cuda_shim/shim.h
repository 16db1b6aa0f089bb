// One registration function per subject; module.cpp calls each.
#pragma once

#include <pybind11/pybind11.h>

namespace pyrobust {

void bind_interval_fault(pybind11::module_& m);
void bind_interval_layout(pybind11::module_& m);
void bind_probes(pybind11::module_& m);
void bind_sampling_places(pybind11::module_& m);
void bind_matmul_layout(pybind11::module_& m);
void bind_matmul_fault(pybind11::module_& m);

}  // namespace pyrobust
