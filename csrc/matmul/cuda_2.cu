// The fused product with codes of 2 bits, and ternary ones.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_2(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::k2>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
