// What both ways into the interval kernels read the same way.
#pragma once

#include <array>
#include <string>

#include "bindings/tensor_view.h"
#include "interval/interval.h"

namespace pyrobust {

// The promise, and how far the arithmetic that it covers moves an operand.
struct Promise {
  interval::Rounding rounding;
  float operand_error;
};

// Throws for an unknown name.
Promise parse_rounding(const std::string& name);

// Whether radii may be multiplied in bfloat16.
bool coarse_radius_allowed();

// Tensors of float32 and of equal shape; absent ones give null.
template <size_t kCount>
std::array<float*, kCount> alike(const std::array<py::handle, kCount>& tensors, int64_t* count) {
  std::array<float*, kCount> out{};
  const TensorView first = view(tensors[0], "first");
  *count = first.numel();
  for (size_t i = 0; i < kCount; ++i) {
    if (tensors[i].is_none()) continue;
    const TensorView value = view(tensors[i], "gradient");
    value.require_dtype(DType::kFloat32).require_ndim(first.ndim);
    for (int axis = 0; axis < first.ndim; ++axis) value.require_size(axis, first.shape[axis]);
    out[i] = value.as<float>();
  }
  return out;
}

}  // namespace pyrobust
