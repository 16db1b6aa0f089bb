// The fused product with codes of 4 bits.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_4(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::k4>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
