// The interval products with planted faults (Fault of cuda_product.cuh), after their preparation.
#include <pybind11/stl.h>

#include <array>

#include "bindings/cuda_queue.h"
#include "cuda/launch.h"
#include "interval/cuda_constants.h"
#include "interval/cuda_prepare.h"
#include "interval/cuda_product_launch.cuh"
#include "interval/cuda_wide.cuh"
#include "shim.h"

namespace pyrobust {
namespace {

using namespace interval;
using namespace interval::gpu;

// lower, upper, weight (bfloat16), out_lower, out_upper, scratch.
using Pointers = std::array<uintptr_t, 6>;

LinearCall call_of(const Pointers& pointers, const std::array<int64_t, 3>& sizes) {
  LinearCall call{};
  call.lower = device_pointer<const float>(pointers[0]);
  call.upper = device_pointer<const float>(pointers[1]);
  call.kind = WeightKind::kBFloat16;
  call.dense = device_pointer<const void>(pointers[2]);
  call.batch = sizes[0], call.rows = sizes[1], call.terms = sizes[2];
  call.rounding = Rounding::kReal;
  call.out_lower = device_pointer<float>(pointers[3]);
  call.out_upper = device_pointer<float>(pointers[4]);
  call.scratch = device_pointer<void>(pointers[5]);
  return call;
}

Plan plan_of(const LinearCall& call, int64_t operands) {
  auto* scratch = static_cast<uint16_t*>(call.scratch);
  // Whatever errors the constants stand for: results are compared with each other.
  return {constants_of({1e-3, 1e-3}, call.terms, call.rounding, false), scratch,
          reinterpret_cast<float*>(scratch + operands), 1};
}

template <int kFault>
void run_product(const LinearCall& call, const Plan& plan) {
  using S = ProductShape<BFloat16Source, 1>;
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(product_blocks(call));
  shape.threads = kProductThreads;
  shape.shared_bytes = S::kShared;
  shape.overlaps = true;
  cuda::launch(product_kernel<BFloat16Source, 1, kFault>, shape, 0,
               product_work(bfloat16_source(call), call, plan));
}

// At most eight inputs.
void interval_product_faulty(const Pointers& pointers, const std::array<int64_t, 3>& sizes,
                             int fault) {
  const LinearCall call = call_of(pointers, sizes);
  const Shape padded_shape = operand_shape(call.batch, call.terms);
  const Plan plan = plan_of(call, kPlanes * padded_shape.batch * padded_shape.terms);
  launch_prepare(call, order_of(call), plan.constants,
                 {plan.operands, false, plan.offsets, nullptr, 0}, {0, 1});
  const auto run = fault == kLateCopies    ? run_product<kLateCopies>
                   : fault == kEarlyInputs ? run_product<kEarlyInputs>
                                           : run_product<kNoFault>;
  run(call, plan);
}

template <int kFault>
void run_wide_product(const LinearCall& call, const Plan& plan) {
  using S = WideShape<BFloat16Source, 2>;
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(wide_plan(call, 1).outputs);
  shape.threads = S::kThreads;
  shape.shared_bytes = S::kShared;
  shape.overlaps = true;
  const WideWork<BFloat16Source> work = {product_work(bfloat16_source(call), call, plan), nullptr,
                                         nullptr};
  cuda::launch(wide_kernel<BFloat16Source, 2, kFault>, shape, 0, work);
}

// 9 to 16 inputs, by warpgroups.
void interval_wide_faulty(const Pointers& pointers, const std::array<int64_t, 3>& sizes,
                          int fault) {
  const LinearCall call = call_of(pointers, sizes);
  const int64_t inputs = padded(call.batch, image_inputs(call.batch));
  const Plan plan = plan_of(call, kImagePlanes * inputs * padded(call.terms, kStep));
  launch_prepare(call, order_of(call), plan.constants,
                 {plan.operands, true, plan.offsets, nullptr, 0}, {0, 1});
  const auto run = fault == kLateCopies    ? run_wide_product<kLateCopies>
                   : fault == kEarlyInputs ? run_wide_product<kEarlyInputs>
                   : fault == kNoFence     ? run_wide_product<kNoFence>
                                           : run_wide_product<kNoFault>;
  run(call, plan);
}

}  // namespace

void bind_interval_fault(pybind11::module_& m) {
  m.def("interval_product_faulty", &interval_product_faulty);
  m.def("interval_wide_faulty", &interval_wide_faulty);
}

}  // namespace pyrobust
