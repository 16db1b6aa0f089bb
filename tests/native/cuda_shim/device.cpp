// The one device of the emulation: cuda/device.h without a CUDA runtime.
#include "cuda/device.h"

namespace pyrobust {
namespace cuda {

std::string status_text(Status status) { return "emulated status " + std::to_string(status); }

int device_count(std::string*) { return 1; }

// Device 0 has three multiprocessors, so that grids loop; device 1 is too old.
DeviceFacts device_facts(int device) { return {"fibres", device == 0 ? 90 : 70, 3}; }

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace cuda
}  // namespace pyrobust
