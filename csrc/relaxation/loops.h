// The loops of every instruction set, plain enough for the compiler to vectorise. Included by the
// file of each set and compiled with its flags.
#pragma once

#include <cmath>

#include "relaxation/kernels.h"

namespace pyrobust {
namespace relaxation {
namespace {

constexpr int64_t kLanes = 16;
// Elements of an image that all rows are taken through together: what they share stays in L1.
constexpr int64_t kBlock = 512;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Lines {
  const float *lower_slope, *lower_shift, *upper_slope, *upper_shift, *bias;
};

// The line that a coefficient meets. Both are loaded, so that the choice is one of registers.
struct Met {
  float slope, shift;
};

inline Met met(float a, const Lines& lines, int64_t i) {
  const float lower_slope = lines.lower_slope[i], upper_slope = lines.upper_slope[i];
  const float lower_shift = lines.lower_shift[i], upper_shift = lines.upper_shift[i];
  const bool below = a < 0.0f;
  return {below ? upper_slope : lower_slope, below ? upper_shift : lower_shift};
}

inline Lines lines_at(const Bend& work, int64_t image, int64_t first) {
  const int64_t at = image * work.size + first;
  return {work.lower_slope + at, work.lower_shift + at, work.upper_slope + at,
          work.upper_shift + at, work.bias == nullptr ? nullptr : work.bias + first};
}

template <bool kBias>
float bend_row(const float* __restrict a, const Lines lines, int64_t count,
               float* __restrict pulled) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float x = a[i + lane];
      const Met line = met(x, lines, i + lane);
      const float bent = x * line.slope;
      pulled[i + lane] = bent;
      sums[lane] += x * line.shift + (kBias ? bent * lines.bias[i + lane] : 0.0f);
    }
  }
  float total = 0.0f;
  for (; i < count; ++i) {
    const Met line = met(a[i], lines, i);
    pulled[i] = a[i] * line.slope;
    total += a[i] * line.shift + (kBias ? pulled[i] * lines.bias[i] : 0.0f);
  }
  for (const float sum : sums) total += sum;
  return total;
}

void bend_of_row(const Bend& work, int64_t row, int64_t image, float* pulled, float* value) {
  const int64_t at = (row * work.images + image) * work.size;
  const Lines lines = lines_at(work, image, 0);
  const float sum = work.bias != nullptr
                        ? bend_row<true>(work.a + at, lines, work.size, pulled + at)
                        : bend_row<false>(work.a + at, lines, work.size, pulled + at);
  if (value != nullptr) value[row * work.images + image] = sum;
}

// Sums over the rows of a block; those that nobody asked for go unread.
struct Sums {
  float lower_slope[kBlock], lower_shift[kBlock], upper_slope[kBlock], upper_shift[kBlock];
  float bias[kBlock];
};

// Two loops, as choices and sums in one are not vectorised. by_a may be by_pulled: each element is
// read before it is written.
template <bool kBias>
void unbend_row(const float* a, const Lines lines, const float* by_pulled, float by_value,
                int64_t count, float* by_a, Sums& sums) {
  float slope[kBlock], shift[kBlock];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = i; lane < i + kLanes; ++lane) {
      const Met line = met(a[lane], lines, lane);
      slope[lane] = line.slope;
      shift[lane] = line.shift;
    }
  }
  for (; i < count; ++i) {
    const Met line = met(a[i], lines, i);
    slope[i] = line.slope;
    shift[i] = line.shift;
  }
  float *lower_slope = sums.lower_slope, *lower_shift = sums.lower_shift;
  float *upper_slope = sums.upper_slope, *upper_shift = sums.upper_shift, *bias = sums.bias;
#pragma GCC ivdep
  for (i = 0; i < count; ++i) {
    const float below = 0.5f * (a[i] - std::fabs(a[i])), above = a[i] - below;  // exact
    const float by_bent = kBias ? by_pulled[i] + by_value * lines.bias[i] : by_pulled[i];
    lower_slope[i] += above * by_bent;
    upper_slope[i] += below * by_bent;
    lower_shift[i] += above * by_value;
    upper_shift[i] += below * by_value;
    if (kBias) bias[i] += a[i] * by_value * slope[i];
    by_a[i] = by_bent * slope[i] + by_value * shift[i];
  }
}

inline void put(float* to, const float* sums, int64_t at, int64_t count) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < count; ++i) to[at + i] = sums[i];
}

void unbend_image(const Bend& work, const Gradients& gradients, int64_t image) {
  float unread[kBlock];
  for (int64_t first = 0; first < work.size; first += kBlock) {
    const int64_t count = smaller(kBlock, work.size - first);
    const Lines lines = lines_at(work, image, first);
    Sums sums{};
    for (int64_t row = 0; row < work.rows; ++row) {
      const int64_t line = row * work.images + image, at = line * work.size + first;
      float* by_a = gradients.by_a == nullptr ? unread : gradients.by_a + at;
      const float by_value = gradients.by_value[line];
      if (work.bias != nullptr) {
        unbend_row<true>(work.a + at, lines, gradients.by_pulled + at, by_value, count, by_a, sums);
      } else {
        unbend_row<false>(work.a + at, lines, gradients.by_pulled + at, by_value, count, by_a,
                          sums);
      }
    }
    const int64_t at = image * work.size + first;
    put(gradients.by_lower_slope, sums.lower_slope, at, count);
    put(gradients.by_lower_shift, sums.lower_shift, at, count);
    put(gradients.by_upper_slope, sums.upper_slope, at, count);
    put(gradients.by_upper_shift, sums.upper_shift, at, count);
    put(gradients.by_bias, sums.bias, at, count);
  }
}

}  // namespace
}  // namespace relaxation
}  // namespace pyrobust
