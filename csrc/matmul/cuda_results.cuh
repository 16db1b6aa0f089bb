// The end of a tile of the fused product: the sums of all its runs, added in the order of the
// columns, become results. In a cluster every thread block adds a share of them, read from the
// others' shared memory; without clusters the sums go through global memory, and whoever arrives
// last adds them all.
#pragma once

#include <cmath>

#include "matmul/cuda_multiply.cuh"

namespace pyrobust::matmul::gpu {

template <Format kFormat, class Act, class S>
struct Results {
  using Sums = float[S::kSums][S::kTiles][S::kEights][4];

  struct Share {
    int64_t tile;
    int runs;         // of the tile
    int first, step;  // vectors [first, first + step, ...) are this team's
    bool clusters;
  };

  PYROBUST_DEVICE int thread_of_team() { return static_cast<int>(threadIdx.x) % S::kTeam; }

  PYROBUST_DEVICE void store_sums(const Sums& sum, uint8_t* to, int thread) {
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const float* v =
          sum[i / (S::kTiles * S::kEights)][i / S::kEights % S::kTiles][i % S::kEights];
      cuda::store16(
          to + (i * S::kTeam + thread) * 16,
          {{bits_of_float(v[0]), bits_of_float(v[1]), bits_of_float(v[2]), bits_of_float(v[3])}});
    }
  }

  PYROBUST_DEVICE uint8_t* global_run(const LinearArguments& p, int64_t tile, int runs, int run) {
    return reinterpret_cast<uint8_t*>(p.partials) + (tile * runs + run) * S::kRunBytes;
  }

  // Vector i of run `run`.
  PYROBUST_DEVICE cuda::Words4 load_sums(const LinearArguments& p, const Share& share, int run,
                                         int i) {
    const int at = (i * S::kTeam + thread_of_team()) * 16;
    const uint8_t* own = cuda::shared_memory() + at;
    if (share.clusters) {  // a thread block alone is a cluster of one
      return cuda::load16_of_cluster(own + run % S::kTeams * S::kRunBytes, run / S::kTeams);
    }
    if (p.schedule.parts == 1) return cuda::load16(own + run * S::kRunBytes);
    return cuda::load16(global_run(p, share.tile, share.runs, run) + at);
  }

  PYROBUST_DEVICE void add_runs(const LinearArguments& p, const Share& share, int i,
                                float (&sum)[4]) {
    constexpr int kTogether = 8;  // loads under way
    for (int first = 0; first < share.runs; first += kTogether) {
      cuda::Words4 v[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < share.runs) v[k] = load_sums(p, share, first + k, i);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k >= share.runs) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += float_from_bits(v[k].word[j]);
      }
    }
  }

  // The remainder's part of row n of W, for rows `row` and `row` + 1 of x.
  PYROBUST_DEVICE void add_remainder(const LinearArguments& p, int64_t n, int64_t row,
                                     float (&extra)[2]) {
    const Remainder& s = p.remainder;
    const int64_t begin = s.offsets[n] < 0 ? 0 : s.offsets[n];
    const int64_t end = s.offsets[n + 1] > s.count ? s.count : s.offsets[n + 1];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = s.columns[i];
      if (k < 0 || k >= p.cols) continue;
      const float value = load_float(s.values, i, s.type);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (row + m >= p.count) continue;
        extra[m] = fmaf(value, load_float(p.x, (row + m) * p.cols + k, Act::kType), extra[m]);
      }
    }
  }

  // Results of row n of W and rows `row` and `row` + 1 of x.
  PYROBUST_DEVICE void store_row(const LinearArguments& p, int64_t n, int64_t row, int side,
                                 float first, float second) {
    const float sums[2] = {first, second};
    if constexpr (kFormat == Format::kComplex) {
      for (int m = 0; m < 2 && row + m < p.count; ++m) {
        p.sums[(side * p.count + row + m) * p.rows + n] = static_cast<int32_t>(0.5f * sums[m]);
      }
    } else {
      const float alpha = p.alpha != nullptr ? *p.alpha : 1.0f;
      const float factor = p.row_scale != nullptr ? alpha * p.row_scale[n] : alpha;
      const float bias = p.bias != nullptr ? p.bias[n] : 0.0f;
      float extra[2] = {};
      if (p.remainder.offsets != nullptr) add_remainder(p, n, row, extra);
      for (int m = 0; m < 2 && row + m < p.count; ++m) {
        store_float(p.out, (row + m) * p.rows + n, p.out_type,
                    fmaf(sums[m], factor, extra[m]) + bias);
      }
    }
  }

  // The first of two rows of x that vector i is of.
  PYROBUST_DEVICE int64_t row_of_vector(const WarpPlace& at, int i) {
    return i % S::kEights * 8 + 2 * (at.lane % 4);
  }

  // Of vector i: rows 16 r + g and 16 r + 8 + g of the strip, two rows of x.
  PYROBUST_DEVICE void store_vector(const LinearArguments& p, int64_t tile, const WarpPlace& at,
                                    int i, const float (&sum)[4]) {
    const int side = i / (S::kTiles * S::kEights);
    const int pair = 2 * (at.tile + i / S::kEights % S::kTiles);
    const int64_t row = row_of_vector(at, i);
    if (row >= p.count) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t n = (tile * S::kStrips + at.strip) * kStrip + pair_row(at.lane, pair + k);
      if (n < p.rows) store_row(p, n, row, side, sum[2 * k], sum[2 * k + 1]);
    }
  }

  PYROBUST_DEVICE void finish_vector(const LinearArguments& p, const Share& share,
                                     const WarpPlace& at, int i) {
    if (row_of_vector(at, i) >= p.count) return;
    float sum[4] = {};
    add_runs(p, share, i, sum);
    store_vector(p, share.tile, at, i, sum);
  }

  // All copies have landed and all teams are past their stages. `sum`: of this team's run.
  PYROBUST_DEVICE void finish(const LinearArguments& p, int64_t tile, int part, int team,
                              const WarpPlace& at, const Sums& sum) {
    const int parts = p.schedule.parts, runs = parts * S::kTeams;
    uint8_t* shared = cuda::shared_memory();
    Share share = {tile, runs, team, S::kTeams, cuda::clusters_exist(p.clusters)};
    if (share.clusters || parts == 1) {
      store_sums(sum, shared + team * S::kRunBytes, thread_of_team());
      cuda::sync_threads();
      if (parts > 1) {
        cuda::sync_cluster();
        // Thread blocks before teams, since a vector's sums come from all of the cluster's
        // memories.
        share.first = team * parts + part;
        share.step = runs;
      }
    } else {
      store_sums(sum, global_run(p, tile, runs, part * S::kTeams + team), thread_of_team());
      auto* ticket = reinterpret_cast<int32_t*>(shared + S::kTicketAt);
      if (cuda::arrive(p.arrivals + tile, ticket) != parts - 1) return;
    }
    for (int i = share.first; i < S::kVectors; i += share.step) finish_vector(p, share, at, i);
    if (share.clusters && parts > 1) cuda::sync_cluster();  // others read this block's sums
  }
};

}  // namespace pyrobust::matmul::gpu
