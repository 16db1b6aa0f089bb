// The fused product with codes of 1 bit.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_1(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::k1>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
