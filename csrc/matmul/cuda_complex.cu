// The sums of matmul/complex.h on tensor cores: weights 1, i, -1, -i in 2 bits, one read of W for
// its real and its imaginary part. x is the int8 parts as float16, real rows above imaginary ones;
// every sum is exact in float32 for at most kMaxExactComplexCols columns.
#include "matmul/cuda_linear.cuh"

namespace pyrobust::matmul::gpu {

cuda::Status linear_complex(const LinearArguments& p, cuda::Stream stream) {
  // Two sums a weight: more than 16 rows do not fit into the registers.
  if (p.count <= 8) return start<Format::kComplex, Float16, 8, 0>(p, stream);
  return start<Format::kComplex, Float16, 16, 0>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
