// The interval kernels and their launches, as the host compiler sees them; and their layout.
#include <pybind11/stl.h>

#include <array>

#include "interval/cuda.cu"
#include "shim.h"

namespace pyrobust {
namespace {

int64_t operand_place(int64_t batch, int64_t terms, int plane, int64_t input, int64_t term,
                      int bits) {
  using namespace interval::gpu;
  return operand_index(operand_shape(batch, terms), plane, input, term, bits);
}

std::array<int64_t, 2> operand_sizes(int64_t batch, int64_t terms) {
  const interval::gpu::Shape shape = interval::gpu::operand_shape(batch, terms);
  return {shape.batch, shape.terms};
}

}  // namespace

void bind_interval_layout(pybind11::module_& m) {
  m.def("operand_place", &operand_place);
  m.def("operand_sizes", &operand_sizes);
}

}  // namespace pyrobust
