#include "interval/elementwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements of a thread

float floor_of(bool rectified) { return rectified ? 0.0f : -rounding::infinity(); }

float least_of(Rounding rounding) {
  return rounding == Rounding::kDeployed ? std::numeric_limits<float>::min() : 0.0f;
}

void ask_for_large_pages(float* lower, float* upper, int64_t count) {
  prefer_large_pages(lower, count * static_cast<int64_t>(sizeof(float)));
  prefer_large_pages(upper, count * static_cast<int64_t>(sizeof(float)));
}

// What a channel's loop adds outward. In float64, (x - mean) scale errs by 7 units at most, and the
// sum with the shift by one of each; a float32 evaluation by 12 of its units of all magnitudes that
// can cancel, and by what flushing loses.
void set_errors(AffineLoop& loop, bool deployed) {
  constexpr double kUnit64 = 1.0 / 9007199254740992.0, kSmallest = 1e-300;
  constexpr double kRoundings = 1.0 + 1e-12;
  const double slope = std::fabs(loop.scale), shift = std::fabs(loop.shift);
  loop.value_error = 16.0 * kUnit64;
  loop.input_error = 0.0;
  loop.error = 2.0 * kUnit64 * shift + kSmallest;
  loop.limit = std::numeric_limits<float>::max();
  if (!deployed) return;
  const double tiny = std::numeric_limits<float>::min(), units = 12.0 * rounding::kUnit;
  loop.input_error = (units * slope + tiny) * kRoundings;
  loop.error +=
      ((units * slope + tiny) * std::fabs(loop.mean) + units * shift + tiny * (4.0 + slope)) *
      kRoundings;
  // x - mean, and the products and sums of either form, stay below a quarter of the largest float
  const double most = 0.24999 * loop.limit;
  const double room = std::min(most, (most - shift) / std::max(slope, tiny));
  loop.limit = room - std::fabs(loop.mean);
}

}  // namespace

AffineLoop channel_loop(double mean, double scale, double shift, bool rectified,
                        Rounding rounding) {
  AffineLoop loop{};
  loop.mean = mean;
  loop.scale = scale;
  loop.shift = shift;
  loop.floor = floor_of(rectified);
  loop.least = least_of(rounding);
  set_errors(loop, rounding == Rounding::kDeployed);
  return loop;
}

bool run_channel(AffineLoop loop, Rounding rounding, const ElementLoops& loops, const float* lower,
                 const float* upper, int64_t count, float* out_lower, float* out_upper) {
  const bool falls = loop.scale < 0.0;
  loop.first = falls ? upper : lower;
  loop.last = falls ? lower : upper;
  loop.count = count;
  loop.out_lower = out_lower;
  loop.out_upper = out_upper;
  return rounding == Rounding::kNearest ? loops.nearest_affine(loop) : loops.affine(loop);
}

SumLoop sum_loop(bool rectified_x, bool rectified_y, Rounding rounding) {
  SumLoop loop{};
  loop.floor_x = floor_of(rectified_x);
  loop.floor_y = floor_of(rectified_y);
  loop.least = least_of(rounding);
  loop.outward = rounding != Rounding::kNearest;
  return loop;
}

bool channel_affine(const ChannelAffine& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  const int64_t lines = work.images * work.channels;
  ask_for_large_pages(work.out_lower, work.out_upper, lines * work.pixels);
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work.pixels));
  parallel_for(lines, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t channel = line % work.channels, at = line * work.pixels;
      const AffineLoop loop = channel_loop(work.mean[channel], work.scale[channel],
                                           work.shift[channel], work.box.rectified, work.rounding);
      const bool bounded =
          run_channel(loop, work.rounding, table.elements, work.box.lower + at, work.box.upper + at,
                      work.pixels, work.out_lower + at, work.out_upper + at);
      if (!bounded) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

bool add_boxes(const BoxSum& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  ask_for_large_pages(work.out_lower, work.out_upper, work.count);
  std::atomic<bool> finite{true};
  parallel_for(work.count, kGrain, 16, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    SumLoop loop = sum_loop(work.x.rectified, work.y.rectified, work.rounding);
    loop.low_x = work.x.lower + begin;
    loop.high_x = work.x.upper + begin;
    loop.low_y = work.y.lower + begin;
    loop.high_y = work.y.upper + begin;
    loop.count = end - begin;
    loop.out_lower = work.out_lower + begin;
    loop.out_upper = work.out_upper + begin;
    if (!table.elements.sum(loop)) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

}  // namespace interval
}  // namespace pyrobust
