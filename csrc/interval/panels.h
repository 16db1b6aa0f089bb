// What the rounding of activations adds to radii.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/rounding.h"
#include "interval/interval.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {

// Half a step of the dynamic 8-bit rounding of core/activation_int8.h on |x| <= largest; the factor
// covers the roundings of the step, of the quotient and of this line.
inline float half_step(float largest) {
  constexpr double kHalfOver127 = 0.5 / 127.0 * (1.0 + 1.0 / 1048576.0);
  return rounding::to_float_up(static_cast<double>(largest) * kHalfOver127);
}

// Adds the half step of one input to its radii; |c| + r bounds the input. The gain is 1 + g_x, and
// 1 + 8u covers the roundings of the sum.
inline void widen_to_int8(const float* centre, float* radius, int64_t terms, int64_t stride,
                          const Constants& constants) {
  float largest = 0.0f;
  for (int64_t k = 0; k < terms; ++k) {
    const float size = std::fabs(centre[k * stride]) + radius[k * stride];
    if (!(size <= largest)) largest = size;
  }
  const float extra = half_step(largest) * constants.radius_gain;
  for (int64_t k = 0; k < terms; ++k) {
    radius[k * stride] = (radius[k * stride] + extra) * (1.0f + 8.0f / 16777216.0f);
  }
}

}  // namespace interval
}  // namespace pyrobust
