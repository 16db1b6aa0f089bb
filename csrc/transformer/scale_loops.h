// Products with constants. Included by the file of each instruction set.
#pragma once

#include <cmath>

#include "transformer/kernels.h"
#include "transformer/outward.h"

namespace pyrobust {
namespace transformer {
namespace {

// Products of floats are exact in float64; a constant that float32 cannot hold has one rounding
// more, which `error` covers.
template <bool kSingle>
bool scale_loop(const ScaleLoop& work) {
  constexpr double kUnit64 = 0x1p-53;
  const double *first = work.first, *last = work.last;
  const float *below = work.lower, *above = work.upper;
  float* __restrict lower = work.out_lower;
  float* __restrict upper = work.out_upper;
  int32_t unbounded = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    const double c = first[kSingle ? 0 : i], d = last[kSingle ? 0 : i];
    const double error = (static_cast<double>(static_cast<float>(c)) == c ? 0.0 : kUnit64) +
                         (static_cast<double>(static_cast<float>(d)) == d ? 0.0 : kUnit64);
    const double a = below[i], b = above[i], ac = a * c, ad = a * d, bc = b * c, bd = b * d;
    const double least = smaller(smaller(ac, ad), smaller(bc, bd));
    const double most = larger(larger(ac, ad), larger(bc, bd));
    const float low = flushed(float_down(least - error * std::fabs(least)), work.least);
    const float high = flushed(float_down(-most - error * std::fabs(most)), work.least);
    unbounded |= odd(low) | odd(high);
    lower[i] = low;
    upper[i] = -high;
  }
  return unbounded == 0;
}

bool scale(const ScaleLoop& work) {
  return work.single ? scale_loop<true>(work) : scale_loop<false>(work);
}

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
