// The fused product with codes of 3 bits.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_3(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::k3>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
