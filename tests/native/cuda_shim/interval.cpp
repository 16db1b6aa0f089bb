// The interval kernels and their launches, as the host compiler sees them; and their layout.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "interval/cuda.cu"
#include "runtime/check.h"
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

// Of every vector of a step of `inputs` inputs, in the order of global memory: its place in shared
// memory and where the products look for the same eighth, plane and lane.
std::vector<std::array<int, 2>> shared_places(int inputs) {
  using namespace interval::gpu;
  std::vector<std::array<int, 2>> places;
  for (int input = 0; input < inputs; ++input) {
    for (int index = 0; index < kStepVectors; ++index) {
      const int64_t term = index / 16 * kEight + index / 4 % 4 * kTermsOfLane;
      const int plane = index % 4;
      const int64_t place = operand_index({1, kStep}, plane, 0, term, kBFloat16Order);
      if (place != index * kEight) fail("vectors do not follow one another");
      places.push_back(
          {shared_place_of(input, index), shared_vector(input, index / 16, plane, index / 4 % 4)});
    }
  }
  return places;
}

// Bank groups of 16 bytes that eight lanes find that load together, first lane first.
std::vector<int> banks_together(int eighth, int plane, int first_lane) {
  std::vector<int> banks;
  for (int lane = first_lane; lane < first_lane + 8; ++lane) {
    banks.push_back(interval::gpu::shared_vector(lane / 4, eighth, plane, lane % 4) % 8);
  }
  return banks;
}

}  // namespace

void bind_interval_layout(pybind11::module_& m) {
  m.def("operand_place", &operand_place);
  m.def("operand_sizes", &operand_sizes);
  m.def("shared_places", &shared_places);
  m.def("banks_together", &banks_together);
  m.def("shared_parts", &interval::gpu::shared_parts);
  m.def("gpu_depth", &interval::gpu::gpu_depth);
}

}  // namespace pyrobust
