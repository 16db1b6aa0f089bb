// The loops of a norm. Included by the file of each instruction set: no branches, so that the
// compiler makes vectors of them, and sums by eight partial ones.
//
// y = d / sqrt((d^2 + R) / n + eps), with d = x - mean(x) or x, and R the sum of the squares of the
// others, rises in d and falls in size in R. pyrobust/interval/normalization.py has the ends of d
// and R and what evaluations may add; names here are the same.
#pragma once

#include <cmath>

#include "core/rounding.h"
#include "transformer/kernels.h"
#include "transformer/outward.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr int64_t kParts = 8;
constexpr double kLeastSquare = 0x1p-1000;

struct Parts {
  double of[kParts] = {};

  double total() const {
    return ((of[0] + of[4]) + (of[2] + of[6])) + ((of[1] + of[5]) + (of[3] + of[7]));
  }

  double largest() const {
    double most = of[0];
    for (const double part : of) most = larger(most, part);
    return most;
  }
};

// What is known of the row: sums of both ends, of the larger magnitudes and of their squares, and
// the largest of all.
struct RowSums {
  double low, high, size, squares, largest;
};

RowSums sums_of_row(const float* lower, const float* upper, int64_t count) {
  Parts low, high, size, squares, largest;
  const auto add = [&](int64_t i, int64_t lane) {
    const double a = lower[i], b = upper[i];
    const double most = larger(std::fabs(a), std::fabs(b));
    low.of[lane] += a;
    high.of[lane] += b;
    size.of[lane] += most;
    squares.of[lane] += most * most;
    largest.of[lane] = larger(largest.of[lane], most);
  };
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    for (int64_t lane = 0; lane < kParts; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) add(i, lane);
  return {low.total(), high.total(), size.total(), squares.total(), largest.largest()};
}

// Ends of the deviations, and the sums of their least and greatest squares.
struct Deviations {
  double* low;
  double* high;
  double least, most;
};

void deviate(const RowNorm& work, const NormConstants& constants, const RowSums& sums, int64_t at,
             Deviations* result) {
  const double n = static_cast<double>(work.count);
  const double centred = work.centred ? 1.0 : 0.0;
  const double mean_low = centred * (sums.low / n), mean_high = centred * (sums.high / n);
  const double part = centred / n, unit = centred * constants.unit;
  const double slack = unit * (sums.size / n) + centred * constants.flushed;
  const float *lower = work.lower + at, *upper = work.upper + at;
  double* __restrict low = result->low;
  double* __restrict high = result->high;
  for (int64_t i = 0; i < work.count; ++i) {
    const double a = lower[i], b = upper[i], own = (b - a) * part;
    const double error = unit * larger(std::fabs(a), std::fabs(b)) + slack;
    low[i] = a - mean_high + own - error;
    high[i] = b - mean_low - own + error;
  }
}

void sum_squares(int64_t count, Deviations* row) {
  const double *low = row->low, *high = row->high;
  Parts least, most;
  const auto add = [&](int64_t i, int64_t lane) {
    const double inner = at_least_zero(larger(low[i], -high[i])), outer = larger(high[i], -low[i]);
    least.of[lane] += inner * inner;
    most.of[lane] += outer * outer;
  };
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    for (int64_t lane = 0; lane < kParts; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) add(i, lane);
  row->least = least.total();
  row->most = most.total();
}

// Numbers of a row for its quotients. `balanced`: the deviations sum to zero but for `drift`, so
// that R >= (|d| - drift)^2 / rest - lost.
struct RowOf {
  double n, rest, eps, drift, lost, slack;
  bool balanced, deployed;
  double turn, last_turn;  // of y, where the balance bounds R
};

inline double quotient(double end, double others, const RowOf& of) {
  const double opposite = at_least_zero(std::fabs(end) - of.drift);
  const double bound = opposite * opposite / of.rest - of.lost;
  const double sum = of.balanced ? larger(others, bound) : others;
  const double square = at_least_zero(end * end + sum) / of.n + of.eps;
  return end / std::sqrt(larger(square, kLeastSquare));
}

// |y| of a deviation in an evaluation whose variance lost all it can.
template <bool kBalanced>
inline double reached(double deviation, double fewest, const RowOf& of) {
  const double square = deviation * deviation;
  const double far = at_least_zero(deviation - of.drift), opposite = far * far / of.rest;
  const double others = kBalanced ? larger(fewest, opposite - of.lost) : fewest;
  const double parts = square + std::fabs(fewest) + (kBalanced ? opposite + of.lost : 0.0);
  const double left = at_least_zero(square + others - parts * 0x1p-46);
  return deviation / std::sqrt(larger(left / of.n + of.eps, kLeastSquare));
}

// How far deviations between `inner` and |end| get beyond the quotient of `end`, at the end or
// where y turns: normalization.py derives the four places.
template <bool kBalanced>
inline double beyond_end(double end, double inner, double fewest, const RowOf& of) {
  const double size = std::fabs(end);
  const auto reached_at = [&](double turn) {  // a NaN counts as `inner`
    return reached<kBalanced>(smaller(larger(turn, inner), size), fewest, of);
  };
  const double alone = reached_at(std::sqrt(at_least_zero(-fewest)));
  const double border = of.drift + std::sqrt(of.rest * at_least_zero(fewest + of.lost));
  double most = larger(reached<kBalanced>(size, fewest, of), alone);
  if (kBalanced) {
    most = larger(
        most, larger(reached_at(border), larger(reached_at(of.turn), reached_at(of.last_turn))));
  }
  return at_least_zero(most - quotient(size, fewest, of));
}

RowOf row_of(const RowNorm& work, const NormConstants& constants, const RowSums& sums,
             const Deviations& row) {
  RowOf of{};
  of.n = static_cast<double>(work.count);
  of.rest = larger(of.n - 1.0, 1.0);
  of.eps = work.eps;
  of.deployed = work.deployed;
  of.balanced = work.centred && work.count > 1;
  of.slack = 4.0 * constants.unit * (row.most + sums.squares) + 2.0 * constants.flushed;
  if (!of.balanced || !work.deployed) return of;
  of.drift = (2.0 * constants.unit * sums.size + of.n * constants.flushed) * (1.0 + 0x1p-30);
  of.lost = of.slack;
  const double square = of.drift * of.drift;
  of.turn = (of.drift + std::sqrt(of.rest * at_least_zero(of.n * of.lost - square))) / of.n;
  of.last_turn = (square + of.rest * (of.n * of.eps - of.lost)) / of.drift;
  return of;
}

// Sums of squares of the other elements.
struct Others {
  double fewest, most;
};

inline Others others_of(double low, double high, const Deviations& row, const RowOf& of) {
  const double inner = at_least_zero(larger(low, -high)), outer = larger(high, -low);
  const double fewest = at_least_zero(row.least - inner * inner) - of.slack;
  return {of.deployed ? fewest : at_least_zero(fewest),
          at_least_zero(row.most - outer * outer) + of.slack};
}

// Ends of y in float64, in place of those of d.
void quotients(int64_t count, const RowOf& of, const Deviations& row) {
  double *low = row.low, *high = row.high;
  for (int64_t i = 0; i < count; ++i) {
    const double a = low[i], b = high[i];
    const Others others = others_of(a, b, row, of);
    low[i] = quotient(a, a > 0.0 ? others.most : others.fewest, of);
    high[i] = quotient(b, b > 0.0 ? others.fewest : others.most, of);
  }
}

// Whether y rises in d in every evaluation of the row: no variance is lost as a whole, and the
// balance bounds no R (as (|d| - drift)^2 / rest - lost is below d^2 / rest).
bool rises(int64_t count, const RowOf& of, const Deviations& row) {
  int32_t turning = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double a = row.low[i], b = row.high[i], size = larger(std::fabs(a), std::fabs(b));
    const double fewest = others_of(a, b, row, of).fewest;
    turning |= (fewest > 0.0 ? 0 : 1) | (size * size < of.rest * fewest ? 0 : 1);
  }
  return turning == 0;
}

template <bool kBalanced>
void add_beyond(int64_t count, const RowOf& of, const Deviations& row, double* below,
                double* above) {
  for (int64_t i = 0; i < count; ++i) {
    const double a = row.low[i], b = row.high[i];
    const double fewest = others_of(a, b, row, of).fewest;
    below[i] = beyond_end<kBalanced>(a, at_least_zero(-b), fewest, of);
    above[i] = beyond_end<kBalanced>(b, at_least_zero(a), fewest, of);
  }
}

// y widened by its errors: in real arithmetic each end's own, else the larger of both.
void widen(const RowNorm& work, const NormConstants& constants, const Deviations& row,
           const double* below, const double* above) {
  constexpr double kTiny = 0x1p-126;
  double *low = row.low, *high = row.high;
  for (int64_t i = 0; i < work.count; ++i) {
    const double a = low[i], b = high[i];
    const double of_low = std::fabs(a) * constants.relative;
    const double of_high = std::fabs(b) * constants.relative;
    const double both = larger(of_low, of_high) + 5.0 * kTiny;
    low[i] = a - (work.deployed ? both + below[i] : of_low + kTiny);
    high[i] = b + (work.deployed ? both + above[i] : of_high + kTiny);
  }
}

// The line of real arithmetic: w y + b with two roundings in float64.
inline float real_end(double y, double w, double b) {
  const double product = y * w, sum = product + b;
  const double error = kStep * (std::fabs(product) + std::fabs(sum));
  const double rounded = product == 0.0 ? 0.0 : error;
  return float_down(sum - rounded);
}

// That of evaluations: y is a float, w y is rounded to one, and so is the sum, of which `error`
// covers both forms (_as_one_line in normalization.py).
inline double rounded_product(double y, double w) { return float_down(y * w); }

inline float deployed_end(double product, double b, double error, double least) {
  const double sum = product + b;
  return flushed(float_down(sum - error - kStep * std::fabs(sum)), static_cast<float>(least));
}

bool put(const RowNorm& work, const NormConstants& constants, int64_t at, const Deviations& row) {
  float* __restrict lower = work.out_lower + at;
  float* __restrict upper = work.out_upper + at;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const float low = flushed(float_down(row.low[i]), constants.least);
    const float high = flushed(float_down(-row.high[i]), constants.least);
    unbounded |= odd(low) | odd(high);
    lower[i] = low;
    upper[i] = -high;
  }
  return unbounded == 0;
}

// Without a weight, ones; without a bias, zeros.
template <bool kDeployed, bool kWeight, bool kBias>
bool put_line(const RowNorm& work, const NormConstants& constants, int64_t at, int64_t line,
              double flushes, const Deviations& row) {
  constexpr double kFour = 4.0 * rounding::kUnit;
  const float* weight = work.weight + line;
  const float* bias = work.bias + line;
  float* __restrict lower = work.out_lower + at;
  float* __restrict upper = work.out_upper + at;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double w = kWeight ? weight[i] : 1.0, b = kBias ? bias[i] : 0.0;
    const double below = row.low[i], above = row.high[i];
    const double y = kDeployed ? float_down(below) : below;
    const double z = kDeployed ? -static_cast<double>(float_down(-above)) : above;
    const double first = w < 0.0 ? z : y, last = w < 0.0 ? y : z;
    float low, high;
    if (kDeployed) {
      const double error = kFour * std::fabs(b) + flushes;
      low = deployed_end(kWeight ? rounded_product(first, w) : first, b, error, constants.least);
      high = deployed_end(kWeight ? rounded_product(-last, w) : -last, -b, error, constants.least);
    } else {
      low = real_end(first, w, b);
      high = real_end(-last, w, -b);
    }
    unbounded |= odd(low) | odd(high) | odd(static_cast<float>(y)) | odd(static_cast<float>(z));
    lower[i] = low;
    upper[i] = -high;
  }
  return unbounded == 0;
}

template <bool kDeployed>
bool put_lines(const RowNorm& work, const NormConstants& constants, int64_t at, int64_t line,
               double flushes, const Deviations& row) {
  if (work.weight == nullptr) {
    return put_line<kDeployed, false, true>(work, constants, at, line, 0.0, row);
  }
  return work.bias == nullptr
             ? put_line<kDeployed, true, false>(work, constants, at, line, flushes, row)
             : put_line<kDeployed, true, true>(work, constants, at, line, flushes, row);
}

bool put_row(const RowNorm& work, const NormConstants& constants, int64_t row_index, double largest,
             const Deviations& row) {
  const int64_t at = row_index * work.count, line = row_index % work.weight_rows * work.count;
  if (work.weight == nullptr && work.bias == nullptr) return put(work, constants, at, row);
  // what flushing takes from weight / deviation, times twice the largest |x|
  const double flushes = 0x1p-126 * (4.0 + 2.0 * largest);
  return work.deployed ? put_lines<true>(work, constants, at, line, flushes, row)
                       : put_lines<false>(work, constants, at, line, flushes, row);
}

bool norm_row(const RowNorm& work, const NormConstants& constants, int64_t row_index,
              double* scratch) {
  constexpr double kLargest = 3.4028234663852886e38;
  const int64_t at = row_index * work.count;
  const RowSums sums = sums_of_row(work.lower + at, work.upper + at, work.count);
  // squares of deviations, up to twice as far as x, may be summed before the division
  if (!(work.deployed ? 4.0 * sums.squares < kLargest / 4.0 : sums.squares < 1e300)) return false;
  Deviations row{scratch, scratch + work.count, 0.0, 0.0};
  double *below = scratch + 2 * work.count, *above = scratch + 3 * work.count;
  deviate(work, constants, sums, at, &row);
  sum_squares(work.count, &row);
  const RowOf of = row_of(work, constants, sums, row);
  if (!work.deployed || rises(work.count, of, row)) {
    for (int64_t i = 0; i < 2 * work.count; ++i) below[i] = 0.0;
  } else if (of.balanced) {
    add_beyond<true>(work.count, of, row, below, above);
  } else {
    add_beyond<false>(work.count, of, row, below, above);
  }
  quotients(work.count, of, row);
  widen(work, constants, row, below, above);
  return put_row(work, constants, row_index, sums.largest, row);
}

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
