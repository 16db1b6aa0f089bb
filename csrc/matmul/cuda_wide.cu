// The fused product of warpgroups at every width without a codebook. Compiled for sm_90a.
#include "matmul/cuda_formats.h"
#include "matmul/cuda_wide.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_wide(Format format, const LinearArguments& p, cuda::Stream stream) {
  return with_width(format, p.x_type, [&](auto width, auto type) {
    return start_wide<decltype(width)::kValue, decltype(type)>(p, stream);
  });
}

}  // namespace pyrobust::matmul::gpu
