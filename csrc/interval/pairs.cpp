#include "interval/pairs.h"

#include "interval/element_shares.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements of a thread

}  // namespace

bool bound_pair(const BoxPair& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  return bound_elements(
      work.out_lower, work.out_upper, work.count, kGrain, num_threads,
      [&](int64_t begin, int64_t end) {
        return table.pairs.ends({work.pairing, work.low_x + begin, work.high_x + begin,
                                 work.low_y + begin, work.high_y + begin, end - begin,
                                 work.rounding, work.out_lower + begin, work.out_upper + begin});
      });
}

void bound_pair_backward(const PairBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  run_elements(work.count, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    table.pairs.gradients({work.pairing, work.of_lower + begin, work.of_upper + begin,
                           work.low_x + begin, work.high_x + begin, work.low_y + begin,
                           work.high_y + begin, end - begin, work.to_low_x + begin,
                           work.to_high_x + begin, work.to_low_y + begin, work.to_high_y + begin});
  });
}

bool bound_constant(const BoxConstant& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  return bound_elements(work.out_lower, work.out_upper, work.count, kGrain, num_threads,
                        [&](int64_t begin, int64_t end) {
                          BoxConstant part = work;
                          part.lower += begin;
                          part.upper += begin;
                          part.count = end - begin;
                          part.out_lower += begin;
                          part.out_upper += begin;
                          return table.pairs.constant(part);
                        });
}

void bound_constant_backward(const ConstantBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  run_elements(work.count, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    table.pairs.constant_gradients({work.pairing, work.reversed, work.first, work.last,
                                    work.of_lower + begin, work.of_upper + begin,
                                    work.lower + begin, work.upper + begin, end - begin,
                                    work.to_lower + begin, work.to_upper + begin});
  });
}

}  // namespace interval
}  // namespace pyrobust
