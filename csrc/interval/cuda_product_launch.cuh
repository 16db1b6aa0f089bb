// The second launch of a product by warps: which instance, and where the first one's results lie.
#pragma once

#include "cuda/launch.h"
#include "interval/cuda_product.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

// What the launch of a call needs beside the call.
struct Plan {
  Constants constants;
  uint16_t* operands;
  float* offsets;
  int parts;
};

// Inputs of a block: tiles of eight, one or two.
inline int tiles_for(int64_t batch) { return batch <= kColumns ? 1 : 2; }

inline int64_t product_blocks(const LinearCall& call) {
  const int64_t rows = 16 * kRowWarps * (call.kind == WeightKind::kFloat32 ? 1 : 2);
  const int64_t inputs = kColumns * tiles_for(call.batch);
  return (call.rows + rows - 1) / rows * ((call.batch + inputs - 1) / inputs);
}

template <class Source>
ProductWork<Source> product_work(const Source& source, const LinearCall& call, const Plan& plan) {
  return {source,     plan.operands,  plan.offsets,   call.bias,      call.batch, call.rows,
          call.terms, plan.constants, call.out_lower, call.out_upper, plan.parts};
}

template <int kTiles, class Source>
cuda::Status launch_product(const Source& source, const LinearCall& call, const Plan& plan,
                            const cuda::Queue& queue) {
  using Shape_ = ProductShape<Source, kTiles>;
  const cuda::LaunchShape shape = {static_cast<unsigned>(product_blocks(call) * plan.parts),
                                   1,
                                   kProductThreads,
                                   Shape_::kShared,
                                   static_cast<unsigned>(plan.parts),
                                   call.clusters};
  return cuda::launch(product_kernel<Source, kTiles>, shape, queue.stream,
                      product_work(source, call, plan));
}

// What compute capability 9.0 leaves to warpgroups (is_wide in cuda.cu): cuda_warps.cu.
cuda::Status launch_other_product(const LinearCall& call, const Plan& plan,
                                  const cuda::Queue& queue);

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
