// Starts a kernel: on the caller's stream without waiting, or on fibres in the emulation.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/primitives.h"
#include "cuda/queue.h"

namespace pyrobust {
namespace cuda {

struct LaunchShape {
  unsigned blocks_x = 1;
  unsigned blocks_y = 1;
  unsigned threads = 128;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // consecutive blocks along x that see each other's shared memory
  // May start while the grid before it on the stream ends (compute capability 9.0): what that one
  // writes, and what it reads and this one writes, only after cuda::await_grid. Every thread calls
  // it, so that a grid ends after the one before it, and what waits for the last waits for all.
  // Before it a kernel reads weights: those were there before a launch that does not overlap.
  bool overlaps = false;
};

#if defined(__CUDACC__)

constexpr size_t kSharedByDefault = 48 * 1024;

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
              const Arguments&... arguments) {
  if (shape.shared_bytes > kSharedByDefault) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return static_cast<Status>(error);
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return static_cast<Status>(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

#else

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream,
              const Arguments&... arguments) {
  const fibres::Grid grid = {{shape.blocks_x, shape.blocks_y, 1},
                             {shape.threads, 1, 1},
                             shape.shared_bytes,
                             shape.cluster};
  fibres::launch(grid, shape.overlaps, [=] { kernel(arguments...); });
  return 0;
}

#endif

}  // namespace cuda
}  // namespace pyrobust
