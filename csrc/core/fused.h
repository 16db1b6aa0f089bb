// a * b + c rounded once to float32, on every machine. Where the target has the instruction it is
// one; elsewhere the exact product is added in float64. Rounding that sum to float32 can differ
// from one rounding only where it lies in the middle between two float32 values; there it is
// rounded to odd first, which settles the side (S. Boldo, G. Melquiond, "Emulation of FMA and
// correctly rounded sums", IEEE Trans. Computers 57, 2008: 53 >= 2 * 24 + 2 bits). For finite
// values.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/host_device.h"

namespace pyrobust {

// The float64 sum of `a` and `b`; where it is inexact, the one of its two neighbours that is odd.
PYROBUST_HD double sum_rounded_to_odd(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  const double error = (a - (sum - of_b)) + (b - of_b);
  if (error == 0.0) return sum;
  uint64_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  if (bits & 1) return sum;
  bits += ((error > 0.0) == (sum > 0.0)) ? uint64_t{1} : ~uint64_t{0};
  double odd;
  memcpy(&odd, &bits, sizeof(odd));
  return odd;
}

PYROBUST_HD float fused_emulated(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double sum = product + static_cast<double>(c);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  const bool normal = (sum < 0 ? -sum : sum) >= 1.1754943508222875e-38;  // 2^-126
  if (normal && (bits & 0x1fffffffu) != 0x10000000u) return static_cast<float>(sum);
  return static_cast<float>(sum_rounded_to_odd(product, static_cast<double>(c)));
}

PYROBUST_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return fused_emulated(a, b, c);
#endif
}

}  // namespace pyrobust
