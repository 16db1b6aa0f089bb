// Differs from portable.cpp in working on tiles and in 256-bit registers; see avx2_paths.h.
#include "matmul/avx2_paths.h"

namespace pyrobust::matmul {
namespace {

constexpr MatmulKernels kKernels = {
    prepared_bytes, scratch_bytes,   prepare,       multiply,         nullptr,
    sparse_prepare, sparse_multiply, complex_order, complex_multiply, kTile};

}  // namespace

const MatmulKernels* avx2_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
