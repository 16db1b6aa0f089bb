// Sizes of the product of warpgroups (cuda_wide.cuh), and its launch.
#pragma once

#include "interval/cuda.h"
#include "interval/cuda_layout.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace gpu {

// Warpgroups of a block: as many as leave a thread the registers for its sums.
PYROBUST_HD constexpr int wide_groups(bool dense, int inputs) {
  return inputs <= 16 ? 4 : inputs == 32 ? (dense ? 4 : 3) : (dense ? 3 : 2);
}
// Images of a stage: of packed weights a whole step.
PYROBUST_HD constexpr int wide_images(bool dense) { return dense ? 1 : 2; }

struct WidePlan {
  int64_t outputs;  // sets of a block's outputs
  int parts;        // blocks that share the terms of a set
};
inline WidePlan wide_plan(const LinearCall& call, int multiprocessors) {
  const bool dense = call.kind != WeightKind::kPacked;
  const int inputs = image_inputs(call.batch);
  const int64_t rows = 64 * wide_groups(dense, inputs);
  const int64_t steps = padded(call.terms, kStep) / kStep;
  WidePlan plan;
  plan.outputs = (call.rows + rows - 1) / rows * ((call.batch + inputs - 1) / inputs);
  int64_t parts = multiprocessors / plan.outputs;
  if (parts > kMostParts) parts = kMostParts;
  if (parts > steps) parts = steps;
  plan.parts = parts < 1 ? 1 : static_cast<int>(parts);
  return plan;
}

// Bytes of the sums that blocks leave in memory.
inline int64_t wide_partial_bytes(const LinearCall& call, const WidePlan& plan) {
  if (plan.parts == 1) return 0;
  const int inputs = image_inputs(call.batch);
  const int64_t rows = 64 * wide_groups(call.kind != WeightKind::kPacked, inputs);
  return plan.outputs * plan.parts * rows * inputs * 2 * 4;
}

// Operands of a wide product in scratch memory.
struct WideScratch {
  uint16_t* images;
  float* offsets;
  int32_t* counters;
  float* partials;
};

cuda::Status wide_linear(const LinearCall& call, const Constants& constants,
                         const WideScratch& scratch, const WidePlan& plan,
                         const cuda::Queue& queue);

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
