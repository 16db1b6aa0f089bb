// Launches of the interval kernels, and the constants of their proof.
#include "core/bit_layout.h"
#include "cuda/launch.h"
#include "interval/cuda.h"
#include "interval/cuda_constants.h"
#include "interval/cuda_prepare.cuh"
#include "interval/cuda_shared.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {
namespace {

// What float32 weights leave out, relative: their rest and W2 c_lo, W2 r_lo (cuda.h).
constexpr double kLeftOut = 3.2 / 65536.0;

// How the terms of a sum are shared out.
int64_t parts_of_sum(const LinearCall& call, int parts) {
  return call.shared_inputs ? int64_t{parts} * kTeams : kWarps;
}

Constants constants_for(const LinearCall& call, int parts) {
  const double delta = 3.0 * static_cast<double>(kStep) * kTensorUnit;
  const double gamma =
      rounding::gamma_bound(static_cast<double>(gpu_depth(call.terms, parts_of_sum(call, parts))));
  double own = kMagnitudes * ((1.0 + delta) * (1.0 + gamma) - 1.0);
  if (call.kind == WeightKind::kFloat32) own += kLeftOut;
  const bool packed = call.kind == WeightKind::kPacked || call.decoded;
  return constants_of({own, own}, call.terms, call.rounding, packed);
}

int64_t shared_blocks(const LinearCall& call) {
  return (call.rows + kSharedRows - 1) / kSharedRows *
         ((call.batch + kSharedInputs - 1) / kSharedInputs);
}

template <class Source>
cuda::Status launch_product(const Source& source, const LinearCall& call,
                            const Constants& constants, const uint16_t* operands,
                            const float* offsets, int parts, const cuda::Queue& queue) {
  const ProductWork<Source> work = {source,         operands,       offsets,    call.bias,
                                    call.batch,     call.rows,      call.terms, constants,
                                    call.out_lower, call.out_upper, parts};
  if (call.shared_inputs) {
    const cuda::LaunchShape shape = {static_cast<unsigned>(shared_blocks(call) * parts), 1,
                                     kSharedThreads, kSharedBytes, static_cast<unsigned>(parts)};
    return cuda::launch(shared_kernel<Source>, shape, queue.stream, work);
  }
  constexpr int64_t kRows = 16 * kRowTiles;
  const int64_t groups = operand_shape(work.batch, work.terms).batch / kColumns;
  const cuda::LaunchShape shape = {static_cast<unsigned>((work.rows + kRows - 1) / kRows * groups),
                                   1, kProductThreads, kProductShared};
  return cuda::launch(product_kernel<Source>, shape, queue.stream, work);
}

template <int kBits>
PackedSource<kBits> packed_source(const matmul::PackedMatrix& weight) {
  const bool whole_rows = weight.group_size >= weight.cols;
  return {weight.codes,
          packed_row_bytes(weight.cols, weight.levels),
          weight.scale,
          weight.scale_type,
          weight.zero,
          whole_rows ? 1 : weight.cols / weight.group_size + (weight.cols % weight.group_size != 0),
          whole_rows ? weight.cols / kStep : weight.group_size / kStep};
}

bool aligned(const void* pointer, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
}

cuda::Status launch_any(const LinearCall& call, const Constants& constants,
                        const uint16_t* operands, const float* offsets, int parts,
                        const cuda::Queue& queue) {
  const auto with = [&](const auto& source) {
    return launch_product(source, call, constants, operands, offsets, parts, queue);
  };
  if (call.kind == WeightKind::kFloat32) {
    return with(Float32Source{static_cast<const float*>(call.dense), call.terms,
                              aligned(call.dense, call.terms * 4)});
  }
  if (call.kind == WeightKind::kBFloat16) {
    return with(BFloat16Source{static_cast<const uint16_t*>(call.dense), call.terms,
                               aligned(call.dense, call.terms * 2)});
  }
  switch (code_bits(call.packed.levels)) {
    case 1:
      return with(packed_source<1>(call.packed));
    case 2:
      return with(packed_source<2>(call.packed));
    case 3:
      return with(packed_source<3>(call.packed));
    case 4:
      return with(packed_source<4>(call.packed));
    default:
      return with(packed_source<8>(call.packed));
  }
}

}  // namespace

bool packed_fits(const matmul::PackedMatrix& weight) {
  const bool groups_fit = weight.group_size % kStep == 0 || weight.group_size >= weight.cols;
  return weight.group_dim == 1 && weight.cols > 0 && weight.cols % kStep == 0 && groups_fit &&
         code_bits(weight.levels) > 0 && weight.codebook == nullptr &&
         weight.row_scale == nullptr && weight.remainder.offsets == nullptr &&
         reinterpret_cast<uintptr_t>(weight.codes) % 16 == 0;
}

int64_t scratch_bytes(int64_t batch, int64_t terms) {
  const Shape shape = operand_shape(batch, terms);
  return shape.batch * (shape.terms * kPlanes * 2 + 4);
}

cuda::Status interval_linear(const LinearCall& call, const cuda::Queue& queue) {
  if (call.batch == 0 || call.rows == 0) return 0;
  const bool many = call.shared_inputs && call.clusters;
  const int parts = many ? shared_parts(shared_blocks(call), queue.multiprocessors, call.terms) : 1;
  const Constants constants = constants_for(call, parts);
  const Shape shape = operand_shape(call.batch, call.terms);
  auto* operands = static_cast<uint16_t*>(call.scratch);
  auto* offsets = reinterpret_cast<float*>(operands + kPlanes * shape.batch * shape.terms);
  const int order = call.kind == WeightKind::kPacked    ? code_bits(call.packed.levels)
                    : call.kind == WeightKind::kFloat32 ? kFloat32Order
                                                        : kBFloat16Order;
  const PrepareWork prepare = {call.lower, call.upper, call.batch, call.terms, order,
                               call.int8,  constants,  operands,   offsets};
  const cuda::Status status =
      cuda::launch(prepare_kernel, {static_cast<unsigned>(shape.batch), 1, kPrepareThreads, 128},
                   queue.stream, prepare);
  if (status != 0) return status;
  return launch_any(call, constants, operands, offsets, parts, queue);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
