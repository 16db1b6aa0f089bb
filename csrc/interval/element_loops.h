// The loops of elementwise.h over neighbouring elements. Included by the file of each instruction
// set: without branches, so that the compiler's vectors are as fast as memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/outward_floats.h"
#include "core/rounding.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

using rounding::float_down;
using rounding::flushed;
using rounding::mask_of;
using rounding::moved_down;
using rounding::odd;

// Ends that are no numbers, or infinite on their inner side, become infinite on the outer one.
void open_ends(int64_t count, float* lower, float* upper) {
  for (int64_t i = 0; i < count; ++i) {
    if (!rounding::is_finite(lower[i])) lower[i] = -rounding::infinity();
    if (!rounding::is_finite(upper[i])) upper[i] = rounding::infinity();
  }
}

// a + b rounded down where the error of the sum, by Knuth's two-sum, is below `gate`, 0 or -inf.
inline float sum_down(float a, float b, float gate) {
  const float sum = a + b, part = sum - a;
  const float error = (a - (sum - part)) + (b - part);
  return moved_down(sum, mask_of(error < gate));
}

bool sum_loop(const SumLoop& work) {
  const float *low_x = work.low_x, *high_x = work.high_x, *low_y = work.low_y,
              *high_y = work.high_y;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const float floor_x = work.floor_x, floor_y = work.floor_y, least = work.least;
  const float gate = work.outward ? 0.0f : -rounding::infinity();
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const float a = low_x[i] < floor_x ? floor_x : low_x[i];
    const float b = low_y[i] < floor_y ? floor_y : low_y[i];
    const float c = high_x[i] < floor_x ? floor_x : high_x[i];
    const float d = high_y[i] < floor_y ? floor_y : high_y[i];
    const float low = flushed(sum_down(a, b, gate), least);
    const float high = flushed(sum_down(-c, -d, gate), least);
    unbounded |= odd(low) | odd(high);
    lower[i] = low;
    upper[i] = -high;
  }
  if (unbounded != 0) open_ends(work.count, lower, upper);
  return unbounded == 0;
}

struct OneEnds {
  float lower, upper;
  int32_t unbounded;
};

// Of one channel: mean, scale, shift, and errors times |(x - mean) scale|, times |x|, and the rest.
struct AffineOf {
  double mean, scale, shift, of_value, of_input, rest, limit;
};

inline OneEnds affine_one(const AffineOf& of, double x, double y, float least) {
  constexpr double kStep = 1.0 / 4503599627370496.0;  // 2^-52: the roundings of the last sums
  const double a = (x - of.mean) * of.scale, b = (y - of.mean) * of.scale;
  const double value = std::fabs(a) > std::fabs(b) ? std::fabs(a) : std::fabs(b);
  const double input = std::fabs(x) > std::fabs(y) ? std::fabs(x) : std::fabs(y);
  const double error = of.of_value * value + of.of_input * input + of.rest;
  const double low = (a + of.shift) - error, high = -(b + of.shift) - error;
  const float down = flushed(float_down(low - kStep * std::fabs(low)), least);
  const float up = flushed(float_down(high - kStep * std::fabs(high)), least);
  return {down, -up, odd(down) | odd(up) | (input <= of.limit ? 0 : 1)};
}

bool affine_loop(const AffineLoop& work) {
  const float *first = work.first, *last = work.last;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const float floor = work.floor, least = work.least;
  const AffineOf of{work.mean,        work.scale, work.shift, work.value_error,
                    work.input_error, work.error, work.limit};
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double x = first[i] < floor ? floor : first[i], y = last[i] < floor ? floor : last[i];
    const OneEnds ends = affine_one(of, x, y, least);
    unbounded |= ends.unbounded;
    lower[i] = ends.lower;
    upper[i] = ends.upper;
  }
  if (unbounded != 0) open_ends(work.count, lower, upper);
  return unbounded == 0;
}

bool nearest_affine_loop(const AffineLoop& work) {
  const float *first = work.first, *last = work.last;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const float floor = work.floor;
  const double mean = work.mean, scale = work.scale, shift = work.shift;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double x = first[i] < floor ? floor : first[i], y = last[i] < floor ? floor : last[i];
    const auto low = static_cast<float>((x - mean) * scale + shift);
    const auto high = static_cast<float>((y - mean) * scale + shift);
    unbounded |= odd(low) | odd(high);
    lower[i] = low;
    upper[i] = high;
  }
  if (unbounded != 0) open_ends(work.count, lower, upper);
  return unbounded == 0;
}

template <bool kOfInputs>
bool columns_of(const AffineColumns& work) {
  const float *below = work.lower, *above = work.upper;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const double *mean = work.mean, *scale = work.scale, *shift = work.shift;
  const double *of_input = work.input_error, *rest = work.error, *limit = work.limit;
  const float floor = work.floor, least = work.least;
  const double of_value = work.value_error;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double low = below[i] < floor ? floor : below[i];
    const double high = above[i] < floor ? floor : above[i];
    const double of = scale[i], x = of < 0.0 ? high : low, y = of < 0.0 ? low : high;
    const OneEnds ends =
        affine_one({mean[i], of, shift[i], of_value, kOfInputs ? of_input[i] : 0.0, rest[i],
                    kOfInputs ? limit[i] : static_cast<double>(rounding::infinity())},
                   x, y, least);
    unbounded |= ends.unbounded;
    lower[i] = ends.lower;
    upper[i] = ends.upper;
  }
  if (unbounded != 0) open_ends(work.count, lower, upper);
  return unbounded == 0;
}

bool columns_loop(const AffineColumns& work) {
  return work.input_error != nullptr ? columns_of<true>(work) : columns_of<false>(work);
}

bool nearest_columns_loop(const AffineColumns& work) {
  const float *below = work.lower, *above = work.upper;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const double *mean = work.mean, *scale = work.scale, *shift = work.shift;
  const float floor = work.floor;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double least = below[i] < floor ? floor : below[i];
    const double most = above[i] < floor ? floor : above[i];
    const double of = scale[i], x = of < 0.0 ? most : least, y = of < 0.0 ? least : most;
    const auto low = static_cast<float>((x - mean[i]) * of + shift[i]);
    const auto high = static_cast<float>((y - mean[i]) * of + shift[i]);
    unbounded |= odd(low) | odd(high);
    lower[i] = low;
    upper[i] = high;
  }
  if (unbounded != 0) open_ends(work.count, lower, upper);
  return unbounded == 0;
}

// Gradients promise nothing: plain floating point, sums in float64 by eight partial ones.
void gradients_loop(const AffineGradients& work) {
  constexpr int64_t kParts = 8;
  const float *of_lower = work.of_lower, *of_upper = work.of_upper;
  const float *lower = work.lower, *upper = work.upper;
  const float floor = work.floor;
  if (work.to_lower != nullptr) {
    float* __restrict to_lower = work.to_lower, * __restrict to_upper = work.to_upper;
    const auto scale = static_cast<float>(work.scale);
    for (int64_t i = 0; i < work.count; ++i) {
      to_lower[i] = lower[i] > floor ? of_lower[i] * scale : 0.0f;
      to_upper[i] = upper[i] > floor ? of_upper[i] * scale : 0.0f;
    }
  }
  if (work.to_scale == nullptr) return;
  double of_scale[kParts] = {}, of_shift[kParts] = {};
  for (int64_t i = 0; i < work.count; i += kParts) {
    const int64_t count = work.count - i < kParts ? work.count - i : kParts;
    for (int64_t j = 0; j < count; ++j) {
      const double low = of_lower[i + j], high = of_upper[i + j];
      const double x = lower[i + j] < floor ? floor : lower[i + j];
      const double y = upper[i + j] < floor ? floor : upper[i + j];
      of_scale[j] += low * (x - work.mean) + high * (y - work.mean);
      of_shift[j] += low + high;
    }
  }
  for (int64_t j = 0; j < kParts; ++j) {
    *work.to_scale += of_scale[j];
    *work.to_shift += of_shift[j];
  }
}

void column_gradients_loop(const AffineColumnGradients& work) {
  const float *of_lower = work.of_lower, *of_upper = work.of_upper;
  const float *lower = work.lower, *upper = work.upper;
  const double *mean = work.mean, *scale = work.scale;
  const float floor = work.floor;
  if (work.to_lower != nullptr) {
    float* __restrict to_lower = work.to_lower, * __restrict to_upper = work.to_upper;
    for (int64_t i = 0; i < work.count; ++i) {
      const auto of = static_cast<float>(scale[i]);
      const float low = of < 0.0f ? of_upper[i] : of_lower[i];
      const float high = of < 0.0f ? of_lower[i] : of_upper[i];
      to_lower[i] = lower[i] > floor ? low * of : 0.0f;
      to_upper[i] = upper[i] > floor ? high * of : 0.0f;
    }
  }
  if (work.to_scale == nullptr) return;
  double* __restrict to_scale = work.to_scale, * __restrict to_shift = work.to_shift;
  for (int64_t i = 0; i < work.count; ++i) {
    const double first = of_lower[i], last = of_upper[i];
    const double low = scale[i] < 0.0 ? last : first, high = scale[i] < 0.0 ? first : last;
    const double x = lower[i] < floor ? floor : lower[i], y = upper[i] < floor ? floor : upper[i];
    to_scale[i] += low * (x - mean[i]) + high * (y - mean[i]);
    to_shift[i] += first + last;
  }
}

// x - radius, which two_sum knows to the last bit, in float: rounded down, or to nearest where
// `moves` has no bits.
inline float lower_of_ball(double x, double radius, uint32_t moves) {
  const double low = x - radius, part = low - x;
  const double error = (x - (low - part)) - (radius + part);
  const auto nearest = static_cast<float>(low);
  const double taken = nearest;
  const bool above = (taken > low) | ((taken == low) & (error < 0.0));
  return moved_down(nearest, mask_of(above) & moves);
}

bool ball_loop(const BallLoop& work) {
  const float* x = work.x;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const float first = work.first, last = work.last, least = work.least;
  const double radius = work.radius;
  const uint32_t moves = mask_of(work.outward);
  int32_t wrong = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    float low = lower_of_ball(x[i], radius, moves);
    float high = -lower_of_ball(-x[i], radius, moves);
    wrong |= static_cast<int32_t>(high < first) | static_cast<int32_t>(low > last);
    low = low < first ? first : low;
    high = high > last ? last : high;
    wrong |= odd(low) | odd(high);
    lower[i] = flushed(low, least);
    upper[i] = -flushed(-high, least);
  }
  return wrong == 0;
}

constexpr ElementLoops kElementLoops = {sum_loop,
                                        affine_loop,
                                        nearest_affine_loop,
                                        columns_loop,
                                        nearest_columns_loop,
                                        gradients_loop,
                                        column_gradients_loop,
                                        ball_loop};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
