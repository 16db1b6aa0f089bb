// What every entry point of pyrobust._cuda does first: the device made current and checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/queue.h"

namespace pyrobust {

// Facts of a device, asked of the driver once; throws where the device is too old.
inline const cuda::DeviceFacts& usable_device(int device) {
  constexpr int kMostDevices = 64;
  static cuda::DeviceFacts known[kMostDevices];  // the GIL is held
  if (device < 0 || device >= kMostDevices) {
    throw std::runtime_error("pyrobust: device index " + std::to_string(device) + " is too large.");
  }
  cuda::DeviceFacts& facts = known[device];
  if (facts.multiprocessors == 0) facts = cuda::device_facts(device);
  if (facts.capability < cuda::kLeastCapability) {
    throw std::runtime_error("pyrobust: needs compute capability 8.0 or above; device " +
                             std::to_string(device) + " (" + facts.name + ") has " +
                             std::to_string(facts.capability / 10) + "." +
                             std::to_string(facts.capability % 10) + ".");
  }
  return facts;
}

// The least architecture of 90 and above that this module has code for: a later card runs that, an
// earlier one code that knows no clusters, and the host must think alike.
#if !defined(PYROBUST_CUDA_CLUSTERS_FROM)
#define PYROBUST_CUDA_CLUSTERS_FROM 90
#endif

inline bool has_clusters(int device) {
  return usable_device(device).capability >= PYROBUST_CUDA_CLUSTERS_FROM;
}
inline bool has_warpgroups(int device) {
  return has_clusters(device) && usable_device(device).capability == 90;
}

class Launching {
 public:
  Launching(int device, uintptr_t stream)
      : queue{stream, usable_device(device).multiprocessors}, guard_(device) {}
  const cuda::Queue queue;

 private:
  cuda::DeviceGuard guard_;
};

// Throws where a launch failed.
inline void require_launched(const char* subject, cuda::Status status) {
  if (status != 0)
    throw std::runtime_error(std::string(subject) + ": " + cuda::status_text(status));
}

// A device pointer that arrives as an integer.
template <typename T>
T* device_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace pyrobust
