// Python entry points of the matmul kernels for GPUs: addresses and sizes in, nothing waits. What
// they mean is checked in pyrobust/ops/cuda_matmul.py, which also keeps the tensors alive. The same
// file makes the test module that runs the kernels on the CPU.
#include "bindings/cuda_matmul.h"

#include "bindings/cuda_families.h"

namespace pyrobust {
namespace {

using namespace cuda_matmul;

// The sums of the complex product: 2 count rows of x in float16, real parts first.
struct ComplexLinear {
  gpu::LinearArguments arguments;
  int multiprocessors;

  ComplexLinear(uintptr_t codes, int64_t rows, int64_t cols, int processors, bool clusters)
      : multiprocessors(processors) {
    arguments.codes = device_pointer<const uint32_t>(codes);
    arguments.rows = rows;
    arguments.cols = gpu::divide_up(cols, 8) * 8;
    arguments.group_dim = 0;
    arguments.clusters = clusters;
    gpu::plan_linear(INT64_MAX, &arguments);
  }

  gpu::LinearArguments for_rows(int64_t count) const {
    gpu::LinearArguments p = arguments;
    gpu::plan_rows(gpu::Format::kComplex, count, multiprocessors, &p);
    return p;
  }

  py::tuple workspace(int64_t count) const {
    const gpu::LinearArguments p = for_rows(count);
    return py::make_tuple(gpu::partial_floats(gpu::Format::kComplex, p), gpu::arrival_words(p));
  }

  void run(uintptr_t x, int64_t count, uintptr_t sums, uintptr_t partials, uintptr_t arrivals,
           const Where& where) const {
    const Launching on(where.first, where.second);
    gpu::LinearArguments p = for_rows(count);
    p.x = device_pointer<const void>(x);
    p.sums = device_pointer<int32_t>(sums);
    p.partials = device_pointer<float>(partials);
    p.arrivals = device_pointer<int32_t>(arrivals);
    require(gpu::linear(gpu::Format::kComplex, p, on.queue.stream));
  }
};

void repack(int levels, bool codebook, bool is_complex, uintptr_t codes, int64_t rows, int64_t cols,
            uintptr_t out, const Where& where) {
  const Launching on(where.first, where.second);
  const gpu::Format format = is_complex ? gpu::Format::kComplex : gpu::format_of(levels, codebook);
  require(gpu::repack(format, {device_pointer<const uint8_t>(codes), rows, cols, levels},
                      device_pointer<uint32_t>(out), on.queue.stream));
}

int64_t stored_words(int levels, bool codebook, int64_t rows, int64_t cols) {
  return gpu::stored_words(gpu::format_of(levels, codebook), rows, cols);
}

}  // namespace

void bind_cuda_matmul(py::module_& m) {
  py::class_<Matrix>(m, "Matrix")
      .def(py::init<uintptr_t, uintptr_t, int, uintptr_t, int64_t, int64_t, int, int64_t, int>())
      .def("set_parts", &Matrix::set_parts)
      .def("set_remainder", &Matrix::set_remainder)
      .def("dequantize", &Matrix::dequantize)
      .def("int8", &Matrix::int8);
  py::class_<Linear>(m, "Linear")
      .def(py::init<const Matrix&, uintptr_t, uintptr_t, int, uintptr_t, uintptr_t, int, bool,
                    bool>())
      .def("takes_many_rows", &Linear::takes_many_rows)
      .def("workspace", &Linear::workspace)
      .def("run", &Linear::run);
  py::class_<ComplexLinear>(m, "ComplexLinear")
      .def(py::init<uintptr_t, int64_t, int64_t, int, bool>())
      .def("workspace", &ComplexLinear::workspace)
      .def("run", &ComplexLinear::run);
  m.def("multiprocessors", [](int device) { return usable_device(device).multiprocessors; });
  m.def("clusters", &has_clusters);
  m.def("warpgroups", &has_warpgroups);
  m.def("large_blocks",
        [](int device) { return usable_device(device).shared_bytes >= cuda::kLargeBlock; });
  m.def("repack", &repack);
  m.def("stored_words", &stored_words);
}

}  // namespace pyrobust
