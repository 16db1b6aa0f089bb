// Products with constants. Included by the file of each instruction set.
#pragma once

#include "interval/half_lanes.h"
#include "transformer/kernels.h"
#include "transformer/outward.h"

namespace pyrobust {
namespace transformer {
namespace {

// 2^-53 for a constant that float32 cannot hold.
inline interval::Doubles error_of_constant(interval::Doubles c) {
  const interval::Doubles held =
      __builtin_convertvector(interval::to_nearest(c), interval::Doubles);
  return held == c ? interval::Doubles{} : interval::all_lanes(0x1p-53);
}

inline interval::Doubles load_constants(const double* from, int64_t count) {
  interval::Doubles constants = {};
  const int64_t lanes = count < interval::kDoubleLanes ? count : interval::kDoubleLanes;
  if (lanes == interval::kDoubleLanes) {
    std::memcpy(&constants, from, sizeof(constants));
  } else {
    std::memcpy(&constants, from, static_cast<size_t>(lanes) * sizeof(double));
  }
  return constants;
}

struct ScaledEnds {
  interval::Doubles lower, upper, odd;  // `odd` is NaN where a product is not finite
};

// Products of floats are exact in float64; a constant that float32 cannot hold has one rounding
// more, which `error` covers. A bend at zero makes a valley where the constant is negative.
template <bool kBent>
ScaledEnds scaled_ends(interval::Doubles left, interval::Doubles right, interval::Doubles c,
                       interval::Doubles d) {
  using namespace interval;
  const Doubles error = error_of_constant(c) + error_of_constant(d), zero = {};
  const Doubles a = kBent ? smaller_of(left, zero) : left;
  const Doubles b = kBent ? smaller_of(right, zero) : right;
  const Doubles ac = a * c, ad = a * d, bc = b * c, bd = b * d;
  const Doubles least = smaller_of(smaller_of(ac, ad), smaller_of(bc, bd));
  const Doubles most = larger_of(larger_of(ac, ad), larger_of(bc, bd));
  ScaledEnds ends = {least - error * magnitude_of(least), most + error * magnitude_of(most),
                     (ac + ad) + (bc + bd)};
  if (kBent) {
    ends.lower = left >= 0.0 ? left : ends.lower;
    const Doubles across = left >= 0.0 ? right : larger_of(ends.upper, right);
    ends.upper = right > 0.0 ? across : ends.upper;
    ends.odd = ends.odd + (left + right);
  }
  ends.odd = ends.odd - ends.odd;
  return ends;
}

template <bool kSingle, bool kBent>
bool scale_loop(const ScaleLoop& work) {
  using namespace interval;
  const double least = work.least;
  Doubles c = all_lanes(work.first[0]), d = all_lanes(work.last[0]), odd = {};
  HalfFloats unbounded = {};
  for (int64_t i = 0; i < work.count; i += kDoubleLanes) {
    const int64_t rest = work.count - i;
    if (!kSingle) c = load_constants(work.first + i, rest);
    if (!kSingle) d = load_constants(work.last + i, rest);
    ScaledEnds ends = scaled_ends<kBent>(load_lanes_of(work.lower + i, rest),
                                         load_lanes_of(work.upper + i, rest), c, d);
    odd = odd + ends.odd;
    // what a processor that flushes denormals reads
    ends.lower = ends.lower < least ? smaller_of(ends.lower, Doubles{}) : ends.lower;
    ends.upper = ends.upper > -least ? larger_of(ends.upper, Doubles{}) : ends.upper;
    const HalfFloats low = floats_below(ends.lower), high = floats_above(ends.upper);
    unbounded = unbounded + ((low - low) + (high - high));
    store_lanes_of(work.out_lower + i, rest, low);
    store_lanes_of(work.out_upper + i, rest, high);
  }
  bool bounded = true;
  for (int lane = 0; lane < kDoubleLanes; ++lane) {
    bounded &= odd[lane] == 0.0 && unbounded[lane] == 0.0f;
  }
  return bounded;
}

bool scale(const ScaleLoop& work) {
  if (work.bent) return work.single ? scale_loop<true, true>(work) : scale_loop<false, true>(work);
  return work.single ? scale_loop<true, false>(work) : scale_loop<false, false>(work);
}

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
