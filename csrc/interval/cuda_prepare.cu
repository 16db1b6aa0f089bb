#include "cuda/launch.h"
#include "interval/cuda_constants.h"
#include "interval/cuda_prepare.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

cuda::Status launch_prepare(const LinearCall& call, int order, const Constants& constants,
                            const PrepareTo& to, const cuda::Queue& queue) {
  const int parts = call.clusters ? prepare_parts(call.terms) : 1;
  const PrepareWork work = {call.lower,
                            call.upper,
                            call.batch,
                            call.terms,
                            call.int8,
                            constants,
                            to.operands,
                            to.offsets,
                            parts,
                            to.counters,
                            to.count,
                            image_inputs(call.batch),
                            strides_of(order),
                            flush_of(call.terms, call.rounding, bounds_packed(call))};
  const cuda::LaunchShape shape = {static_cast<unsigned>(call.batch * parts), 1, kPrepareThreads,
                                   kPrepareShared, static_cast<unsigned>(parts)};
  const auto kernel = to.images ? prepare_kernel<true> : prepare_kernel<false>;
  return cuda::launch(kernel, shape, queue.stream, work);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
