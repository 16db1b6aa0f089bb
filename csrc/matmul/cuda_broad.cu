// The fused product of more than 64 rows of x at every width without a codebook. Compiled for
// sm_90a.
#include "matmul/cuda_broad.cuh"
#include "matmul/cuda_formats.h"

namespace pyrobust::matmul::gpu {

cuda::Status linear_broad(Format format, const LinearArguments& p, cuda::Stream stream) {
  return with_width(format, p.x_type, [&](auto width, auto type) {
    return start_broad<decltype(width)::kValue, decltype(type)>(p, stream);
  });
}

}  // namespace pyrobust::matmul::gpu
