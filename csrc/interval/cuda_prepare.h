// The first launch of a product: boxes to operands or images (cuda_layout.h), and offsets.
#pragma once

#include "interval/cuda.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace gpu {

// Where the launch writes to.
struct PrepareTo {
  uint16_t* operands;
  bool images;
  float* offsets;     // (batch)
  int32_t* counters;  // that become zero
  int count;          // at most 256 an input
};

// `order`: of the terms, as the weight has them.
cuda::Status launch_prepare(const LinearCall& call, int order, const Constants& constants,
                            const PrepareTo& to, const cuda::Queue& queue);

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
