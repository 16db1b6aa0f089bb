// One loop each, bound by memory: what the compiler makes of them is as fast as it gets.
#include "interval/gradients.h"

#include <cmath>

#include "core/float_types.h"
#include "runtime/pages.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace interval {
namespace {

void prefer_large_pages_for(const float* values, int64_t count) {
  prefer_large_pages(const_cast<float*>(values), count * int64_t{sizeof(float)});
}

void prefer_large_pages_for(const Radii& radii, int64_t count) {
  prefer_large_pages(radii.values, count * (radii.bfloat16 ? 2 : 4));
}

inline float clip(float x) { return x < 0.0f ? 0.0f : x; }

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) { *to = bfloat16_from_float(value); }
inline float get(const float* from) { return *from; }
inline float get(const uint16_t* from) { return float_from_bfloat16(*from); }

// body(begin, end, radii) with the radii's type.
template <typename Body>
void run(int64_t count, const Radii& radii, int num_threads, const Body& body) {
  constexpr int64_t kGrain = 1 << 15;
  parallel_for(count, kGrain, 32, num_threads, [&](int64_t begin, int64_t end) {
    if (radii.bfloat16) {
      body(begin, end, static_cast<uint16_t*>(radii.values));
    } else {
      body(begin, end, static_cast<float*>(radii.values));
    }
  });
}

}  // namespace

void split_ends(const SplitEnds& work, int num_threads) {
  prefer_large_pages_for(work.centre, work.count);
  prefer_large_pages_for(work.radius, work.count);
  run(work.count, work.radius, num_threads, [&](int64_t begin, int64_t end, auto* radius) {
    const float *lower = work.lower, *upper = work.upper;
    float* centre = work.centre;
    if (work.rectified) {
      for (int64_t i = begin; i < end; ++i) {
        const float low = clip(lower[i]), high = clip(upper[i]);
        centre[i] = (low + high) * 0.5f;
        put((high - low) * 0.5f, radius + i);
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const float low = lower[i], high = upper[i];
      centre[i] = (low + high) * 0.5f;
      put((high - low) * 0.5f, radius + i);
    }
  });
}

void split_gradients(const SplitGradients& work, int num_threads) {
  prefer_large_pages_for(work.to_centre, work.count);
  prefer_large_pages_for(work.to_radius, work.count);
  run(work.count, work.to_radius, num_threads, [&](int64_t begin, int64_t end, auto* to_radius) {
    for (int64_t i = begin; i < end; ++i) {
      const float low = work.to_lower[i], high = work.to_upper[i];
      work.to_centre[i] = low + high;
      put(high - low, to_radius + i);
    }
  });
}

void join_gradients(const JoinGradients& work, int num_threads) {
  prefer_large_pages_for(work.to_lower, work.count);
  prefer_large_pages_for(work.to_upper, work.count);
  run(work.count, work.to_radius, num_threads, [&](int64_t begin, int64_t end, auto* to_radius) {
    for (int64_t i = begin; i < end; ++i) {
      const float centre = work.to_centre[i], radius = get(to_radius + i);
      const bool passes_low = work.lower == nullptr || work.lower[i] > 0.0f;
      const bool passes_high = work.upper == nullptr || work.upper[i] > 0.0f;
      work.to_lower[i] = passes_low ? (centre - radius) * 0.5f : 0.0f;
      work.to_upper[i] = passes_high ? (centre + radius) * 0.5f : 0.0f;
    }
  });
}

void size_of_weight(const SizeOfWeight& work, int num_threads) {
  prefer_large_pages_for(work.size, work.count);
  run(work.count, work.size, num_threads, [&](int64_t begin, int64_t end, auto* size) {
    for (int64_t i = begin; i < end; ++i) put(std::fabs(work.weight[i]), size + i);
  });
}

void add_weight_gradient(const WeightGradient& work, int num_threads) {
  run(work.count, work.from_radius, num_threads, [&](int64_t begin, int64_t end, auto* parts) {
    for (int64_t i = begin; i < end; ++i) {
      const float weight = work.weight[i], part = get(parts + i);
      work.from_centre[i] += weight > 0.0f ? part : weight < 0.0f ? -part : 0.0f;
    }
  });
}

}  // namespace interval
}  // namespace pyrobust
