// What the bindings ask of the CUDA runtime. A machine without a driver has no devices; nothing
// here fails at load.
#pragma once

#include <string>

#include "cuda/queue.h"

namespace pyrobust {
namespace cuda {

constexpr int kLeastCapability = 80;

// Text of a status that is not 0.
std::string status_text(Status status);

// Number of devices; where there is none, *reason says why.
int device_count(std::string* reason);

struct DeviceFacts {
  std::string name;
  int capability;  // 10 major + minor
  int multiprocessors;
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
