// The fused products with planted faults: a stage is read while its copies may be under way, and
// those of cuda_few.cuh.
#include "bindings/cuda_matmul.h"
#include "matmul/cuda_broad.cuh"
#include "matmul/cuda_few.cuh"
#include "matmul/cuda_linear.cuh"
#include "matmul/cuda_wide.cuh"
#include "shim.h"

namespace pyrobust {
namespace {

using namespace matmul::gpu;

template <int kLate>
void run(const LinearArguments& p) {
  cuda::launch(packed_linear_kernel<Format::k4, Float16, 8, 1, kLate>,
               launch_shape<Shape<Format::k4, 8>>(p), 0, p);
}

// At most 8 rows of float16 x, 4 bits; `late` 0 is the kernel as it is.
void linear_4_late(const cuda_matmul::Linear& weight, uintptr_t x, int64_t count, uintptr_t out,
                   uintptr_t partials, uintptr_t arrivals, int late) {
  LinearArguments p = weight.for_rows(count, static_cast<int>(FloatType::kFloat16), false);
  p.x = device_pointer<const void>(x);
  p.out = device_pointer<void>(out);
  p.partials = device_pointer<float>(partials);
  p.arrivals = device_pointer<int32_t>(arrivals);
  late == 0 ? run<0>(p) : run<1>(p);
}

template <int kLate>
void run_broad(const LinearArguments& p) {
  cuda::LaunchShape shape = launch_shape<BroadShape<Format::k4>>(p);
  shape.blocks_y = static_cast<unsigned>(divide_up(p.count, kBroadRows));
  cuda::launch(broad_linear_kernel<Format::k4, Float16, kLate>, shape, 0, p);
}

// More than 64 rows of float16 x, 4 bits.
void broad_4_late(const cuda_matmul::Linear& weight, uintptr_t x, int64_t count, uintptr_t out,
                  int late) {
  LinearArguments p = weight.for_rows(count, static_cast<int>(FloatType::kFloat16), true);
  p.x = device_pointer<const void>(x);
  p.out = device_pointer<void>(out);
  late == 0 ? run_broad<0>(p) : run_broad<1>(p);
}

// 33 to 64 rows of float16 x, 4 bits, groups of a multiple of 128.
void wide_4_late(const cuda_matmul::Linear& weight, uintptr_t x, int64_t count, uintptr_t out,
                 int late) {
  LinearArguments p = weight.for_rows(count, static_cast<int>(FloatType::kFloat16), false);
  p.x = device_pointer<const void>(x);
  p.out = device_pointer<void>(out);
  const auto kernel = late == 0 ? wide_linear_kernel<Format::k4, Float16, 0>
                                : wide_linear_kernel<Format::k4, Float16, 1>;
  cuda::launch(kernel, launch_shape<WideShape<Format::k4>>(p), 0, p);
}

// At most 16 rows of bfloat16 x, 4 bits, groups of a multiple of 128.
void few_4_faulty(const cuda_matmul::Linear& weight, uintptr_t x, int64_t count, uintptr_t out,
                  int fault) {
  LinearArguments p = weight.for_rows(count, static_cast<int>(FloatType::kBFloat16), false);
  p.x = device_pointer<const void>(x);
  p.out_type = FloatType::kBFloat16;
  p.out = device_pointer<void>(out);
  const auto start = fault == 0   ? start_few<Format::k4, BFloat16, 16>
                     : fault == 1 ? start_few<Format::k4, BFloat16, 16, 1>
                     : fault == 2 ? start_few<Format::k4, BFloat16, 16, 2>
                                  : start_few<Format::k4, BFloat16, 16, 3>;
  start(p, 0);
}

}  // namespace

void bind_matmul_fault(pybind11::module_& m) {
  m.def("linear_4_late", &linear_4_late);
  m.def("broad_4_late", &broad_4_late);
  m.def("wide_4_late", &wide_4_late);
  m.def("few_4_faulty", &few_4_faulty);
}

}  // namespace pyrobust
