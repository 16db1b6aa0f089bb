#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/device.h"

namespace pyrobust {
namespace cuda {
namespace {

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(status_text(static_cast<Status>(error)));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

std::string status_text(Status status) {
  return std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(status));
}

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // so that it does not surface at the next launch
  *reason = cudaGetErrorString(error);
  return 0;
}

DeviceFacts device_facts(int device) {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, device));
  return {properties.name,
          10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  require(cudaGetDevice(&current));
  if (current == device) return;
  require(cudaSetDevice(device));
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace cuda
}  // namespace pyrobust
