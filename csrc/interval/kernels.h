// Internal to the interval family: what an instruction set supplies.
#pragma once

#include <cstdint>

#include "core/rounding.h"

namespace pyrobust {
namespace interval {

// Every kernel sums at most kBlock terms in a row before it starts a new partial sum, and adds the
// partial sums in a row; products, lanes and the last reduction cost at most 8 further roundings.
constexpr int64_t kBlock = 64;
PYROBUST_HD int64_t sum_depth(int64_t terms) { return kBlock + (terms + kBlock - 1) / kBlock + 8; }

// The numbers of interval.h that depend on the mode and on K only.
struct Constants {
  float centre_gain;  // g_c
  float radius_gain;  // 1 + g_x
  float input_floor;  // 2^-100, or 0 in nearest mode
  float inflate;      // of the radius sum
  float bias_gain;    // G in deployed mode, else 0
  float limit;        // ends are infinite where R reaches it
  bool outward;       // false in nearest mode
};

// (c, r') of `count` elements; returns the largest |c| + r, at least 0, infinite where an input is
// not finite.
struct Ends {
  const float* lower;
  const float* upper;
  int64_t count;
};

// yc and yr of `rows` weight rows for `batch` inputs: sums[b * sum_stride + n].
struct Products {
  const float* centre;  // (batch, terms)
  const float* radius;  // (batch, terms)
  const float* weight;  // (rows, terms)
  int64_t batch;
  int64_t rows;
  int64_t terms;
  float* centre_sums;
  float* radius_sums;
  int64_t sum_stride;
};

// out[n] from yc[n], yr[n], bias[n] (or null) and one absolute term for the whole run.
struct Finish {
  const float* centre_sums;
  const float* radius_sums;
  const float* bias;
  float offset;
  int64_t count;
  float* out_lower;
  float* out_upper;
};

struct IntervalKernels {
  float (*prepare)(const Ends& ends, const Constants& constants, float* centre, float* radius);
  void (*products)(const Products& work);
  void (*finish)(const Finish& work, const Constants& constants);
};

extern const IntervalKernels kPortableKernels;

}  // namespace interval
}  // namespace pyrobust
