// What the bindings ask of the CUDA runtime. A machine without a driver has no devices; nothing
// here fails at load.
#pragma once

#include <string>

#include "cuda/queue.h"

namespace pyrobust {
namespace cuda {

constexpr int kLeastCapability = 80;

// What fused products want of shared memory, of one thread block: all that compute capability 8.0
// has. 8.6, 8.9 and 12.0 have 99 KB.
constexpr int kLargeBlock = 163 * 1024;

// Text of a status that is not 0.
std::string status_text(Status status);

// Number of devices; where there is none, *reason says why.
int device_count(std::string* reason);

struct DeviceFacts {
  std::string name;
  int capability;  // 10 major + minor
  int multiprocessors;
  int shared_bytes;  // that one thread block may have
};
DeviceFacts device_facts(int device);

// Makes `device` current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

}  // namespace cuda
}  // namespace pyrobust
