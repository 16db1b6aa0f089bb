// One macro for functions that both the CPU and CUDA compile: always inlined into each translation
// unit, never a shareable symbol, so that code built with wide instructions cannot leak into the
// portable path.
#pragma once

#if defined(__CUDACC__)
#define PYROBUST_HD static __host__ __device__ __forceinline__
#else
#define PYROBUST_HD static inline
#endif
