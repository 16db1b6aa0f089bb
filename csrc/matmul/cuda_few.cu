// The fused product of few rows at every width without a codebook. Compiled for sm_90.
#include "matmul/cuda_few.cuh"

namespace pyrobust::matmul::gpu {
namespace {

template <Format kFormat, class Act>
cuda::Status start_rows_few(const LinearArguments& p, cuda::Stream stream) {
  return p.count <= 8 ? start_few<kFormat, Act, 8>(p, stream)
                      : start_few<kFormat, Act, kFewRows>(p, stream);
}

template <Format kFormat>
cuda::Status start_type_few(const LinearArguments& p, cuda::Stream stream) {
  return p.x_type == FloatType::kFloat16 ? start_rows_few<kFormat, Float16>(p, stream)
                                         : start_rows_few<kFormat, BFloat16>(p, stream);
}

}  // namespace

cuda::Status linear_few(Format format, const LinearArguments& p, cuda::Stream stream) {
  switch (format) {
    case Format::k1:
      return start_type_few<Format::k1>(p, stream);
    case Format::k2:
      return start_type_few<Format::k2>(p, stream);
    case Format::k3:
      return start_type_few<Format::k3>(p, stream);
    case Format::k4:
      return start_type_few<Format::k4>(p, stream);
    default:
      return start_type_few<Format::k8>(p, stream);
  }
}

}  // namespace pyrobust::matmul::gpu
