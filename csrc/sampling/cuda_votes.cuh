// Votes: arg-max of every row of logits, its histogram and the first row with a NaN, in one pass.
#pragma once

#include "cuda/primitives.h"
#include "sampling/cuda.h"
#include "sampling/cuda_items.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

constexpr int kVoteThreads = 256;
constexpr int64_t kSharedClasses =
    8192;  // histograms up to this size are gathered in shared memory

struct VoteWork {
  CountCall call;
  VoteStretches stretches;
};

// What a part of a row knows: NaN is above everything, then the larger value, then the lower class.
struct Best {
  float value;
  int64_t index;
  bool nan;
};

PYROBUST_HD bool better(const Best& a, const Best& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

PYROBUST_HD void take(Best* best, float value, int64_t index) {
  if (value != value) best->nan = true;
  const Best seen = {value, index, false};
  if (best->index < 0 || better(seen, *best)) {
    best->value = value;
    best->index = index;
  }
}

// Classes k, k + step, ... of the row at `row`: several loads under way together.
constexpr int kVoteLoads = 8;
PYROBUST_DEVICE void take_some(const CountCall& call, int64_t row, int64_t k, int step,
                               Best* best) {
  float value[kVoteLoads];
#pragma unroll
  for (int i = 0; i < kVoteLoads; ++i) {
    const int64_t at = k + int64_t{i} * step;
    value[i] = at < call.classes ? load_float(call.logits, row + at, call.type) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kVoteLoads; ++i) {
    const int64_t at = k + int64_t{i} * step;
    if (at < call.classes) take(best, value[i], at);
  }
}

// Over the lanes that share a row, in each of them.
PYROBUST_DEVICE Best best_of_row(Best best, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const Best other = {cuda::shuffle_xor(best.value, mask), cuda::shuffle_xor(best.index, mask),
                        cuda::shuffle_xor(best.nan ? 1 : 0, mask) != 0};
    best.nan = best.nan || other.nan;
    if (other.index >= 0 && (best.index < 0 || better(other, best))) {
      best.value = other.value;
      best.index = other.index;
    }
  }
  return best;
}

PYROBUST_DEVICE void flush_histogram(int32_t* shared, int64_t classes, int64_t* counts) {
  cuda::sync_threads();
  for (int64_t k = threadIdx.x; k < classes; k += kVoteThreads) {
    if (shared[k] != 0) cuda::atomic_add(counts + k, static_cast<int64_t>(shared[k]));
  }
}

PYROBUST_KERNEL(kVoteThreads) vote_kernel(const __grid_constant__ VoteWork work) {
  auto* shared = reinterpret_cast<int32_t*>(cuda::shared_memory());
  const CountCall& call = work.call;
  const bool gather = call.classes <= kSharedClasses;
  const VoteStretch stretch = vote_stretch(work.stretches, blockIdx.x);
  int64_t* counts = call.counts + stretch.histogram * call.classes;
  for (int64_t k = threadIdx.x; gather && k < call.classes; k += kVoteThreads) shared[k] = 0;
  cuda::sync_threads();
  const int lanes = lanes_per_row(call.classes);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t rows_at_once = kVoteThreads / lanes;
  for (int64_t base = stretch.begin; base < stretch.end; base += rows_at_once) {
    const int64_t row = base + static_cast<int>(threadIdx.x) / lanes;
    const bool present = row < stretch.end;
    Best best = {0.0f, -1, false};
    for (int64_t k = lane; present && k < call.classes; k += kVoteLoads * lanes) {
      take_some(call, row * call.classes, k, lanes, &best);
    }
    best = best_of_row(best, lanes);
    if (!present || lane != 0) continue;
    if (best.nan) {
      cuda::atomic_min(call.first_nan, row);
    } else if (gather) {
      cuda::atomic_add(shared + best.index, 1);
    } else {
      cuda::atomic_add(counts + best.index, int64_t{1});
    }
  }
  if (gather) flush_histogram(shared, call.classes, counts);
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
