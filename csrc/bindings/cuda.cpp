// The module pyrobust._cuda. It links the CUDA runtime statically and loads without a driver. Entry
// points take device pointers and a stream as integers, check nothing about the data (pyrobust/ops
// does), launch and return.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/cuda_families.h"
#include "bindings/cuda_queue.h"

namespace {

std::string status() {
  std::string text = "built for compute capability " PYROBUST_CUDA_TARGETS;
  std::string reason;
  const int count = pyrobust::cuda::device_count(&reason);
  if (count == 0) return text + "; no device: " + (reason.empty() ? "none found" : reason);
  for (int device = 0; device < count; ++device) {
    const pyrobust::cuda::DeviceFacts facts = pyrobust::cuda::device_facts(device);
    text += "; " + facts.name + " (" + std::to_string(facts.capability / 10) + "." +
            std::to_string(facts.capability % 10) + ")";
    if (facts.capability < pyrobust::cuda::kLeastCapability) text += ", too old";
  }
  return text;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of pyrobust.";
  m.def("status", &status);
  m.def("check_device", [](int device) { pyrobust::usable_device(device); });
  pyrobust::bind_cuda_interval(m);
  pyrobust::bind_cuda_matmul(m);
  pyrobust::bind_cuda_sampling(m);
}
