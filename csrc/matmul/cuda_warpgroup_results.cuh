// The end of a tile of the products of warpgroups: the sums of all its runs meet through the shared
// memory of a cluster, added in the order of the columns, and leave as results in whole sectors of
// memory. Every team of every thread block of the cluster has a share of the rows of x.
#pragma once

#include "matmul/cuda_results.cuh"

namespace pyrobust::matmul::gpu {

// Of S beyond what Results wants: at.tile and at.strip name a warp's first tile, at.half the tile
// of rows of x; kPatchAt is where patches of the warps may lie, beyond the sums.
template <Format kFormat, class Act, class S>
struct WarpgroupResults {
  using R = Results<kFormat, Act, S>;
  using Sums = typename R::Sums;
  static constexpr int kRows = S::kTiles * 16;  // of W, of a warp
  static constexpr int kEightsTogether = 2;     // of x, whose sums are added at a time
  static constexpr int kPatchRows = 8 * kEightsTogether;
  static constexpr int kPitch = kRows * 4 + 16;  // bytes between rows of x; no bank twice
  static constexpr int kPatchBytes = kPatchRows * kPitch;
  static constexpr int kMostRuns = 2 * S::kTeams;  // a cluster is at most two thread blocks
  static_assert(S::kEights % (kMostRuns * kEightsTogether) == 0, "shares are alike");
  static_assert(S::kPatchAt >= S::kTeams * S::kRunBytes, "patches lie beyond the sums");
  static_assert(S::kPatchAt + S::kThreads / kLanes * kPatchBytes <= S::kTicketAt, "no room");

  // What becomes of the sums of the two rows of each of the warp's tiles.
  struct Row {
    float factor, bias;
  };
  using Rows = Row[S::kTiles][2];

  PYROBUST_DEVICE int64_t first_row(int64_t tile, const WarpPlace& at) {
    return (tile * S::kStrips + at.strip) * kStrip + at.tile * 16;
  }

  PYROBUST_DEVICE void load_rows(const LinearArguments& p, int64_t first, const WarpPlace& at,
                                 Rows& rows) {
    const float alpha = p.alpha != nullptr ? *p.alpha : 1.0f;
#pragma unroll
    for (int i = 0; i < 2 * S::kTiles; ++i) {
      const int64_t n = first + 8 * i + at.lane / 4;
      const bool exists = n < p.rows;
      rows[i / 2][i % 2] = {
          exists && p.row_scale != nullptr ? alpha * p.row_scale[n] : alpha,
          exists && p.bias != nullptr ? p.bias[n] : 0.0f,
      };
    }
  }

  using Eights = float[kEightsTogether][S::kTiles][4];

  // Of eights of x m, m + runs, ...
  PYROBUST_DEVICE void add_runs(int runs, int m, Eights& sum) {
    const uint8_t* own = cuda::shared_memory() + R::thread_of_team() * 16;
#pragma unroll
    for (int i = 0; i < kEightsTogether * S::kTiles * 4; ++i) {
      sum[i / 4 / S::kTiles][i / 4 % S::kTiles][i % 4] = 0.0f;
    }
#pragma unroll 2
    for (int run = 0; run < runs; ++run) {
      const uint8_t* from = own + run % S::kTeams * S::kRunBytes;
      cuda::Words4 v[kEightsTogether * S::kTiles];
#pragma unroll
      for (int i = 0; i < kEightsTogether * S::kTiles; ++i) {
        const int vector = i % S::kTiles * S::kEights + m + i / S::kTiles * runs;
        v[i] = cuda::load16_of_cluster(from + vector * S::kTeam * 16, run / S::kTeams);
      }
#pragma unroll
      for (int i = 0; i < kEightsTogether * S::kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i / S::kTiles][i % S::kTiles][j] += float_from_bits(v[i].word[j]);
        }
      }
    }
  }

  PYROBUST_DEVICE void store_value(uint8_t* to, int column, FloatType type, float value) {
    if (type == FloatType::kFloat32) {
      reinterpret_cast<float*>(to)[column] = value;
    } else {
      reinterpret_cast<uint16_t*>(to)[column] =
          static_cast<uint16_t>(type == FloatType::kFloat16 ? cuda::pack_f16x2(value, value)
                                                            : cuda::pack_bf16x2(value, value));
    }
  }

  // Of eight `e`: rows `row` and `row` + 1 of x, into the warp's patch.
  PYROBUST_DEVICE void place(const LinearArguments& p, int64_t first, int64_t row, int e,
                             const WarpPlace& at, const Rows& rows, const Eights& sum,
                             uint8_t* patch) {
    uint8_t* to = patch + (8 * e + 2 * (at.lane % 4)) * kPitch;
#pragma unroll
    for (int i = 0; i < 2 * S::kTiles; ++i) {
      const int column = 8 * i + at.lane / 4;
      float extra[2] = {};
      if (p.remainder.offsets != nullptr && first + column < p.rows) {
        R::add_remainder(p, first + column, row, extra);
      }
      const Row& of = rows[i / 2][i % 2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = fmaf(sum[e][i / 2][i % 2 * 2 + j], of.factor, extra[j]) + of.bias;
        store_value(to + j * kPitch, column, p.out_type, value);
      }
    }
  }

  // The warp's patch to memory: kPatchRows rows of x, of which eight follow one another from row
  // `row` on and the next `apart` eights later.
  PYROBUST_DEVICE void store_patch(const LinearArguments& p, int64_t first, int64_t row,
                                   int64_t apart, int lane, const uint8_t* patch) {
    const int bytes = p.out_type == FloatType::kFloat32 ? 4 : 2;
    const int chunks = kRows * bytes / 16, each = 16 / bytes;  // of a row; numbers of a chunk
    const bool whole = p.rows % each == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    for (int i = lane; i < kPatchRows * chunks; i += kLanes) {
      const int within = i / chunks, chunk = i % chunks;
      const int64_t m = row + within / 8 * apart * 8 + within % 8, n = first + chunk * each;
      if (m >= p.count || n >= p.rows) continue;
      const uint8_t* from = patch + within * kPitch + chunk * 16;
      auto* to = static_cast<uint8_t*>(p.out) + (m * p.rows + n) * bytes;
      if (whole) {
        cuda::store16(to, cuda::load16(from));
        continue;
      }
      const int count = p.rows - n < each ? static_cast<int>(p.rows - n) : each;
      for (int j = 0; j < count; ++j) {
        if (bytes == 4) reinterpret_cast<float*>(to)[j] = reinterpret_cast<const float*>(from)[j];
        if (bytes == 2) {
          reinterpret_cast<uint16_t*>(to)[j] = reinterpret_cast<const uint16_t*>(from)[j];
        }
      }
    }
  }

  // All copies have landed and all teams are past their stages. `sum`: of this team's run.
  PYROBUST_DEVICE void finish(const LinearArguments& p, int64_t tile, int part, int team,
                              const WarpPlace& at, const Sums& sum) {
    const int parts = p.schedule.parts, runs = parts * S::kTeams;
    uint8_t* shared = cuda::shared_memory();
    const int64_t first = first_row(tile, at);
    Rows rows;
    load_rows(p, first, at, rows);
    R::store_sums(sum, shared + team * S::kRunBytes, R::thread_of_team());
    parts > 1 ? cuda::sync_cluster() : cuda::sync_threads();
    uint8_t* patch = shared + S::kPatchAt + static_cast<int>(threadIdx.x) / kLanes * kPatchBytes;
    const int64_t eights = (p.count + 7) / 8 - at.half * S::kEights;
#pragma unroll 1
    for (int m = part * S::kTeams + team; m < S::kEights; m += runs * kEightsTogether) {
      if (m >= eights) break;
      Eights of_share;
      add_runs(runs, m, of_share);
      const int64_t row = (at.half * S::kEights + m) * 8;
#pragma unroll
      for (int e = 0; e < kEightsTogether; ++e) {
        place(p, first, row + 8 * e * runs + 2 * (at.lane % 4), e, at, rows, of_share, patch);
      }
      cuda::sync_warp();
      store_patch(p, first, row, runs, at.lane, patch);
      cuda::sync_warp();
    }
    if (parts > 1) cuda::sync_cluster();  // others read this block's sums
  }
};

}  // namespace pyrobust::matmul::gpu
