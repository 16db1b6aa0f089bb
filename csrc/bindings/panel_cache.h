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
};

// Points weight->panels to the weight's panels, where it has some, for as long as the result lives:
// from the second product with the same tensors on, so that weights which change at each step, or
// serve once, cost nothing. A change in place is seen by torch's count of versions; tensors without
// one (inference tensors) and small weights get no panels. The GIL must be held.
std::shared_ptr<const PanelMemory> attach_panels(py::handle codes, py::handle scale,
                                                 py::handle zero, int num_threads,
                                                 matmul::PackedMatrix* weight);

void bind_panel_cache(py::module_& m);

}  // namespace pyrobust
