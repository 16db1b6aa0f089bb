// The product of warpgroups. Compiled for sm_90a.
#include <type_traits>

#include "interval/cuda_product_launch.cuh"
#include "interval/cuda_wide.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {
namespace {

template <int kEights, class Source>
cuda::Status launch_wide(const WideWork<Source>& work, int64_t blocks, const cuda::Queue& queue) {
  using S = WideShape<Source, kEights>;
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(blocks);
  shape.threads = S::kThreads;
  shape.shared_bytes = S::kShared;
  shape.overlaps = true;
  return cuda::launch(wide_kernel<Source, kEights>, shape, queue.stream, work);
}

template <class Source>
cuda::Status launch_inputs(const WideWork<Source>& work, int64_t blocks, const cuda::Queue& queue) {
  switch (image_inputs(work.batch)) {
    case 8:
      if constexpr (Source::kBits == 0) {
        return 1;  // cudaErrorInvalidValue: fewer than kLeastWide are not multiplied here
      } else {
        return launch_wide<1>(work, blocks, queue);
      }
    case 16:
      return launch_wide<2>(work, blocks, queue);
    case 32:
      return launch_wide<4>(work, blocks, queue);
    default:
      return launch_wide<8>(work, blocks, queue);
  }
}

}  // namespace

cuda::Status wide_linear(const LinearCall& call, const Constants& constants,
                         const WideScratch& scratch, const WidePlan& plan,
                         const cuda::Queue& queue) {
  const auto launch = [&](const auto& source) {
    const Plan of_call = {constants, scratch.images, scratch.offsets, plan.parts};
    const WideWork<std::decay_t<decltype(source)>> work = {product_work(source, call, of_call),
                                                           scratch.partials, scratch.counters};
    return launch_inputs(work, plan.outputs * plan.parts, queue);
  };
  if (call.kind == WeightKind::kBFloat16) return launch(bfloat16_source(call));
  return with_packed_source(call, launch);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
