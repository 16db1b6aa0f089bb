// The test module pyrobust._cuda_shim: the CUDA kernels' source, built by the host compiler and run
// on fibres (cuda/fibres.h).
#include <string>

#include "bindings/cuda_families.h"
#include "bindings/cuda_queue.h"
#include "cuda/fibres.h"
#include "shim.h"

namespace py = pybind11;

namespace {

using pyrobust::cuda::fibres::Counters;
using pyrobust::cuda::fibres::counters;
using pyrobust::cuda::fibres::Options;

void set_options(bool descending, bool truncating, bool copies_land_at_once, bool hold_launches) {
  Options options;
  if (descending) options.order = pyrobust::cuda::fibres::Order::kDescending;
  if (truncating) options.tensor_sum = pyrobust::cuda::fibres::TensorSum::kTruncating;
  options.copies_land_at_once = copies_land_at_once;
  options.hold_launches = hold_launches;
  pyrobust::cuda::fibres::set_options(options);
}

py::dict take_counters() {
  const Counters seen = counters();
  counters() = Counters();
  py::dict result;
  result["switches"] = seen.switches;
  result["matrix_conflicts"] = seen.matrix_conflicts;
  result["async_copies"] = seen.async_copies;
  result["matrix_products"] = seen.matrix_products;
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda_shim, m) {
  m.doc() = "CUDA kernels of pyrobust on the CPU, for tests.";
  m.def("set_options", &set_options, py::arg("descending") = false, py::arg("truncating") = false,
        py::arg("copies_land_at_once") = false, py::arg("hold_launches") = false);
  m.def("take_counters", &take_counters);
  m.def("check_device", [](int device) { pyrobust::usable_device(device); });
  pyrobust::bind_probes(m);
  pyrobust::bind_sampling_places(m);
  pyrobust::bind_cuda_interval(m);
  pyrobust::bind_cuda_sampling(m);
  pyrobust::bind_interval_fault(m);
  pyrobust::bind_interval_layout(m);
  pyrobust::bind_matmul_layout(m);
  pyrobust::bind_matmul_fault(m);
  pyrobust::bind_cuda_matmul(m);
}
