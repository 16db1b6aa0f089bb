// The fused product with codes that index a codebook, 4 bits each.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_codebook(const LinearArguments& p, cuda::Stream stream) {
  return start_format<Format::kCodebook>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
