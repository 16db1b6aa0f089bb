// The fused product of few activations with a packed weight on tensor cores: y = x W^T + bias for
// at most 32 rows of x at a time. Differs from portable.cpp in arithmetic: codes become halves
// exactly, products of halves are summed in float32, and scales multiply
//
//     group_dim 1   the float32 sums of a group: no weight is rounded
//     group_dim 0   the weights: each is rounded once to the type of x
//
// A warp multiplies a strip of 64 rows of W; W is the 16-row side of the tensor core product, so
// that 8 rows of x cost half of what 16 do. The columns of a team of warps come block after block
// through its own ring of stages in shared memory (cuda_stage.cuh), filled by asynchronous copies;
// the codes of a lane are read by that lane alone, without a dequantized copy in shared memory. The
// warps of a team share its rows of x and wait for each other at every stage, teams never do. Above
// 16 rows of x a team is two warps: with a warp alone, 16 rows of x came from the second cache at
// as many bytes as codes of 4 bits. How teams and thread blocks share W: cuda_layout.h; how their
// sums meet: cuda_results.cuh.
#pragma once

#include "matmul/cuda_results.cuh"

namespace pyrobust::matmul::gpu {

// kLate copies too many may be under way when a stage is read: 0, or a fault for tests to find.
template <Format kFormat, class Act, int kRows, int kGroupDim, int kLate = 0>
struct Linear {
  using S = Shape<kFormat, kRows>;
  using M = Multiplier<kFormat, Act, S, kGroupDim>;
  using R = Results<kFormat, Act, S>;

  PYROBUST_DEVICE WarpPlace place() {
    const int warp = static_cast<int>(threadIdx.x) % S::kTeam / kLanes;
    return {static_cast<int>(threadIdx.x) % kLanes, warp, 0, 0};
  }

  PYROBUST_DEVICE void run(const LinearArguments& p) {
    const int tile = static_cast<int>(blockIdx.x >> p.schedule.parts_log2);
    const int part = static_cast<int>(blockIdx.x) & (p.schedule.parts - 1);
    const int team = static_cast<int>(threadIdx.x) / S::kTeam;
    const int first = first_of_run(p.schedule, part * S::kTeams + team);
    const int last = last_of_run(p.schedule, part * S::kTeams + team), count = last - first;

    const uint32_t* table = M::make_table(p, cuda::shared_memory());
    if (kFormat == Format::kCodebook) cuda::sync_threads();
    const cuda::SharedPlace stages =
        cuda::shared_place(cuda::shared_memory()) + team * S::kStages * S::kStageBytes;
    const WarpPlace at = place();
    Loader<kFormat, kRows, kGroupDim> loader;
    loader.begin(p, at, tile, first, last);
    Unit now = loader.unit;
    // Weights are there before the grid ahead has ended; x may be its result.
    auto ahead = loader;
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (i < count) ahead.load_weights(p, at, stages + i * S::kStageBytes);
      ahead.advance(p);
    }
    cuda::begin_next_grid();
    cuda::await_grid();
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (i < count) loader.load_activations(p, stages + i * S::kStageBytes);
      loader.advance(p);
      cuda::commit_copies();
    }
    typename M::Sums sum;
    typename M::Part part_of_group;
    M::clear(sum);
    M::clear(part_of_group);
    uint32_t offset[8];
    M::set_offsets(kGroupDim == 0 && p.zero != nullptr ? 0.0f : p.symmetric_zero, offset);
    bool begins = true;
    uint32_t stage = 0, free = (S::kStages - 1) * S::kStageBytes;  // bytes from `stages`
    for (int i = 0; i < count; ++i) {
      cuda::wait_copies<S::kStages - 2 + kLate>();
      if constexpr (S::kTeam == kLanes) {
        cuda::sync_warp();
      } else {
        cuda::sync_group<S::kTeam>(team);
      }
      if (i + S::kStages - 1 < count) loader.load(p, at, stages + free);
      loader.advance(p);
      cuda::commit_copies();
      const bool ends = now.advance(p);
      if (!loader.idle) {
        M::multiply(p, stages + stage, at, begins, ends, table, offset, part_of_group, sum);
      }
      begins = ends;
      free = stage;
      stage = stage == (S::kStages - 1) * S::kStageBytes ? 0 : stage + S::kStageBytes;
    }
    cuda::wait_copies<0>();
    cuda::sync_threads();
    M::complete(kGroupDim == 1 ? sum : part_of_group.sum);
    R::finish(p, tile, part, team, at, kGroupDim == 1 ? sum : part_of_group.sum);
  }
};

template <Format kFormat, class Act, int kRows, int kGroupDim, int kLate = 0>
PYROBUST_KERNEL_OF((Shape<kFormat, kRows>::kThreads), (Shape<kFormat, kRows>::kRegistersFor))
packed_linear_kernel(const __grid_constant__ LinearArguments p) {
  Linear<kFormat, Act, kRows, kGroupDim, kLate>::run(p);
}

// --- launching ----------------------------------------------------------------------------------

template <Format kFormat, class Act, int kRows, int kGroupDim>
cuda::Status start(const LinearArguments& p, cuda::Stream stream) {
  return cuda::launch(packed_linear_kernel<kFormat, Act, kRows, kGroupDim>,
                      launch_shape<Shape<kFormat, kRows>>(p), stream, p);
}

// Rows [first, first + kMostWarpRows) of x, with tickets of their own; launches without clusters
// follow each other, so that they may share the memory of partial sums.
inline LinearArguments rows_from(const LinearArguments& p, int64_t first) {
  const int64_t out_bytes = p.out_type == FloatType::kFloat32 ? 4 : 2;
  LinearArguments part = p;
  part.x = static_cast<const uint16_t*>(p.x) + first * p.cols;
  part.out = static_cast<uint8_t*>(p.out) + first * p.rows * out_bytes;
  part.count = p.count - first < kMostWarpRows ? p.count - first : kMostWarpRows;
  if (p.arrivals != nullptr) part.arrivals = p.arrivals + first / kMostWarpRows * p.schedule.tiles;
  return part;
}

template <Format kFormat, class Act, int kGroupDim>
cuda::Status start_rows(const LinearArguments& p, cuda::Stream stream) {
  switch (instance_rows(kFormat, kGroupDim, p.count)) {
    case 8:
      if constexpr (instance_rows(kFormat, kGroupDim, 8) == 8) {
        return start<kFormat, Act, 8, kGroupDim>(p, stream);
      }
      break;
    case 16:
      return start<kFormat, Act, 16, kGroupDim>(p, stream);
  }
  if constexpr (instance_rows(kFormat, kGroupDim, kMostWarpRows) == kMostWarpRows) {
    for (int64_t first = 0; first < p.count; first += kMostWarpRows) {
      const LinearArguments part = rows_from(p, first);
      const cuda::Status status = start<kFormat, Act, kMostWarpRows, kGroupDim>(part, stream);
      if (status != 0) return status;
    }
  }
  return 0;
}

// The instances of one width: two types of x, two directions of groups, one or three sizes of M.
template <Format kFormat>
cuda::Status start_format(const LinearArguments& p, cuda::Stream stream) {
  if (p.x_type == FloatType::kFloat16) {
    return p.group_dim == 1 ? start_rows<kFormat, Float16, 1>(p, stream)
                            : start_rows<kFormat, Float16, 0>(p, stream);
  }
  return p.group_dim == 1 ? start_rows<kFormat, BFloat16, 1>(p, stream)
                          : start_rows<kFormat, BFloat16, 0>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
