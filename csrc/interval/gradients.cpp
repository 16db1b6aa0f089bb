// One loop each, bound by memory: what the compiler makes of them is as fast as it gets.
#include "interval/gradients.h"

#include "runtime/pages.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 15;

void prefer_large_pages_for(float* values, int64_t count) {
  prefer_large_pages(values, count * static_cast<int64_t>(sizeof(float)));
}

inline float clip(float x) { return x < 0.0f ? 0.0f : x; }

}  // namespace

void split_ends(const SplitEnds& work, int num_threads) {
  prefer_large_pages_for(work.centre, work.count);
  prefer_large_pages_for(work.radius, work.count);
  parallel_for(work.count, kGrain, 16, num_threads, [&](int64_t begin, int64_t end) {
    const float *lower = work.lower, *upper = work.upper;
    float *centre = work.centre, *radius = work.radius;
    if (work.rectified) {
      for (int64_t i = begin; i < end; ++i) {
        const float low = clip(lower[i]), high = clip(upper[i]);
        centre[i] = (low + high) * 0.5f;
        radius[i] = (high - low) * 0.5f;
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const float low = lower[i], high = upper[i];
      centre[i] = (low + high) * 0.5f;
      radius[i] = (high - low) * 0.5f;
    }
  });
}

void split_gradients(const SplitGradients& work, int num_threads) {
  prefer_large_pages_for(work.to_centre, work.count);
  prefer_large_pages_for(work.to_radius, work.count);
  parallel_for(work.count, kGrain, 16, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float low = work.to_lower[i], high = work.to_upper[i];
      work.to_centre[i] = low + high;
      work.to_radius[i] = high - low;
    }
  });
}

void join_gradients(const JoinGradients& work, int num_threads) {
  prefer_large_pages_for(work.to_lower, work.count);
  prefer_large_pages_for(work.to_upper, work.count);
  parallel_for(work.count, kGrain, 16, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float centre = work.to_centre[i], radius = work.to_radius[i];
      const bool passes_low = work.lower == nullptr || work.lower[i] > 0.0f;
      const bool passes_high = work.upper == nullptr || work.upper[i] > 0.0f;
      work.to_lower[i] = passes_low ? (centre - radius) * 0.5f : 0.0f;
      work.to_upper[i] = passes_high ? (centre + radius) * 0.5f : 0.0f;
    }
  });
}

void add_weight_gradient(const WeightGradient& work, int num_threads) {
  parallel_for(work.count, kGrain, 16, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float weight = work.weight[i], part = work.from_radius[i];
      work.from_centre[i] += weight > 0.0f ? part : weight < 0.0f ? -part : 0.0f;
    }
  });
}

}  // namespace interval
}  // namespace pyrobust
