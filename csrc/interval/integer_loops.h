// The loops of integers.h in plain C++, included by the file of each instruction set and compiled
// with its flags: every operation is written out and rounds the same everywhere.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/rounding.h"
#include "interval/ends.h"
#include "interval/integers.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int kLanesOfLoop = 16;

// The least float of 8 significant bits that is at least `value`, which is far from overflow.
inline float eight_bits_up(double value) {
  const uint32_t bits = bits_of_float(rounding::to_float_up(value));
  return float_from_bits((bits + 0xffffu) & 0xffff0000u);
}

// The integer next to |x| < 2^21.
inline int32_t nearest_integer(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its last bit is worth 1
  return static_cast<int32_t>(bits_of_float(x + kMagic)) -
         static_cast<int32_t>(bits_of_float(kMagic));
}

// The ends of sixteen columns, after the floor; absent ones repeat the first.
struct ColumnEnds {
  float low[kLanesOfLoop], high[kLanesOfLoop];

  ColumnEnds(const Ends& ends, int64_t from, int64_t count) {
    if (count >= kLanesOfLoop) {
      for (int l = 0; l < kLanesOfLoop; ++l) {
        low[l] = ends.lower[from + l];
        high[l] = ends.upper[from + l];
      }
    } else {
      for (int l = 0; l < kLanesOfLoop; ++l) {
        const int64_t k = from + (l < count ? l : 0);
        low[l] = ends.lower[k];
        high[l] = ends.upper[k];
      }
    }
    for (int l = 0; l < kLanesOfLoop; ++l) {  // a NaN stays
      low[l] = low[l] < ends.floor ? ends.floor : low[l];
      high[l] = high[l] < ends.floor ? ends.floor : high[l];
    }
  }
};

// Over the columns of a group: the least and the largest midpoint, the largest |end|, and a number
// that is 0 unless an end is infinite or NaN.
struct Extent {
  float least, most, largest, defect;
};

inline Extent extent_of(const Ends& ends, int64_t begin, int64_t count) {
  float least[kLanesOfLoop], most[kLanesOfLoop], largest[kLanesOfLoop], defect[kLanesOfLoop];
  for (int l = 0; l < kLanesOfLoop; ++l) {
    least[l] = rounding::infinity();
    most[l] = -rounding::infinity();
    largest[l] = defect[l] = 0.0f;
  }
  for (int64_t k = 0; k < count; k += kLanesOfLoop) {
    const ColumnEnds x(ends, begin + k, count - k);
    for (int l = 0; l < kLanesOfLoop; ++l) {
      const float c = 0.5f * x.low[l] + 0.5f * x.high[l];
      const float a = std::fabs(x.low[l]), b = std::fabs(x.high[l]);
      const float size = a < b ? b : a;
      least[l] = c < least[l] ? c : least[l];
      most[l] = c > most[l] ? c : most[l];
      largest[l] = size > largest[l] ? size : largest[l];
      defect[l] += (x.low[l] - x.low[l]) + (x.high[l] - x.high[l]);
    }
  }
  Extent all{least[0], most[0], largest[0], defect[0]};
  for (int l = 1; l < kLanesOfLoop; ++l) {
    all.least = least[l] < all.least ? least[l] : all.least;
    all.most = most[l] > all.most ? most[l] : all.most;
    all.largest = largest[l] > all.largest ? largest[l] : all.largest;
    all.defect += defect[l];
  }
  return all;
}

// The integers that centres of a group become.
struct CentreGrid {
  float step, inverse;
  int32_t shift;

  explicit CentreGrid(const Extent& extent) {
    constexpr double kLeastStep = 7.888609052210118e-31;  // 2^-100
    const double low = extent.least < 0.0f ? extent.least : 0.0;
    const double size = std::fmax(std::fabs(low), extent.most);
    const double range = std::fmax(extent.most - low, size);
    step = eight_bits_up(std::fmax(range / 65535.0, kLeastStep));
    inverse = 1.0f / step;
    shift = extent.least < 0.0f ? nearest_integer(extent.least * inverse) - 1 : 0;
  }
};

// Those of its radii, of which `most` is the largest: the quotient by the inverse is no less than
// that by the step.
struct RadiusGrid {
  float step, inverse;

  explicit RadiusGrid(float most)
      : step(eight_bits_up(static_cast<double>(most) / 32600.0)),
        inverse(1.0f / step * (1.0f + 1.0f / 1048576.0f)) {}
};

struct LoopsOfInput {
  static Extent extent(const Ends& ends, int64_t begin, int64_t count) {
    return extent_of(ends, begin, count);
  }

  // q of group g, their sum, and to scratch r' of what lies around the centres; the largest r'.
  static float place_centres(const IntegerPrepare& work, const CentreGrid& grid, int64_t g) {
    const IntegerInput& out = *work.out;
    const IntegerConstants& constants = work.constants;
    const int64_t count = out.count(g);
    int16_t* centre = out.centre + g * out.stride;
    float largest[kLanesOfLoop] = {};
    uint32_t total[kLanesOfLoop] = {};
    for (int64_t k = 0; k < count; k += kLanesOfLoop) {
      const ColumnEnds x(work.ends, g * out.group + k, count - k);
      for (int l = 0; l < kLanesOfLoop; ++l) {
        const float c = 0.5f * x.low[l] + 0.5f * x.high[l];
        int32_t q = nearest_integer(c * grid.inverse) - grid.shift;
        q = q < 0 ? 0 : q;
        q = q > 65535 ? 65535 : q;
        const float at = static_cast<float>(q + grid.shift) * grid.step;  // exact
        const float up = x.high[l] - at, down = at - x.low[l];
        const float reach = (up < down ? down : up) * constants.radius_gain;
        const float radius =
            (reach + std::fabs(at) * constants.centre_gain) * kSlack + constants.input_floor;
        centre[k + l] = static_cast<int16_t>(q - 32768);
        work.scratch[k + l] = radius;
        largest[l] = radius > largest[l] ? radius : largest[l];
        total[l] += k + l < count ? static_cast<uint32_t>(q) : 0u;
      }
    }
    int64_t sum = 0;
    float most = 0.0f;
    for (int l = 0; l < kLanesOfLoop; ++l) {
      most = largest[l] > most ? largest[l] : most;
      sum += total[l];
    }
    out.total[g] = sum;
    return most;
  }

  // p of group g; their sum.
  static int64_t place_radii(const IntegerPrepare& work, const RadiusGrid& grid, int64_t g) {
    const IntegerInput& out = *work.out;
    int16_t* radius = out.radius + g * out.stride;
    int32_t sum = 0;  // below 2^16 * 32640
    for (int64_t k = 0; k < out.count(g); ++k) {
      const float quotient = work.scratch[k] * grid.inverse;
      const int32_t p = static_cast<int32_t>(quotient < 0.0f ? 0.0f : quotient) + 1;
      radius[k] = static_cast<int16_t>(p);
      sum += p;
    }
    return sum;
  }
};

template <typename Set>
void prepare_integers(const IntegerPrepare& work) {
  IntegerInput& out = *work.out;
  for (int64_t g = work.first; g < work.last; ++g) {
    const int64_t count = out.count(g);
    const Extent extent = Set::extent(work.ends, g * out.group, count);
    out.largest[g] = rounding::infinity();
    if (!(extent.defect == 0.0f)) continue;
    const CentreGrid centres(extent);
    const float most = Set::place_centres(work, centres, g);
    if (!rounding::is_finite(most)) continue;
    const RadiusGrid spread(most);
    out.spread[g] = Set::place_radii(work, spread, g);
    std::fill(out.centre + g * out.stride + count, out.centre + (g + 1) * out.stride,
              int16_t{-32768});
    std::fill(out.radius + g * out.stride + count, out.radius + (g + 1) * out.stride, int16_t{0});
    out.step[g] = centres.step;
    out.shift[g] = centres.shift;
    out.radius_step[g] = spread.step;
    out.largest[g] = extent.largest;
  }
}

// --- rows in the canonical layout

// Sums of a row over a group: of w q', of |w| p and of w, where q' = q - 2^15.
struct GroupSums {
  int64_t centre = 0, radius = 0, weights = 0;
};

inline GroupSums group_of_row(const uint8_t* code, int64_t count, int shift, int zero,
                              const int16_t* centre, const int16_t* radius) {
  constexpr int64_t kRunOfSums = 256;
  GroupSums all;
  for (int64_t k = 0; k < count; k += kRunOfSums) {
    const int64_t stop = count - k < kRunOfSums ? count : k + kRunOfSums;
    int32_t c = 0, r = 0, sum = 0;
    for (int64_t i = k; i < stop; ++i) {  // in 16 bits, so that two products are one instruction
      const auto w = static_cast<int16_t>((static_cast<int>(code[i]) << shift) - zero);
      const auto size = static_cast<int16_t>(w < 0 ? -w : w);
      c += static_cast<int32_t>(w) * static_cast<int32_t>(centre[i]);
      r += static_cast<int32_t>(size) * static_cast<int32_t>(radius[i]);
      sum += w;
    }
    all.centre += c;
    all.radius += r;
    all.weights += sum;
  }
  return all;
}

void integer_rows(const IntegerDots& work) {
  const matmul::PackedMatrix& weight = *work.weight;
  const IntegerInput& input = *work.input;
  const int doubled = matmul::code_multiplier(weight) - 1;
  for (int64_t n = 0; n < work.rows; ++n) {
    const int64_t row = work.first + n, at = matmul::scale_row(weight, row);
    const uint8_t* codes = matmul::code_bytes(weight, row, work.scratch);
    double centre = 0.0, radius = 0.0;
    for (int64_t g = 0; g < input.groups; ++g) {
      const int64_t count = input.count(g);
      const int zero = matmul::zero_at(weight, at + g);
      const double scale = matmul::scale_at(weight, at + g);
      const GroupSums sums =
          group_of_row(codes + g * input.group, count, doubled, zero,
                       input.centre + g * input.stride, input.radius + g * input.stride);
      const int64_t c = sums.centre + (int64_t{32768} + input.shift[g]) * sums.weights;
      const int64_t r = sums.radius;
      centre += static_cast<double>(c) * (scale * static_cast<double>(input.step[g]));
      radius +=
          static_cast<double>(r) * (std::fabs(scale) * static_cast<double>(input.radius_step[g]));
    }
    const double outer = weight.row_scale != nullptr ? weight.row_scale[row] : 1.0;
    work.centre_sums[n] = centre * outer;
    work.radius_sums[n] = radius * std::fabs(outer);
  }
}

// --- ends

// Slack of the roundings of these lines, of a value and of a radius, and where an end might not be
// a float.
constexpr double kSlackOfDouble = 1.0 + 1.0 / 281474976710656.0;  // 1 + 2^-48
constexpr double kSlackOfValue = 1.0 / 1125899906842624.0;        // 2^-50
constexpr double kMostOfFloat = 3.4028e38;

bool finish_integers(const IntegerEnds& work, const IntegerConstants& constants) {
  const float infinity = rounding::infinity();
  bool finite = true;
  for (int64_t n = 0; n < work.count; ++n) {
    const double shift = work.bias != nullptr ? static_cast<double>(work.bias[n]) : 0.0;
    const double value = work.centre_sums[n] + shift, size = std::fabs(value);
    double radius = work.radius_sums[n] * constants.inflate + work.offset;
    radius += std::fabs(shift) * constants.bias_gain + size * constants.value_gain;
    radius = radius * kSlackOfDouble + size * kSlackOfValue;
    const bool bounded =
        radius < constants.limit && size + radius < kMostOfFloat;  // false for a NaN
    float low = rounding::below(static_cast<float>(value - radius));
    float high = rounding::above(static_cast<float>(value + radius));
    low = low > 0.0f && low < constants.least ? 0.0f : low;
    high = high < 0.0f && high > -constants.least ? 0.0f : high;
    work.out_lower[n] = bounded ? low : -infinity;
    work.out_upper[n] = bounded ? high : infinity;
    finite &= bounded;
  }
  return finite;
}

constexpr IntegerKernels kIntegerLoops = {prepare_integers<LoopsOfInput>, integer_rows,
                                          finish_integers, nullptr, nullptr};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
