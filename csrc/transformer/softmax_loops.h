// The softmax of rows. Included by the file of each instruction set.
//
// softmax_i = e^(x_i - t) / (e^(x_i - t) + sum of the others), t the largest upper end: the lower
// end takes e of its own lower end and the others' upper ones, the upper end the reverse. The sum
// of the others is that of all less the own term, or, where the own term is more than half, summed
// anew: so it has the relative error of a sum.
#pragma once

#include <cmath>

#include "interval/exponential.h"
#include "interval/half_lanes.h"
#include "transformer/norm_loops.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr double kInfinite = __builtin_huge_val();
// Exponentials below this count as zero, or as kNothing where they must not be less.
constexpr double kLeastExponent = -700.0;
constexpr double kNothing = 0x1p-1000;
constexpr double kLeastSum = 0x1p-900;  // which no such exponential matters beside

// What a row is between.
struct RowRange {
  double least, low_top, top;
};

RowRange range_of(const float* lower, const float* upper, int64_t count) {
  Parts least, low_top, top;
  for (int64_t lane = 0; lane < kParts; ++lane) {
    least.of[lane] = low_top.of[lane] = top.of[lane] = -kInfinite;
  }
  const auto take = [&](int64_t i, int64_t lane) {
    least.of[lane] = larger(least.of[lane], -lower[i]);
    low_top.of[lane] = larger(low_top.of[lane], lower[i]);
    top.of[lane] = larger(top.of[lane], upper[i]);
  };
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    for (int64_t lane = 0; lane < kParts; ++lane) take(i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) take(i, lane);
  return {-least.largest(), low_top.largest(), top.largest()};
}

// e^(x - top) of `count` numbers, a multiple of the parts of a sum; `nothing` for those that are
// next to it.
void exponentials(const double* x, double top, double nothing, int64_t count, double* to) {
  using interval::Doubles;
  for (int64_t i = 0; i < count; i += interval::kDoubleLanes) {
    Doubles values;
    std::memcpy(&values, x + i, sizeof(values));
    const Doubles moved = values - top;
    const Doubles tail = values == interval::all_lanes(-kInfinite) ? interval::all_lanes(0.0)
                                                                   : interval::all_lanes(nothing);
    const Doubles found =
        moved < interval::all_lanes(kLeastExponent) ? tail : interval::exponential(moved);
    std::memcpy(to + i, &found, sizeof(found));
  }
}

double sum_of(const double* terms, int64_t count) {
  Parts parts;
  for (int64_t i = 0; i < count; i += kParts) {
    for (int64_t lane = 0; lane < kParts; ++lane) parts.of[lane] += terms[i + lane];
  }
  return parts.total();
}

// The sums of the others.
void sums_of_others(const double* terms, int64_t count, double* others) {
  const double total = sum_of(terms, count);
  int32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    others[i] = total - terms[i];
    any |= terms[i] > 0.5 * total ? 1 : 0;
  }
  if (any == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    if (terms[i] <= 0.5 * total) continue;
    double rest = 0.0;
    for (int64_t j = 0; j < count; ++j) rest += j == i ? 0.0 : terms[j];
    others[i] = rest;
  }
}

// How far numbers of the row are from zero and from the largest, which differences lose digits of.
double spread_of(const RowRange& range, double range_of_exponential) {
  const auto of = [&](double top) {
    return std::fabs(top) + smaller(top - range.least, range_of_exponential);
  };
  return larger(of(range.top), of(range.low_top));
}

// What a row is divided into: exponentials of its lower and upper ends, and sums of the others'.
struct SoftmaxTerms {
  const double *low, *high, *of_low, *of_high;
  double relative;  // error
};

inline interval::Doubles load_terms(const double* from) {
  interval::Doubles terms;
  std::memcpy(&terms, from, sizeof(terms));
  return terms;
}

// By registers: gcc makes none of one loop with doubles, floats and conditions of both.
template <bool kDeployed>
bool put_softmax(const RowSoftmax& work, const SoftmaxConstants& constants, int64_t at,
                 const SoftmaxTerms& terms) {
  using interval::Doubles;
  using interval::HalfFloats;
  using interval::Longs;
  const HalfFloats none = {}, one = none + 1.0f;
  Longs lost = {};  // where a sum is too small
  HalfFloats odd = {};
  for (int64_t i = 0; i < work.count; i += interval::kDoubleLanes) {
    const int64_t rest = work.count - i;
    const Doubles low = load_terms(terms.low + i), high = load_terms(terms.high + i);
    Doubles below = low + load_terms(terms.of_high + i);
    Doubles above = high + load_terms(terms.of_low + i);
    for (int64_t lane = rest; lane < interval::kDoubleLanes; ++lane)
      below[lane] = above[lane] = 1.0;
    lost |= ~(below > kLeastSum) | ~(above > kLeastSum);
    const Doubles a = low / below, b = high / above, most = terms.relative * b + constants.tiny;
    const Doubles error = kDeployed ? most : terms.relative * a;
    const HalfFloats end = interval::floats_below(a - error - kStep * a);
    const HalfFloats down = end < constants.least ? none : end;
    const HalfFloats over = interval::floats_above(b + most + kStep * b);
    const HalfFloats up = over > 1.0f ? one : over;
    odd = odd + ((down - down) + (up - up));
    interval::store_lanes_of(work.out_lower + at + i, rest, down);
    interval::store_lanes_of(work.out_upper + at + i, rest, up);
  }
  bool bounded = true;
  for (int lane = 0; lane < interval::kDoubleLanes; ++lane) {
    bounded &= lost[lane] == 0 && odd[lane] == 0.0f;
  }
  return bounded;
}

bool softmax_row(const RowSoftmax& work, const SoftmaxConstants& constants, int64_t row,
                 double* scratch) {
  const int64_t at = row * work.count, padded = padded_count(work.count);
  const RowRange range = range_of(work.lower + at, work.upper + at, work.count);
  if (!(range.low_top > -kInfinite && range.top < kInfinite)) return false;
  double *x = scratch, *low = x + padded, *high = low + padded;
  double *of_low = high + padded, *of_high = of_low + padded;  // sums of the others
  const auto fill = [&](const float* ends) {
    for (int64_t i = 0; i < work.count; ++i) x[i] = ends[i];
    for (int64_t i = work.count; i < padded; ++i) x[i] = -kInfinite;
  };
  fill(work.lower + at);
  exponentials(x, range.top, 0.0, padded, low);
  fill(work.upper + at);
  exponentials(x, range.top, kNothing, padded, high);
  sums_of_others(low, padded, of_low);
  sums_of_others(high, padded, of_high);
  const double relative = constants.relative + constants.of_spread * spread_of(range, 800.0) +
                          constants.of_spread32 * spread_of(range, 128.0);
  const SoftmaxTerms terms{low, high, of_low, of_high, relative};
  return work.deployed ? put_softmax<true>(work, constants, at, terms)
                       : put_softmax<false>(work, constants, at, terms);
}

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
