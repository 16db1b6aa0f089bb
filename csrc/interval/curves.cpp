#include "interval/curves.h"

#include "interval/element_shares.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 12;  // elements of a thread

}  // namespace

bool bound_curve(const CurveBox& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  return bound_elements(
      work.out_lower, work.out_upper, work.count, kGrain, num_threads,
      [&](int64_t begin, int64_t end) {
        return table.curves.ends({work.of, work.lower + begin, work.upper + begin, end - begin,
                                  work.rounding, work.deployed, work.out_lower + begin,
                                  work.out_upper + begin});
      });
}

void bound_curve_backward(const CurveBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  ask_for_large_pages(work.to_lower, work.to_upper, work.count);
  run_elements(work.count, kGrain, num_threads, [&](int64_t begin, int64_t end) {
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
