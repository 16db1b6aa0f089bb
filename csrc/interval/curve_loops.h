// The loops of curves.h. Included by the file of each instruction set; the bits are the same in
// all.
#pragma once

#include <cmath>
#include <limits>

#include "core/rounding.h"
#include "interval/curve_functions.h"
#include "interval/element_loops.h"
#include "interval/half_lanes.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

struct CurveEnds {
  HalfFloats lower, upper;
};

// Constants of a call in double.
template <typename F>
struct CurveBounds {
  // The last sums round too: 2^-52 of the value, and the slack is given with more room.
  static constexpr double kOwnError = F::kError + 0x1p-51, kLeastError = 0x1p-180;
  static constexpr double kTiny = std::numeric_limits<float>::min();
  static constexpr double kLargest = std::numeric_limits<float>::max();

  F function;
  double bottom;  // the value at the turning point
  CurveErrors deployed;

  CurveBounds(const F& f, const CurveErrors& errors) : function(f), bottom(0.0), deployed(errors) {
    constexpr double kUnit = 0x1p-24 * (1.0 + 0x1p-40);
    if (F::kValley) bottom = f.value(all_lanes(F::kTurn))[0];
    deployed.value *= kUnit;
    deployed.input *= kUnit;
    deployed.absolute = deployed.absolute * kUnit + 2.0 * kTiny * (1.0 + 0x1p-40);
  }

  // What a float32 evaluation at any point of the box may err by. An exponential that underflows,
  // or overflows below a fraction line, is multiplied by x yet; a product of x may overflow.
  Doubles slack(Doubles lower, Doubles upper, Doubles low, Doubles high) const {
    constexpr double kMostUnderflow = 174.7, kNear = 8.0;  // e^87.34 is the largest without
    const Doubles size = larger_of(magnitude_of(lower), magnitude_of(upper));
    const Doubles reach = larger_of(magnitude_of(low), magnitude_of(high));
    const Doubles sum = size * deployed.value +
                        smaller_of(reach, all_lanes(kNear)) * deployed.input +
                        smaller_of(reach, all_lanes(kMostUnderflow)) * (kTiny * (1.0 + 0x1p-40)) +
                        deployed.absolute;
    if (!F::kValley) return sum;
    return reach < kLargest / 8.0 ? sum : all_lanes(rounding::infinity());
  }

  template <Rounding kRounding>
  void widen(Doubles low, Doubles high, Doubles* lower, Doubles* upper) const {
    Doubles below = magnitude_of(*lower) * kOwnError + kLeastError;
    Doubles above = magnitude_of(*upper) * kOwnError + kLeastError;
    if (kRounding == Rounding::kDeployed && F::kByValue) {
      below = below + magnitude_of(*lower) * deployed.value;
      above = above + magnitude_of(*upper) * deployed.value;
    } else if (kRounding == Rounding::kDeployed) {
      const Doubles more = slack(*lower, *upper, low, high);
      below = below + more;
      above = above + more;
    }
    *lower = *lower - below;
    *upper = *upper + above;
  }

  template <Rounding kRounding>
  CurveEnds ends(Doubles low, Doubles high) const {
    const Doubles first = function.value(low), last = function.value(high);
    Doubles lower = F::kFalls ? last : first, upper = F::kFalls ? first : last;
    if (F::kValley) {
      const Doubles inside = high > F::kTurn ? all_lanes(bottom) : last;
      lower = low < F::kTurn ? inside : first;
      upper = larger_of(last, first);
    }
    if (kRounding == Rounding::kNearest) return {to_nearest(lower), to_nearest(upper)};
    if (!F::kExact) widen<kRounding>(low, high, &lower, &upper);
    if (F::kHasFloor) lower = larger_of(lower, all_lanes(F::kFloor));
    if (F::kHasCeiling) upper = smaller_of(upper, all_lanes(F::kCeiling));
    if (kRounding == Rounding::kDeployed) {  // what a processor that flushes denormals reads
      lower = lower < kTiny ? smaller_of(lower, Doubles{}) : lower;
      upper = upper > -kTiny ? larger_of(upper, Doubles{}) : upper;
    }
    return {floats_below(lower), floats_above(upper)};
  }
};

template <Rounding kRounding, typename F>
bool curve_ends(const CurveBounds<F>& bounds, const CurveLoop& work) {
  HalfFloats odd = {};  // NaN from the first end on that is not finite
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    const CurveEnds ends = bounds.template ends<kRounding>(load_lanes_of(work.lower + i, rest),
                                                           load_lanes_of(work.upper + i, rest));
    odd = odd + ((ends.lower - ends.lower) + (ends.upper - ends.upper));
    store_lanes_of(work.out_lower + i, rest, ends.lower);
    store_lanes_of(work.out_upper + i, rest, ends.upper);
  }
  bool finite = true;
  for (int lane = 0; lane < kDoubleLanes; ++lane) finite &= odd[lane] == 0.0f;
  if (!finite) open_ends(work.count, work.out_lower, work.out_upper);
  return finite;
}

// Gradients promise nothing; those of lanes beyond the end are dropped.
template <typename F>
void curve_gradients(const F& f, const CurveGradients& work) {
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    const Doubles low = load_lanes_of(work.lower + i, rest);
    const Doubles high = load_lanes_of(work.upper + i, rest);
    const Doubles of_lower = load_lanes_of(work.of_lower + i, rest);
    const Doubles of_upper = load_lanes_of(work.of_upper + i, rest);
    Doubles from_low = F::kFalls ? of_upper : of_lower;
    Doubles from_high = F::kFalls ? of_lower : of_upper;
    if (F::kValley) {
      const Doubles first = f.value(low), last = f.value(high), zero = {};
      const Doubles half = of_upper * 0.5;
      from_low = (low >= F::kTurn ? of_lower : zero) +
                 (first > last ? of_upper : (first == last ? half : zero));
      from_high = (high < F::kTurn ? of_lower : zero) +
                  (last > first ? of_upper : (first == last ? half : zero));
    }
    store_lanes_of(work.to_lower + i, rest, to_nearest(from_low * f.slope(low)));
    store_lanes_of(work.to_upper + i, rest, to_nearest(from_high * f.slope(high)));
  }
}

template <typename F>
void curve_values(const F& f, const CurveValues& work) {
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i, lanes = rest < kDoubleLanes ? rest : kDoubleLanes;
    const Doubles values = f.value(load_lanes_of(work.x + i, rest));
    std::memcpy(work.out + i, &values, static_cast<size_t>(lanes) * sizeof(double));
  }
}

// body(function) for the one that is asked for.
template <typename Body>
auto with_curve(const CurveOf& of, const Body& body) {
  switch (of.curve) {
    case Curve::kGelu:
      return body(Gelu{});
    case Curve::kGeluTanh:
      return body(GeluTanh{});
    case Curve::kSilu:
      return body(Silu{});
    case Curve::kMish:
      return body(Mish{});
    case Curve::kHardswish:
      return body(Hardswish{});
    case Curve::kHardsigmoid:
      return body(Hardsigmoid{});
    case Curve::kSoftplus:
      return body(Softplus{});
    case Curve::kLogSigmoid:
      return body(LogSigmoid{});
    case Curve::kSigmoid:
      return body(Sigmoid{});
    case Curve::kTanh:
      return body(Tanh{});
    case Curve::kSoftsign:
      return body(Softsign{});
    case Curve::kExp:
      return body(Exp{});
    case Curve::kExpm1:
      return body(Expm1{});
    case Curve::kElu:
      return body(Elu{{}, of.numbers[0], of.numbers[1], of.numbers[2]});
    case Curve::kLog1p:
      return body(Log1p{});
    case Curve::kErf:
      return body(Erf{});
    case Curve::kAtan:
      return body(Atan{});
    case Curve::kSqrt:
      return body(Sqrt{});
    case Curve::kRsqrt:
      return body(Rsqrt{});
    case Curve::kSquare:
      return body(SecondPower{});
    case Curve::kLog:
      break;
  }
  return body(Log{{}, of.numbers[0]});
}

bool curve_loop(const CurveLoop& work) {
  return with_curve(work.of, [&](const auto& f) {
    const CurveBounds bounds(f, work.deployed);
    if (work.rounding == Rounding::kReal) return curve_ends<Rounding::kReal>(bounds, work);
    if (work.rounding == Rounding::kNearest) return curve_ends<Rounding::kNearest>(bounds, work);
    return curve_ends<Rounding::kDeployed>(bounds, work);
  });
}

void curve_gradient_loop(const CurveGradients& work) {
  with_curve(work.of, [&](const auto& f) { curve_gradients(f, work); });
}

void curve_value_loop(const CurveValues& work) {
  with_curve(work.of, [&](const auto& f) { curve_values(f, work); });
}

constexpr CurveLoops kCurveLoops = {curve_loop, curve_gradient_loop, curve_value_loop};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
