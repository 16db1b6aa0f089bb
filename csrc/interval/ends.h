// The ends of one output from its two sums: the last line of the proof in interval.h.
#pragma once

#include "core/rounding.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {

constexpr float kSlack = 1.0f + 8.0f / 16777216.0f;  // 1 + 8u: covers the roundings of one line

PYROBUST_HD void finish_one(float centre, float radius, float shift, float offset,
                            const Constants& constants, float* out_lower, float* out_upper) {
  centre += shift;
  float low = centre - radius, high = centre + radius;
  if (constants.outward) {
    radius = (radius * constants.inflate + std::fabs(shift) * constants.bias_gain +
              std::fabs(centre) * constants.value_gain + offset) *
             kSlack;
    low = rounding::below(rounding::below(centre) - radius);
    high = rounding::above(rounding::above(centre) + radius);
  }
  const bool bounded = rounding::is_finite(centre) && radius < constants.limit;
  // An end between zero and `least` may be read as zero: it becomes that on the outer side.
  if (low > 0.0f && low < constants.least) low = 0.0f;
  if (high < 0.0f && high > -constants.least) high = 0.0f;
  *out_lower = bounded ? low : -rounding::infinity();
  *out_upper = bounded ? high : rounding::infinity();
}

}  // namespace interval
}  // namespace pyrobust
