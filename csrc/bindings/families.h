// One registration function per kernel family; native.cpp calls each.
#pragma once

#include <pybind11/pybind11.h>

namespace pyrobust {

void bind_matmul(pybind11::module_& m);
void bind_additions(pybind11::module_& m);
void bind_eager_linear(pybind11::module_& m);
void bind_eager_interval(pybind11::module_& m);
void bind_eager_boxes(pybind11::module_& m);
void bind_eager_chain(pybind11::module_& m);
void bind_settled_ends(pybind11::module_& m);
void bind_panel_cache(pybind11::module_& m);
void bind_kept_ends(pybind11::module_& m);
void bind_limits(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_interval(pybind11::module_& m);
void bind_curves(pybind11::module_& m);
void bind_relaxation(pybind11::module_& m);
void bind_transformer(pybind11::module_& m);

}  // namespace pyrobust
