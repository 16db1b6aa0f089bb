// The panel orders of weights (matmul/panels.h), kept as long as their codes are the same unchanged
// tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/tensor_view.h"
#include "matmul/matmul.h"

namespace pyrobust {

// Memory of a weight's panels, in large pages where the system has them.
class PanelMemory {
 public:
  explicit PanelMemory(int64_t bytes);
  ~PanelMemory();
  PanelMemory(const PanelMemory&) = delete;
  PanelMemory& operator=(const PanelMemory&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_;
  int64_t bytes_;
  bool mapped_;
};

// Points weight->panels to the weight's panels, where it has some, for as long as the result lives:
// from the second product with the same tensors on, so that weights which change at each step, or
// serve once, cost nothing. A change in place is seen by torch's count of versions; tensors without
// one (inference tensors) and small weights get no panels. The GIL must be held.
//
// `most_needed` bounds the number of elements that a weight must have: to look panels up takes 0.3
// us, more than they save at 8-bit products of fewer than 2^17.
constexpr int64_t kElementsOfProducts = int64_t{1} << 17;
constexpr int64_t kElementsOfBounds = int64_t{1} << 12;
std::shared_ptr<const PanelMemory> attach_panels(py::handle codes, py::handle scale,
                                                 py::handle zero, int num_threads,
                                                 matmul::PackedMatrix* weight,
                                                 int64_t most_needed = kElementsOfProducts);

void bind_panel_cache(py::module_& m);

}  // namespace pyrobust
