// Launches of the interval kernels, and the constants of their proof.
#include "core/bit_layout.h"
#include "interval/cuda.h"
#include "interval/cuda_constants.h"
#include "interval/cuda_prepare.h"
#include "interval/cuda_product_launch.cuh"
#include "interval/cuda_wide.h"

namespace pyrobust {
namespace interval {
namespace gpu {
namespace {

// What float32 weights leave out, relative: their rest and W2 c_lo, W2 r_lo (cuda.h).
constexpr double kLeftOut = 3.2 / 65536.0;

Constants constants_with(const LinearCall& call, double centre, double radius) {
  return constants_of({centre, radius}, call.terms, call.rounding, bounds_packed(call));
}

Constants constants_for(const LinearCall& call, int parts) {
  const double delta = 3.0 * static_cast<double>(kStep / kHalves) * kTensorUnit;
  const double gamma = rounding::gamma_bound(static_cast<double>(gpu_depth(call.terms, parts)));
  double own = kMagnitudes * ((1.0 + delta) * (1.0 + gamma) - 1.0);
  if (call.kind == WeightKind::kFloat32) own += kLeftOut;
  return constants_with(call, own, own);
}

// Two products of a term in the centre's accumulators, one in the radius's, which are those of a
// stage, but for the radius under dense weights: those of all stages of a part.
Constants wide_constants(const LinearCall& call, int parts) {
  const bool dense = call.kind != WeightKind::kPacked;
  const double terms = static_cast<double>(kImageTerms * wide_images(dense));
  const int64_t units = padded(call.terms, kStep) / (kImageTerms * wide_images(dense));
  const double stages = static_cast<double>((units + parts - 1) / parts);
  const double gamma = rounding::gamma_bound(2.0 * stages + static_cast<double>(parts) + 2.0);
  const double of_centre = 2.0 * terms * kTensorUnit;
  const double of_radius = terms * (dense ? stages : 1.0) * kTensorUnit;
  return constants_with(call, kMagnitudes * ((1.0 + of_centre) * (1.0 + gamma) - 1.0),
                        (1.0 + of_radius) * (1.0 + gamma) - 1.0);
}

cuda::Status launch_any(const LinearCall& call, const Plan& plan, const cuda::Queue& queue) {
  if (call.kind == WeightKind::kFloat32) {
    const Float32Source source = float32_source(call);
    return tiles_for(call.batch) == 1 ? launch_product<1>(source, call, plan, queue)
                                      : launch_product<2>(source, call, plan, queue);
  }
  if (call.kind == WeightKind::kBFloat16 && tiles_for(call.batch) == 1) {
    return launch_product<1>(bfloat16_source(call), call, plan, queue);
  }
  return launch_other_product(call, plan, queue);
}

}  // namespace

bool packed_fits(const matmul::PackedMatrix& weight) {
  const bool groups_fit = weight.group_size % kStep == 0 || weight.group_size >= weight.cols;
  return weight.group_dim == 1 && weight.cols > 0 && weight.cols % kStep == 0 && groups_fit &&
         code_bits(weight.levels) > 0 && weight.codebook == nullptr &&
         weight.row_scale == nullptr && weight.remainder.offsets == nullptr &&
         reinterpret_cast<uintptr_t>(weight.codes) % 16 == 0;
}

namespace {

bool is_wide(const LinearCall& call) {
  const bool few = call.kind == WeightKind::kBFloat16 && call.batch < kLeastWide;
  return call.warpgroups && call.kind != WeightKind::kFloat32 && !few;
}

// Bytes of the images and of what follows them.
struct WideSizes {
  int64_t images, offsets, partials, counters;
};
WideSizes wide_sizes(const LinearCall& call, const WidePlan& plan) {
  return {
      padded(call.batch, image_inputs(call.batch)) * padded(call.terms, kStep) * kImagePlanes * 2,
      padded(call.batch * 4, 16), wide_partial_bytes(call, plan), plan.outputs * 4};
}

cuda::Status linear_of_warpgroups(const LinearCall& call, const cuda::Queue& queue) {
  const WidePlan plan = wide_plan(call, queue.multiprocessors);
  const WideSizes sizes = wide_sizes(call, plan);
  auto* bytes = static_cast<uint8_t*>(call.scratch);
  uint8_t* offsets = bytes + sizes.images;
  uint8_t* partials = offsets + sizes.offsets;
  const WideScratch scratch = {
      reinterpret_cast<uint16_t*>(bytes), reinterpret_cast<float*>(offsets),
      reinterpret_cast<int32_t*>(partials + sizes.partials), reinterpret_cast<float*>(partials)};
  const Constants constants = wide_constants(call, plan.parts);
  // Parts are several only where outputs are at most half as many as multiprocessors.
  const int counters = plan.parts > 1 ? static_cast<int>(plan.outputs) : 0;
  const cuda::Status status =
      launch_prepare(call, order_of(call), constants,
                     {scratch.images, true, scratch.offsets, scratch.counters, counters}, queue);
  return status != 0 ? status : wide_linear(call, constants, scratch, plan, queue);
}

}  // namespace

int64_t scratch_bytes(const LinearCall& call, int multiprocessors) {
  if (call.batch == 0 || call.rows == 0) return 0;
  if (!is_wide(call)) {
    const Shape shape = operand_shape(call.batch, call.terms);
    return shape.batch * (shape.terms * kPlanes * 2 + 4);
  }
  const WideSizes sizes = wide_sizes(call, wide_plan(call, multiprocessors));
  return sizes.images + sizes.offsets + sizes.partials + sizes.counters;
}

cuda::Status interval_linear(const LinearCall& call, const cuda::Queue& queue) {
  if (call.batch == 0 || call.rows == 0) return 0;
  if (is_wide(call)) return linear_of_warpgroups(call, queue);
  const Shape shape = operand_shape(call.batch, call.terms);
  Plan plan;
  plan.parts =
      call.clusters ? shared_parts(product_blocks(call), queue.multiprocessors, call.terms) : 1;
  plan.constants = constants_for(call, plan.parts);
  plan.operands = static_cast<uint16_t*>(call.scratch);
  plan.offsets = reinterpret_cast<float*>(plan.operands + kPlanes * shape.batch * shape.terms);
  const cuda::Status status =
      launch_prepare(call, order_of(call), plan.constants,
                     {plan.operands, false, plan.offsets, nullptr, 0}, queue);
  return status != 0 ? status : launch_any(call, plan, queue);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
