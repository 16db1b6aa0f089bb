// The loops of pairs.h. Included by the file of each instruction set; the bits are the same in all.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "interval/half_lanes.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// Ends of two boxes in double.
struct PairOf {
  Doubles low_x, high_x, low_y, high_y;
};

struct PairEnds {
  Doubles lower, upper;
};

// a + b, or the double below where that is above the exact sum: three quarters of 2^-52 of it are
// at least one and less than one and a half units (but of a power of two, where no float is near).
// Sums of floats are no denormals in double.
inline Doubles sum_below(Doubles a, Doubles b) {
  const Doubles sum = a + b, part = sum - a;
  const Doubles error = (a - (sum - part)) + (b - part);
  return error < 0.0 ? sum - magnitude_of(sum) * 0x1.8p-53 : sum;
}

// By two-sum. The sum with an infinite number is that number: no float lies beyond.
struct Sum {
  static constexpr bool kKeepsInfinity = true;
  template <bool kOutward>
  static PairEnds ends(const PairOf& of, Doubles*) {
    if (!kOutward) return {of.low_x + of.low_y, of.high_x + of.high_y};
    return {sum_below(of.low_x, of.low_y), -sum_below(-of.high_x, -of.high_y)};
  }
};

// Corners a op b of both ends of each, and how much of the least (or, of negated ones, the
// greatest) belongs to which.
struct Corners {
  Doubles of[4];

  Doubles least() const { return smaller_of(smaller_of(of[0], of[1]), smaller_of(of[2], of[3])); }
  Doubles greatest() const { return larger_of(larger_of(of[0], of[1]), larger_of(of[2], of[3])); }

  // NaN where a corner is not finite.
  Doubles odd() const {
    const Doubles sum = (of[0] + of[1]) + (of[2] + of[3]);
    return sum - sum;
  }

  Corners shares_of_least() const {
    Corners shares = {{all_lanes(1.0), {}, {}, {}}};
    Doubles least = of[0];
    for (int i = 1; i < 4; ++i) {
      const Doubles left =
          of[i] < least ? Doubles{} : (of[i] == least ? all_lanes(0.5) : all_lanes(1.0));
      for (int j = 0; j < i; ++j) shares.of[j] *= left;
      shares.of[i] = 1.0 - left;
      least = smaller_of(least, of[i]);
    }
    return shares;
  }

  Corners negated() const { return {{-of[0], -of[1], -of[2], -of[3]}}; }
};

// Products of floats are exact in double.
struct Product {
  static Corners corners(const PairOf& of) {
    return {
        {of.low_x * of.low_y, of.low_x * of.high_y, of.high_x * of.low_y, of.high_x * of.high_y}};
  }
  static Doubles slope_x(Doubles, Doubles y) { return y; }
  static Doubles slope_y(Doubles x, Doubles) { return x; }
};

// a / b and a float f differ by 2^-48 of it, if at all, as a and f b have 24 and 48 bits. So the
// nearest double lies on the same side of all floats.
struct Quotient {
  static Corners corners(const PairOf& of) {
    return {
        {of.low_x / of.low_y, of.low_x / of.high_y, of.high_x / of.low_y, of.high_x / of.high_y}};
  }
  static Doubles slope_x(Doubles, Doubles y) { return 1.0 / y; }
  static Doubles slope_y(Doubles x, Doubles y) { return -x / (y * y); }
};

template <typename Of>
struct ByCorners {
  static constexpr bool kKeepsInfinity = false;
  template <bool kOutward>
  static PairEnds ends(const PairOf& of, Doubles* odd) {
    const Corners corners = Of::corners(of);
    *odd = *odd + corners.odd();
    if (std::is_same<Of, Quotient>::value) {
      const Longs zero = (of.low_y <= 0.0) & (of.high_y >= 0.0);
      *odd = zero ? all_lanes(std::numeric_limits<double>::quiet_NaN()) : *odd;
    }
    return {corners.least(), corners.greatest()};
  }
};

struct FloatEnds {
  HalfFloats lower, upper;
};

// `rounded` but where `exact` is infinite or NaN: sums of floats are below 2^129.
inline HalfFloats unless_infinite(HalfFloats rounded, Doubles exact) {
  const HalfFloats small = to_nearest(exact * 0x1p-10);
  return small - small == 0.0f ? rounded : small;
}

template <Rounding kRounding, bool kKeepsInfinity>
FloatEnds floats_around(PairEnds ends) {
  constexpr double kTiny = std::numeric_limits<float>::min();
  if (kRounding == Rounding::kNearest) return {to_nearest(ends.lower), to_nearest(ends.upper)};
  if (kRounding == Rounding::kDeployed) {  // what a processor that flushes denormals reads
    ends.lower = ends.lower < kTiny ? smaller_of(ends.lower, Doubles{}) : ends.lower;
    ends.upper = ends.upper > -kTiny ? larger_of(ends.upper, Doubles{}) : ends.upper;
  }
  const FloatEnds floats = {floats_below(ends.lower), floats_above(ends.upper)};
  if (!kKeepsInfinity) return floats;
  return {unless_infinite(floats.lower, ends.lower), unless_infinite(floats.upper, ends.upper)};
}

inline PairOf pair_at(const float* low_x, const float* high_x, const float* low_y,
                      const float* high_y, int64_t i, int64_t rest) {
  return {load_lanes_of(low_x + i, rest), load_lanes_of(high_x + i, rest),
          load_lanes_of(low_y + i, rest), load_lanes_of(high_y + i, rest)};
}

// Where a pass reads its operands, in the order of the operation, and what products and quotients
// step by. `kPoint`: the constant is one number.
template <bool kPoint, bool kReversed>
struct ConstantOperand {
  const BoxConstant& work;
  double step;  // of the value: 0, or more than half a unit and less than two

  explicit ConstantOperand(const BoxConstant& of) : work(of), step(0.0) {
    const auto held = [](double value) { return static_cast<float>(value) == value; };
    if (!held(of.first) || !held(of.last)) step = 0x1.8p-53;
  }

  PairOf at(int64_t i, int64_t rest) const {
    const Doubles low = load_lanes_of(work.lower + i, rest);
    const Doubles high = load_lanes_of(work.upper + i, rest);
    const Doubles first = all_lanes(work.first), last = kPoint ? first : all_lanes(work.last);
    if (kReversed) return {first, last, low, high};
    return {low, high, first, last};
  }
};

struct PairOperands {
  const BoxPair& work;
  static constexpr double step = 0.0;

  PairOf at(int64_t i, int64_t rest) const {
    return pair_at(work.low_x, work.high_x, work.low_y, work.high_y, i, rest);
  }
};

template <Rounding kRounding, bool kSwapped, typename Op, typename Operands>
bool pair_ends(const Operands& operands) {
  const auto& work = operands.work;
  Doubles odd = {};  // NaN from the first number on that is not finite
  HalfFloats unbounded = {};
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    PairOf of = operands.at(i, rest);
    if (kSwapped) of = {of.low_x, of.high_x, -of.high_y, -of.low_y};
    PairEnds exact = Op::template ends<kRounding != Rounding::kNearest>(of, &odd);
    if (!Op::kKeepsInfinity && kRounding != Rounding::kNearest) {
      exact.lower = exact.lower - magnitude_of(exact.lower) * operands.step;
      exact.upper = exact.upper + magnitude_of(exact.upper) * operands.step;
    }
    const FloatEnds ends = floats_around<kRounding, Op::kKeepsInfinity>(exact);
    unbounded = unbounded + ((ends.lower - ends.lower) + (ends.upper - ends.upper));
    store_lanes_of(work.out_lower + i, rest, ends.lower);
    store_lanes_of(work.out_upper + i, rest, ends.upper);
  }
  bool finite = true;
  for (int lane = 0; lane < kDoubleLanes; ++lane) {
    finite &= odd[lane] == 0.0 && unbounded[lane] == 0.0f;
  }
  return finite;
}

template <bool kSwapped, typename Op, typename Operands>
bool pair_ends_of(const Operands& of) {
  const Rounding rounding = of.work.rounding;
  if (rounding == Rounding::kReal) return pair_ends<Rounding::kReal, kSwapped, Op>(of);
  if (rounding == Rounding::kNearest) return pair_ends<Rounding::kNearest, kSwapped, Op>(of);
  return pair_ends<Rounding::kDeployed, kSwapped, Op>(of);
}

// A register of floats.
typedef float Floats __attribute__((vector_size(8 * kDoubleLanes)));
typedef uint32_t BitsOfFloats __attribute__((vector_size(8 * kDoubleLanes)));
constexpr int kFloatLanes = 2 * kDoubleLanes;

// Lanes of what is left of an array, the others zero.
inline Floats load_floats(const float* from, int64_t count) {
  Floats values = {};
  if (count >= kFloatLanes) {
    std::memcpy(&values, from, sizeof(values));
  } else {
    std::memcpy(&values, from, static_cast<size_t>(count) * sizeof(float));
  }
  return values;
}

inline void store_floats(float* to, int64_t count, Floats values) {
  if (count >= kFloatLanes) {
    std::memcpy(to, &values, sizeof(values));
  } else {
    std::memcpy(to, &values, static_cast<size_t>(count) * sizeof(float));
  }
}

// The greatest floats that are not above a + b, where those are finite; by two-sum as sum_down.
inline Floats sums_below(Floats a, Floats b) {
#if defined(__AVX512F__)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return reinterpret_cast<Floats>(
      _mm512_add_round_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), kDown));
#else
  const Floats sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  const auto moves = reinterpret_cast<BitsOfFloats>(error < 0.0f);
  const auto bits = reinterpret_cast<BitsOfFloats>(-(0.0f - sum));  // of -0 for either zero
  const BitsOfFloats below = bits + ((bits >> 31) << 1) - 1u;
  return reinterpret_cast<Floats>((below & moves) | (reinterpret_cast<BitsOfFloats>(sum) & ~moves));
#endif
}

template <Rounding kRounding>
Floats lower_sums(Floats a, Floats b) {
  constexpr float kTiny = std::numeric_limits<float>::min();
  if (kRounding == Rounding::kNearest) return a + b;
  const Floats low = sums_below(a, b), zero = {};
  if (kRounding == Rounding::kReal) return low;
  return low < kTiny ? (low < 0.0f ? low : zero) : low;
}

// Sums of floats in float, half the time of doubles. Ends of y are read from memory, or are
// `constant`.
struct FloatSums {
  const float *low_x, *high_x, *low_y, *high_y;
  float constant;
  int64_t count;
  float *lower, *upper;
};

// Whether all are finite; if not, the ends say nothing.
template <Rounding kRounding, bool kConstant, bool kNegated>
bool float_sums(const FloatSums& work) {
  const Floats constant = Floats{} + work.constant;
  Floats odd = {};  // NaN from the first end on that is not finite
  for (int64_t i = 0; i < work.count; i += kFloatLanes) {
    const int64_t rest = work.count - i;
    Floats b = constant, d = constant;
    if (!kConstant) {
      b = load_floats(work.low_y + i, rest);
      d = load_floats(work.high_y + i, rest);
    }
    const Floats low = lower_sums<kRounding>(load_floats(work.low_x + i, rest), kNegated ? -d : b);
    const Floats high =
        -lower_sums<kRounding>(-load_floats(work.high_x + i, rest), kNegated ? b : -d);
    odd = odd + ((low - low) + (high - high));
    store_floats(work.lower + i, rest, low);
    store_floats(work.upper + i, rest, high);
  }
  bool finite = true;
  for (int lane = 0; lane < kFloatLanes; ++lane) finite &= odd[lane] == 0.0f;
  return finite;
}

template <bool kConstant, bool kNegated>
bool float_sums_of(const FloatSums& work, Rounding rounding) {
  if (rounding == Rounding::kReal) return float_sums<Rounding::kReal, kConstant, kNegated>(work);
  return rounding == Rounding::kNearest
             ? float_sums<Rounding::kNearest, kConstant, kNegated>(work)
             : float_sums<Rounding::kDeployed, kConstant, kNegated>(work);
}

template <bool kNegated>
bool sums_of_pair(const BoxPair& work) {
  const FloatSums sums{work.low_x, work.high_x, work.low_y,     work.high_y,
                       0.0f,       work.count,  work.out_lower, work.out_upper};
  return float_sums_of<false, kNegated>(sums, work.rounding) ||
         pair_ends_of<kNegated, Sum>(PairOperands{work});
}

bool pair_loop(const BoxPair& work) {
  switch (work.pairing) {
    case Pairing::kSum:
      return sums_of_pair<false>(work);
    case Pairing::kDifference:
      return sums_of_pair<true>(work);
    case Pairing::kProduct:
      return pair_ends_of<false, ByCorners<Product>>(PairOperands{work});
    case Pairing::kQuotient:
      break;
  }
  return pair_ends_of<false, ByCorners<Quotient>>(PairOperands{work});
}

template <bool kPoint, bool kReversed>
bool constant_ends(const BoxConstant& work) {
  const ConstantOperand<kPoint, kReversed> of(work);
  switch (work.pairing) {
    case Pairing::kSum:
      return pair_ends_of<false, Sum>(of);
    case Pairing::kDifference:
      return pair_ends_of<true, Sum>(of);
    case Pairing::kProduct:
      return pair_ends_of<false, ByCorners<Product>>(of);
    case Pairing::kQuotient:
      break;
  }
  return pair_ends_of<false, ByCorners<Quotient>>(of);
}

bool constant_loop(const BoxConstant& work) {
  const auto constant = static_cast<float>(work.first);
  const bool point = work.first == work.last;
  if (work.pairing == Pairing::kSum && point && constant == work.first) {
    const FloatSums sums{work.lower, work.upper, nullptr,        nullptr,
                         constant,   work.count, work.out_lower, work.out_upper};
    if (float_sums_of<true, false>(sums, work.rounding)) return true;
  }
  if (work.reversed)
    return point ? constant_ends<true, true>(work) : constant_ends<false, true>(work);
  return point ? constant_ends<true, false>(work) : constant_ends<false, false>(work);
}

// What reaches the ends of x and y, in that order.
struct PairGradients {
  Doubles to[4];
};

template <typename Of>
PairGradients corner_gradients(const PairOf& of, Doubles of_lower, Doubles of_upper) {
  const Corners corners = Of::corners(of);
  const Corners low = corners.shares_of_least(), high = corners.negated().shares_of_least();
  const Doubles x[2] = {of.low_x, of.high_x}, y[2] = {of.low_y, of.high_y};
  PairGradients result = {};
  for (int i = 0; i < 4; ++i) {
    const Doubles a = x[i / 2], b = y[i % 2];
    const Doubles share = of_lower * low.of[i] + of_upper * high.of[i];
    result.to[i / 2] += share * Of::slope_x(a, b);
    result.to[2 + i % 2] += share * Of::slope_y(a, b);
  }
  return result;
}

PairGradients gradients_of(Pairing pairing, const PairOf& of, Doubles of_lower, Doubles of_upper) {
  if (pairing == Pairing::kSum) return {{of_lower, of_upper, of_lower, of_upper}};
  if (pairing == Pairing::kDifference) return {{of_lower, of_upper, -of_upper, -of_lower}};
  return pairing == Pairing::kProduct ? corner_gradients<Product>(of, of_lower, of_upper)
                                      : corner_gradients<Quotient>(of, of_lower, of_upper);
}

void pair_gradient_loop(const PairBackward& work) {
  float* const to[4] = {work.to_low_x, work.to_high_x, work.to_low_y, work.to_high_y};
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    const PairGradients found = gradients_of(
        work.pairing, pair_at(work.low_x, work.high_x, work.low_y, work.high_y, i, rest),
        load_lanes_of(work.of_lower + i, rest), load_lanes_of(work.of_upper + i, rest));
    for (int end = 0; end < 4; ++end) store_lanes_of(to[end] + i, rest, to_nearest(found.to[end]));
  }
}

void constant_gradient_loop(const ConstantBackward& work) {
  const Doubles first = all_lanes(work.first), last = all_lanes(work.last);
  const int to = work.reversed ? 2 : 0;
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    const Doubles low = load_lanes_of(work.lower + i, rest);
    const Doubles high = load_lanes_of(work.upper + i, rest);
    const PairOf of =
        work.reversed ? PairOf{first, last, low, high} : PairOf{low, high, first, last};
    const PairGradients found =
        gradients_of(work.pairing, of, load_lanes_of(work.of_lower + i, rest),
                     load_lanes_of(work.of_upper + i, rest));
    store_lanes_of(work.to_lower + i, rest, to_nearest(found.to[to]));
    store_lanes_of(work.to_upper + i, rest, to_nearest(found.to[to + 1]));
  }
}

constexpr PairLoops kPairLoops = {pair_loop, pair_gradient_loop, constant_loop,
                                  constant_gradient_loop};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
