// The product of warpgroups. Compiled for sm_90a.
#include "cuda/launch.h"
#include "interval/cuda_prepare.cuh"
#include "interval/cuda_wide.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {
namespace {

template <int kEights, class Source>
cuda::Status launch_product(const WideWork<Source>& work, int64_t blocks,
                            const cuda::Queue& queue) {
  using S = WideShape<Source, kEights>;
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(blocks);
  shape.threads = S::kThreads;
  shape.shared_bytes = S::kShared;
  shape.overlaps = true;
  return cuda::launch(wide_kernel<Source, kEights>, shape, queue.stream, work);
}

template <class Source>
cuda::Status launch_wide(const Source& source, const LinearCall& call, const Constants& constants,
                         const WideScratch& scratch, const WidePlan& plan,
                         const cuda::Queue& queue) {
  const int count = plan.parts > 1 ? static_cast<int>(plan.outputs) : 0;
  const PrepareTo prepared = {scratch.images, scratch.offsets, scratch.counters, count};
  const cuda::Status status =
      launch_prepare<Source::kOrder, true>(call, constants, prepared, queue);
  if (status != 0) return status;
  const WideWork<Source> work = {source,          scratch.images, scratch.offsets, call.bias,
                                 call.batch,      call.rows,      call.terms,      constants,
                                 call.out_lower,  call.out_upper, plan.parts,      scratch.partials,
                                 scratch.counters};
  const int64_t blocks = plan.outputs * plan.parts;
  switch (image_inputs(call.batch)) {
    case 8:
      return launch_product<1>(work, blocks, queue);
    case 16:
      return launch_product<2>(work, blocks, queue);
    case 32:
      return launch_product<4>(work, blocks, queue);
    default:
      return launch_product<8>(work, blocks, queue);
  }
}

}  // namespace

cuda::Status wide_linear(const LinearCall& call, const Constants& constants,
                         const WideScratch& scratch, const WidePlan& plan,
                         const cuda::Queue& queue) {
  return with_exact_source(call, [&](const auto& source) {
    return launch_wide(source, call, constants, scratch, plan, queue);
  });
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
