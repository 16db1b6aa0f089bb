// Where a family's launches go: what host code passes down, without any CUDA header.
#pragma once

#include <stdint.h>

namespace pyrobust {
namespace cuda {

// A cudaStream_t, as an integer; the emulation ignores it.
using Stream = uintptr_t;

// 0, or a cudaError_t (status_text in cuda/device.h).
using Status = int;

struct Queue {
  Stream stream;
  int multiprocessors;  // of the current device; persistent grids are a multiple of it
};

}  // namespace cuda
}  // namespace pyrobust
