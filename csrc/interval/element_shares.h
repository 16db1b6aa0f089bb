// What the passes over elements share: large pages for both ends, equal runs of elements for all
// threads, and whether every run was answered with true.
#pragma once

#include <atomic>
#include <cstdint>

#include "interval/plan.h"

namespace pyrobust {
namespace interval {

inline void ask_for_large_pages(float* lower, float* upper, int64_t count) {
  prefer_large_pages(lower, count * static_cast<int64_t>(sizeof(float)));
  prefer_large_pages(upper, count * static_cast<int64_t>(sizeof(float)));
}

// run(begin, end) for runs of `grain` elements and more, whose borders are those of cache lines.
template <typename Run>
void run_elements(int64_t count, int64_t grain, int num_threads, const Run& run) {
  constexpr int64_t kLine = 16;
  parallel_for(count, grain, kLine, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    run(begin, end);
  });
}

// The same for ends that are written; returns whether `run` said so of all.
template <typename Run>
bool bound_elements(float* lower, float* upper, int64_t count, int64_t grain, int num_threads,
                    const Run& run) {
  ask_for_large_pages(lower, upper, count);
  std::atomic<bool> all{true};
  run_elements(count, grain, num_threads, [&](int64_t begin, int64_t end) {
    if (!run(begin, end)) all.store(false, std::memory_order_relaxed);
  });
  return all;
}

}  // namespace interval
}  // namespace pyrobust
