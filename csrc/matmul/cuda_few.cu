// The fused product of few rows at every width without a codebook. Compiled for sm_90.
#include "matmul/cuda_few.cuh"
#include "matmul/cuda_formats.h"

namespace pyrobust::matmul::gpu {

cuda::Status linear_few(Format format, const LinearArguments& p, cuda::Stream stream) {
  return with_width(format, p.x_type, [&](auto width, auto type) {
    constexpr Format kFormat = decltype(width)::kValue;
    using Act = decltype(type);
    return p.count <= 8 ? start_few<kFormat, Act, 8>(p, stream)
                        : start_few<kFormat, Act, kFewRows>(p, stream);
  });
}

}  // namespace pyrobust::matmul::gpu
