// Products by warps that compute capability 9.0 leaves to warpgroups: of packed weights, and of
// bfloat16 ones with more than eight inputs. Its own machine code has none of them.
#include "interval/cuda_product_launch.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

static_assert(kLeastWide == kColumns + 1, "one tile of inputs under bfloat16 weights: cuda.cu");

cuda::Status launch_other_product(const LinearCall& call, const Plan& plan,
                                  const cuda::Queue& queue) {
  if (call.kind == WeightKind::kBFloat16) {
    return launch_product<2>(bfloat16_source(call), call, plan, queue);
  }
  return with_packed_source(call, [&](const auto& source) {
    return tiles_for(call.batch) == 1 ? launch_product<1>(source, call, plan, queue)
                                      : launch_product<2>(source, call, plan, queue);
  });
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
