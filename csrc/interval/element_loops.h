// The loops of elementwise.h over neighbouring elements. Included by the file of each instruction
// set: without branches, so that the compiler's vectors are as fast as memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/float_types.h"
#include "core/rounding.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// A lower end between zero and `least` becomes zero.
inline float flushed(float low, float least) {
  const float negative = low < 0.0f ? low : 0.0f;
  return low < least ? negative : low;
}

// 0 for a finite number.
inline int32_t odd(float value) { return value - value == 0.0f ? 0 : 1; }

// Ends that are no numbers, or infinite on their inner side, become infinite on the outer one.
void open_ends(int64_t count, float* lower, float* upper) {
  for (int64_t i = 0; i < count; ++i) {
    if (!rounding::is_finite(lower[i])) lower[i] = -rounding::infinity();
    if (!rounding::is_finite(upper[i])) upper[i] = rounding::infinity();
  }
}

// `value`, or with `moves` = 1 instead of 0 a float below it: the next one but for the smallest
// normal numbers. Arithmetic, as a condition would not become vectors. NaN for an infinity.
inline float moved_down(float value, float moves) {
  return value - (std::fabs(value) * rounding::kNeighbour + rounding::kLeast) * moves;
}

// a + b rounded down where the error of the sum, by Knuth's two-sum, is below `gate`, 0 or -inf.
inline float sum_down(float a, float b, float gate) {
  const float sum = a + b, part = sum - a;
  const float error = (a - (sum - part)) + (b - part);
  return moved_down(sum, error < gate ? 1.0f : 0.0f);
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

// The greatest float that is not above.
inline float float_down(double value) {
  const auto nearest = static_cast<float>(value);
  return moved_down(nearest, static_cast<double>(nearest) > value ? 1.0f : 0.0f);
}

bool affine_loop(const AffineLoop& work) {
  const float *first = work.first, *last = work.last;
  float* __restrict lower = work.out_lower, * __restrict upper = work.out_upper;
  const float floor = work.floor, least = work.least;
  const double mean = work.mean, scale = work.scale, shift = work.shift;
  const double of_value = work.value_error, of_input = work.input_error, rest = work.error;
  const double limit = work.limit;
  constexpr double kStep = 1.0 / 4503599627370496.0;  // 2^-52: the roundings of the last sums
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double x = first[i] < floor ? floor : first[i], y = last[i] < floor ? floor : last[i];
    const double a = (x - mean) * scale, b = (y - mean) * scale;
    const double value = std::fabs(a) > std::fabs(b) ? std::fabs(a) : std::fabs(b);
    const double input = std::fabs(x) > std::fabs(y) ? std::fabs(x) : std::fabs(y);
    const double error = of_value * value + of_input * input + rest;
    const double low = (a + shift) - error, high = -(b + shift) - error;
    const float down = flushed(float_down(low - kStep * std::fabs(low)), least);
    const float up = flushed(float_down(high - kStep * std::fabs(high)), least);
    unbounded |= odd(down) | odd(up) | (input <= limit ? 0 : 1);
    lower[i] = down;
    upper[i] = -up;
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

constexpr ElementLoops kElementLoops = {sum_loop, affine_loop, nearest_affine_loop};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
