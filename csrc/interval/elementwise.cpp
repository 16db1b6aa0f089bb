#include "interval/elementwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "interval/element_shares.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kGrain = 1 << 14;   // elements of a thread
constexpr int64_t kColumnLanes = 16;  // channels whose numbers a loop reads at once

float floor_of(bool rectified) { return rectified ? 0.0f : -rounding::infinity(); }

float least_of(Rounding rounding) {
  return rounding == Rounding::kDeployed ? std::numeric_limits<float>::min() : 0.0f;
}

// What a channel's loop adds outward. In float64, (x - mean) scale errs by 7 units at most, and the
// sum with the shift by one of each; a float32 evaluation by 12 of its units of all magnitudes that
// can cancel, and by what flushing loses: 2^-126 of each parameter, product and sum, times what
// that is multiplied by. (A box that holds denormals holds the zero that they may become.)
void set_errors(AffineLoop& loop, double gain, bool deployed) {
  constexpr double kUnit64 = 1.0 / 9007199254740992.0, kSmallest = 1e-300;
  constexpr double kRoundings = 1.0 + 1e-12;
  const double slope = std::fabs(loop.scale), shift = std::fabs(loop.shift);
  loop.value_error = 16.0 * kUnit64;
  loop.input_error = 0.0;
  loop.error = 2.0 * kUnit64 * shift + kSmallest;
  loop.limit = std::numeric_limits<float>::max();
  if (!deployed) return;
  const double tiny = std::numeric_limits<float>::min(), units = 12.0 * rounding::kUnit;
  const double of_reach = units * slope + tiny * (1.0 + gain);  // of |x| + |mean|
  loop.input_error = of_reach * kRoundings;
  loop.error +=
      (of_reach * std::fabs(loop.mean) + units * shift + tiny * (8.0 + 2.0 * slope + gain)) *
      kRoundings;
  // x - mean, and the products and sums of either form, stay below a quarter of the largest float
  const double most = 0.24999 * loop.limit;
  const double room = std::min(most, (most - shift) / std::max(std::max(slope, gain), tiny));
  loop.limit = room - std::fabs(loop.mean);
}

}  // namespace

AffineLoop channel_loop(double mean, double scale, double shift, double gain, bool rectified,
                        Rounding rounding) {
  AffineLoop loop{};
  loop.mean = mean;
  loop.scale = scale;
  loop.shift = shift;
  loop.floor = floor_of(rectified);
  loop.least = least_of(rounding);
  set_errors(loop, gain, rounding == Rounding::kDeployed);
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

ColumnLoops::ColumnLoops(const double* mean, const double* scale, const double* shift,
                         const double* gain, int64_t channels, bool rectified, Rounding rounding)
    : stride_(blocks(channels, kColumnLanes) * kColumnLanes),
      numbers_(static_cast<size_t>(6 * stride_)),
      floor_(floor_of(rectified)),
      least_(least_of(rounding)),
      rounding_(rounding) {
  double* const numbers = numbers_.data();
  for (int64_t n = 0; n < channels; ++n) {
    const AffineLoop loop = channel_loop(mean[n], scale[n], shift[n], gain[n], rectified, rounding);
    const double values[6] = {loop.mean,        loop.scale, loop.shift,
                              loop.input_error, loop.error, loop.limit};
    for (int64_t i = 0; i < 6; ++i) numbers[i * stride_ + n] = values[i];
    value_error_ = loop.value_error;
  }
}

bool ColumnLoops::run(const ElementLoops& loops, const float* lower, const float* upper,
                      int64_t first, int64_t count, float* out_lower, float* out_upper) const {
  const double* const numbers = numbers_.data() + first;
  const bool deployed = rounding_ == Rounding::kDeployed;
  const AffineColumns work{lower,
                           upper,
                           floor_,
                           count,
                           numbers,
                           numbers + stride_,
                           numbers + 2 * stride_,
                           value_error_,
                           deployed ? numbers + 3 * stride_ : nullptr,
                           numbers + 4 * stride_,
                           deployed ? numbers + 5 * stride_ : nullptr,
                           least_,
                           out_lower,
                           out_upper};
  return rounding_ == Rounding::kNearest ? loops.nearest_columns(work) : loops.columns(work);
}

namespace {

// Channels whose numbers stay in a first-level cache while rows of ends pass.
constexpr int64_t kColumnsAtOnce = 256;

bool affine_columns(const ChannelAffine& work, const IntervalKernels& table, int num_threads) {
  const ColumnLoops loops(work.mean, work.scale, work.shift, work.gain, work.channels,
                          work.box.rectified, work.rounding);
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work.channels));
  parallel_for(work.images, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t first = 0; first < work.channels; first += kColumnsAtOnce) {
      const int64_t count = std::min(kColumnsAtOnce, work.channels - first);
      for (int64_t image = begin; image < end; ++image) {
        const int64_t at = image * work.channels + first;
        const bool bounded = loops.run(table.elements, work.box.lower + at, work.box.upper + at,
                                       first, count, work.out_lower + at, work.out_upper + at);
        if (!bounded) finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  return finite;
}

bool affine_channels(const ChannelAffine& work, const IntervalKernels& table, int num_threads) {
  const int64_t lines = work.images * work.channels;
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work.pixels));
  parallel_for(lines, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t channel = line % work.channels, at = line * work.pixels;
      const AffineLoop loop =
          channel_loop(work.mean[channel], work.scale[channel], work.shift[channel],
                       work.gain[channel], work.box.rectified, work.rounding);
      const bool bounded =
          run_channel(loop, work.rounding, table.elements, work.box.lower + at, work.box.upper + at,
                      work.pixels, work.out_lower + at, work.out_upper + at);
      if (!bounded) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

inline float* moved(float* values, int64_t by) { return values != nullptr ? values + by : values; }

inline double* moved(double* values, int64_t by) {
  return values != nullptr ? values + by : values;
}

// Every channel is one thread's, whose sums run over the images in order.
void column_gradients(const ChannelAffineBackward& work, const IntervalKernels& table,
                      int num_threads) {
  const int64_t grain = std::max<int64_t>(16, kGrain / std::max<int64_t>(1, work.images));
  parallel_for(work.channels, grain, 16, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t image = 0; image < work.images; ++image) {
      const int64_t at = image * work.channels + begin;
      table.elements.column_gradients({work.of_lower + at, work.of_upper + at, work.box.lower + at,
                                       work.box.upper + at, floor_of(work.box.rectified),
                                       end - begin, work.mean + begin, work.scale + begin,
                                       moved(work.to_lower, at), moved(work.to_upper, at),
                                       moved(work.to_scale, begin), moved(work.to_shift, begin)});
    }
  });
}

void channel_gradients(const ChannelAffineBackward& work, const IntervalKernels& table,
                       int num_threads) {
  const int64_t elements = std::max<int64_t>(1, work.images * work.pixels);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  parallel_for(work.channels, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t line = 0; line < work.images * (end - begin); ++line) {
      const int64_t channel = begin + line % (end - begin), image = line / (end - begin);
      const int64_t at = (image * work.channels + channel) * work.pixels;
      const bool falls = work.scale[channel] < 0.0;
      table.elements.gradients({(falls ? work.of_upper : work.of_lower) + at,
                                (falls ? work.of_lower : work.of_upper) + at, work.box.lower + at,
                                work.box.upper + at, floor_of(work.box.rectified), work.pixels,
                                work.mean[channel], work.scale[channel], moved(work.to_lower, at),
                                moved(work.to_upper, at), moved(work.to_scale, channel),
                                moved(work.to_shift, channel)});
    }
  });
}

}  // namespace

bool channel_affine(const ChannelAffine& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  ask_for_large_pages(work.out_lower, work.out_upper, work.images * work.channels * work.pixels);
  return work.pixels == 1 ? affine_columns(work, table, num_threads)
                          : affine_channels(work, table, num_threads);
}

void channel_affine_backward(const ChannelAffineBackward& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  if (work.to_lower != nullptr) {
    ask_for_large_pages(work.to_lower, work.to_upper, work.images * work.channels * work.pixels);
  }
  if (work.pixels == 1) {
    column_gradients(work, table, num_threads);
  } else {
    channel_gradients(work, table, num_threads);
  }
}

bool add_boxes(const BoxSum& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  return bound_elements(work.out_lower, work.out_upper, work.count, kGrain, num_threads,
                        [&](int64_t begin, int64_t end) {
                          SumLoop loop =
                              sum_loop(work.x.rectified, work.y.rectified, work.rounding);
                          loop.low_x = work.x.lower + begin;
                          loop.high_x = work.x.upper + begin;
                          loop.low_y = work.y.lower + begin;
                          loop.high_y = work.y.upper + begin;
                          loop.count = end - begin;
                          loop.out_lower = work.out_lower + begin;
                          loop.out_upper = work.out_upper + begin;
                          return table.elements.sum(loop);
                        });
}

bool ball_ends(const Ball& work, int num_threads) {
  const IntervalKernels table = pick_kernels();
  const float least = least_of(work.rounding);
  return bound_elements(
      work.out_lower, work.out_upper, work.count, kGrain, num_threads,
      [&](int64_t begin, int64_t end) {
        return table.elements.ball({work.x + begin, end - begin, work.radius, work.first, work.last,
                                    least, work.rounding != Rounding::kNearest,
                                    work.out_lower + begin, work.out_upper + begin});
      });
}

}  // namespace interval
}  // namespace pyrobust
