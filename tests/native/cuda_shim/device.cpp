// The one device of the emulation: cuda/device.h without a CUDA runtime.
#include "cuda/device.h"

namespace pyrobust {
namespace cuda {

std::string status_text(Status status) { return "emulated status " + std::to_string(status); }

int device_count(std::string*) { return 1; }

// Three multiprocessors, so that grids loop. Device 0 has clusters and products of warpgroups,
// device 1 is too old, device 2 has neither, device 3 clusters alone, device 4 as device 2 but with
// little shared memory.
DeviceFacts device_facts(int device) {
  constexpr int kCapabilities[] = {90, 70, 80, 100, 89};
  return {"fibres", kCapabilities[device % 5], 3, device == 4 ? 99 * 1024 : kLargeBlock};
}

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace cuda
}  // namespace pyrobust
