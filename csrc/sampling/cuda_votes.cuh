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

// What a lane knows of a row: its largest value and, as the count of values that this lane saw
// before, where that is; the first of equal ones. A NaN is never larger than anything.
struct Best {
  float value;
  uint32_t seen;
  bool nan;
};

PYROBUST_DEVICE void take(Best* best, float value, uint32_t seen) {
  best->nan = best->nan || value != value;
  if (value > best->value) {
    best->value = value;
    best->seen = seen;
  }
}

// What a lane loads at once: sixteen bytes where rows consist of such, or one value.
template <FloatType kType, bool kVectors>
struct Logits {
  static constexpr int kBytes = kType == FloatType::kFloat32 ? 4 : 2;
  static constexpr int kValues = kVectors ? 16 / kBytes : 1;
  static constexpr int kWords = kVectors ? 4 : 1;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const void* logits, int64_t index) {
    if (kVectors) {
      const cuda::Words4 four = cuda::load16(static_cast<const uint8_t*>(logits) + index * kBytes);
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = four.word[i];
    } else if (kType == FloatType::kFloat32) {
      word[0] = static_cast<const uint32_t*>(logits)[index];
    } else {
      word[0] = static_cast<const uint16_t*>(logits)[index];
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if (kType == FloatType::kFloat32) return float_from_bits(word[i]);
    const uint32_t pair = word[i / 2];
    if (kType == FloatType::kFloat16)
      return i % 2 == 0 ? cuda::low_f16(pair) : cuda::high_f16(pair);
    return i % 2 == 0 ? cuda::low_bf16(pair) : cuda::high_bf16(pair);
  }
};

// Vectors lane, lane + lanes, ... of the row at `row`: several loads under way together.
template <FloatType kType, bool kVectors>
PYROBUST_DEVICE Best best_of_lane(const CountCall& call, int64_t row, int lane, int lanes) {
  using Vector = Logits<kType, kVectors>;
  Best best = {float_from_bits(0xff800000u), 0, false};
  const int64_t vectors = call.classes / Vector::kValues;
  uint32_t seen = 0;
  for (int64_t k = lane; k < vectors; k += int64_t{kVoteLoads} * lanes) {
    Vector loaded[kVoteLoads];
#pragma unroll
    for (int i = 0; i < kVoteLoads; ++i) {
      const int64_t at = k + i * lanes;
      if (at < vectors) loaded[i].load(call.logits, row * call.classes + at * Vector::kValues);
    }
#pragma unroll
    for (int i = 0; i < kVoteLoads; ++i) {
      if (k + i * lanes >= vectors) break;
#pragma unroll
      for (int j = 0; j < Vector::kValues; ++j) take(&best, loaded[i].value(j), seen + j);
      seen += Vector::kValues;
    }
  }
  return best;
}

// The class of the largest value, of the lowest of several, in each of the lanes that share a row.
PYROBUST_DEVICE int64_t class_of_row(float value, int64_t index, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const float other = cuda::shuffle_xor(value, mask);
    const int64_t other_index = cuda::shuffle_xor(index, mask);
    if (other > value || (other == value && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
  return index;
}

PYROBUST_DEVICE void flush_histogram(int32_t* shared, int64_t classes, int64_t* counts) {
  cuda::sync_threads();
  for (int64_t k = threadIdx.x; k < classes; k += kVoteThreads) {
    if (shared[k] != 0) cuda::atomic_add(counts + k, static_cast<int64_t>(shared[k]));
  }
}

template <FloatType kType, bool kVectors>
PYROBUST_KERNEL(kVoteThreads)
vote_kernel(const __grid_constant__ VoteWork work) {
  constexpr int kValues = Logits<kType, kVectors>::kValues;
  auto* shared = reinterpret_cast<int32_t*>(cuda::shared_memory());
  const CountCall& call = work.call;
  const bool gather = call.classes <= kSharedClasses;
  const VoteStretch stretch = vote_stretch(work.stretches, blockIdx.x);
  int64_t* counts = call.counts + stretch.histogram * call.classes;
  for (int64_t k = threadIdx.x; gather && k < call.classes; k += kVoteThreads) shared[k] = 0;
  cuda::sync_threads();
  const int lanes = lanes_per_row(call.classes / kValues);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  const uint32_t together = (lanes == 32 ? 0u : 1u << lanes) - 1u;
  const int first_lane = thread % 32 / lanes * lanes;
  const int64_t rows_at_once = kVoteThreads / lanes;
  for (int64_t base = stretch.begin; base < stretch.end; base += rows_at_once) {
    const int64_t row = base + thread / lanes;
    const bool present = row < stretch.end;
    Best best = {float_from_bits(0xff800000u), 0, false};
    if (present) best = best_of_lane<kType, kVectors>(call, row, lane, lanes);
    const int64_t vector = best.seen / kValues * int64_t{lanes} + lane;
    const int64_t voted = class_of_row(best.value, vector * kValues + best.seen % kValues, lanes);
    const bool nan = (cuda::ballot(best.nan) >> first_lane & together) != 0;
    if (!present || lane != 0) continue;
    if (nan) {
      cuda::atomic_min(call.first_nan, row - call.rows);
    } else if (gather) {
      cuda::atomic_add(shared + voted, 1);
    } else {
      cuda::atomic_add(counts + voted, int64_t{1});
    }
  }
  if (gather) flush_histogram(shared, call.classes, counts);
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
