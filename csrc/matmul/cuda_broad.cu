// The fused product of more than 64 rows of x at every width without a codebook. Compiled for
// sm_90a.
#include "matmul/cuda_broad.cuh"

namespace pyrobust::matmul::gpu {
namespace {

template <Format kFormat>
cuda::Status start_type(const LinearArguments& p, cuda::Stream stream) {
  return p.x_type == FloatType::kFloat16 ? start_broad<kFormat, Float16>(p, stream)
                                         : start_broad<kFormat, BFloat16>(p, stream);
}

}  // namespace

cuda::Status linear_broad(Format format, const LinearArguments& p, cuda::Stream stream) {
  switch (format) {
    case Format::k1:
      return start_type<Format::k1>(p, stream);
    case Format::k2:
      return start_type<Format::k2>(p, stream);
    case Format::k3:
      return start_type<Format::k3>(p, stream);
    case Format::k4:
      return start_type<Format::k4>(p, stream);
    default:
      return start_type<Format::k8>(p, stream);
  }
}

}  // namespace pyrobust::matmul::gpu
