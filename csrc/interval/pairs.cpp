#include "interval/pairs.h"

#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements of a thread
constexpr int64_t kLine = 16;        // threads share no cache line

}  // namespace

bool bound_pair(const BoxPair& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  const auto bytes = static_cast<int64_t>(sizeof(float)) * work.count;
  prefer_large_pages(work.out_lower, bytes);
  prefer_large_pages(work.out_upper, bytes);
  std::atomic<bool> finite{true};
  parallel_for(work.count, kGrain, kLine, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    const BoxPair part{work.pairing,       work.low_x + begin,     work.high_x + begin,
                       work.low_y + begin, work.high_y + begin,    end - begin,
                       work.rounding,      work.out_lower + begin, work.out_upper + begin};
    if (!table.pairs.ends(part)) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

void bound_pair_backward(const PairBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  parallel_for(work.count, kGrain, kLine, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    table.pairs.gradients({work.pairing, work.of_lower + begin, work.of_upper + begin,
                           work.low_x + begin, work.high_x + begin, work.low_y + begin,
                           work.high_y + begin, end - begin, work.to_low_x + begin,
                           work.to_high_x + begin, work.to_low_y + begin, work.to_high_y + begin});
  });
}

}  // namespace interval
}  // namespace pyrobust
