// Launches of the sampling kernels on a GPU: the calls of sampling.h with device pointers, the same
// bits. Nothing waits or allocates; a status other than 0 is a launch that failed.
//
// What the CPU checks by looking at data is not checked here, since that would mean waiting: a
// scale that is not positive gives what the formula gives, a list of candidates that does not lie
// within `candidates` counts as empty.
#pragma once

#include "cuda/queue.h"
#include "sampling/sampling.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

cuda::Status noise_samples(const NoiseCall& call, const cuda::Queue& queue);
cuda::Status split_samples(const SplitCall& call, const cuda::Queue& queue);
cuda::Status keep_samples(const KeepCall& call, const cuda::Queue& queue);
cuda::Status grid_samples(const GridCall& call, const cuda::Queue& queue);
cuda::Status choice_samples(const ChoiceCall& call, int64_t candidates, const cuda::Queue& queue);

// counts[r / samples][class of row r] += 1 over all rows; a row with a NaN adds nothing and lowers
// *first_nan to its index less `rows`. The caller fills counts and first_nan with 0.
struct CountCall {
  const void* logits;  // (rows, classes) of type
  FloatType type;
  int64_t rows;
  int64_t samples;  // rows of one histogram
  int64_t classes;
  int64_t* counts;  // (rows / samples, classes)
  int64_t* first_nan;
};
cuda::Status count_votes(const CountCall& call, const cuda::Queue& queue);

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
