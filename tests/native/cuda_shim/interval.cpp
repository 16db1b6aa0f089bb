// How the interval kernels divide their work and lay it out.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "interval/cuda_layout.h"
#include "interval/cuda_wide.h"
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
      const int64_t term = index / 16 * 4 * kEight + index / 4 % 4 * kEight;
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

// The same of weights: lanes of rows of `chunks` vectors that read vector `first` + lane % 4.
std::vector<int> weight_banks_together(int chunks, int first, int first_lane) {
  std::vector<int> banks;
  for (int lane = first_lane; lane < first_lane + 8; ++lane) {
    banks.push_back(interval::gpu::weight_vector(chunks, lane / 4, first + lane % 4) % 8);
  }
  return banks;
}

std::array<int64_t, 2> place_in_step(int order, int64_t term) {
  const interval::gpu::TermPlace at = interval::gpu::place_in_step(order, term);
  return {at.lane, at.place};
}

// Index of column 0 .. 127 of a step of an input's image, and the term that stands there.
std::array<int64_t, 2> image_place(int64_t terms, int inputs, int plane, int64_t input,
                                   int64_t step, int column, int order) {
  using namespace interval::gpu;
  const int64_t at = image_index(padded(terms, kStep), inputs, plane, input,
                                 step * kStep / kEight + column / kEight);
  return {at + column % kEight, step * kStep + term_of_column(order, column)};
}

// Term i of a chunk's eight: of operands, and of images.
std::array<int, 2> terms_of_run(int order, int chunk, int i) {
  using namespace interval::gpu;
  const TermStrides by = strides_of(order);
  return {term_of_run(run_of_operands(by, chunk), i), term_of_run(run_of_images(by, chunk), i)};
}

std::array<int64_t, 3> wide_plan(int kind, int64_t batch, int64_t rows, int64_t terms,
                                 int multiprocessors) {
  using namespace interval::gpu;
  LinearCall call{};
  call.kind = static_cast<WeightKind>(kind);
  call.batch = batch, call.rows = rows, call.terms = terms;
  const WidePlan plan = interval::gpu::wide_plan(call, multiprocessors);
  return {plan.outputs, plan.parts, wide_partial_bytes(call, plan)};
}

std::vector<int> rotation(int64_t count, int64_t rows) {
  interval::gpu::Rotation now = interval::gpu::rotation_of(count, rows);
  std::vector<int> steps;
  for (int i = 0; i < now.count; ++i, interval::gpu::advance(&now)) steps.push_back(now.at);
  return steps;
}

}  // namespace

void bind_interval_layout(pybind11::module_& m) {
  m.def("operand_place", &operand_place);
  m.def("operand_sizes", &operand_sizes);
  m.def("shared_places", &shared_places);
  m.def("banks_together", &banks_together);
  m.def("weight_banks_together", &weight_banks_together);
  m.def("place_in_step", &place_in_step);
  m.def("term_of_place", &interval::gpu::term_of_place);
  m.def("image_place", &image_place);
  m.def("terms_of_run", &terms_of_run);
  m.def("wide_plan", &wide_plan);
  m.def("rotation", &rotation);
  m.def("shared_parts", &interval::gpu::shared_parts);
  m.def("gpu_depth", &interval::gpu::gpu_depth);
}

}  // namespace pyrobust
