#include "interval/curves.h"

#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 12;  // elements of a thread
constexpr int64_t kLine = 16;        // threads share no cache line

}  // namespace

bool bound_curve(const CurveBox& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  const auto bytes = static_cast<int64_t>(sizeof(float)) * work.count;
  prefer_large_pages(work.out_lower, bytes);
  prefer_large_pages(work.out_upper, bytes);
  std::atomic<bool> finite{true};
  parallel_for(work.count, kGrain, kLine, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    const bool bounded = table.curves.ends({work.of, work.lower + begin, work.upper + begin,
                                            end - begin, work.rounding, work.deployed,
                                            work.out_lower + begin, work.out_upper + begin});
    if (!bounded) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

void bound_curve_backward(const CurveBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  const auto bytes = static_cast<int64_t>(sizeof(float)) * work.count;
  prefer_large_pages(work.to_lower, bytes);
  prefer_large_pages(work.to_upper, bytes);
  parallel_for(work.count, kGrain, kLine, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    table.curves.gradients({work.of, work.of_lower + begin, work.of_upper + begin,
                            work.lower + begin, work.upper + begin, end - begin,
                            work.to_lower + begin, work.to_upper + begin});
  });
}

void evaluate_curve(const CurveOf& of, const float* x, int64_t count, double* out) {
  const DefaultFloatEnvironment environment;
  pick_kernels().curves.values({of, x, count, out});
}

}  // namespace interval
}  // namespace pyrobust
