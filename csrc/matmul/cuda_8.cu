// The fused product with codes of 8 bits.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_8(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::k8>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
