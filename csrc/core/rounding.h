// Outward rounding without touching the rounding mode: everything here is correct in round to
// nearest and keeps denormals. Sound results need three tools: the neighbours of a number, sums and
// products rounded towards an infinity, and the classical bound gamma_n of n rounding errors.
//
// u = 2^-24 is the unit roundoff of float: fl(a op b) = (a op b)(1 + d), |d| <= u, for + and -
// always, for * and fma up to a further 2^-150 where the result is denormal.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/float_types.h"
#include "core/host_device.h"

namespace pyrobust {
namespace rounding {

constexpr double kUnit = 1.0 / 16777216.0;  // u

constexpr uint32_t kInfinityBits = 0x7f800000u;

PYROBUST_HD bool is_finite(float value) {
  return (bits_of_float(value) & kInfinityBits) != kInfinityBits;
}

PYROBUST_HD float infinity() { return float_from_bits(kInfinityBits); }

// The smallest float above `value`; NaN and +inf stay.
PYROBUST_HD float next_up(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value || bits == kInfinityBits) return value;
  if ((bits & 0x7fffffffu) == 0) return float_from_bits(1u);
  return float_from_bits((bits >> 31) != 0 ? bits - 1 : bits + 1);
}

PYROBUST_HD float next_down(float value) { return -next_up(-value); }

// The float next to the double `value` on the given side; overflow goes to the infinity of that
// side and to the largest float on the other.
PYROBUST_HD float to_float_up(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) < value ? next_up(nearest) : nearest;
}

PYROBUST_HD float to_float_down(double value) { return -to_float_up(-value); }

// a + b = sum + error exactly (Knuth), unless the sum overflows.
PYROBUST_HD double two_sum(double a, double b, double* error) {
  const double sum = a + b;
  const double part = sum - a;
  *error = (a - (sum - part)) + (b - part);
  return sum;
}

// Sums and products of floats rounded upwards, the smallest float not below the exact value. A
// product of two floats is exact in double; the error of a sum of doubles decides its side.
PYROBUST_HD float add_up(float a, float b) {
  double error;
  const double sum = two_sum(a, b, &error);
  const float up = to_float_up(sum);
  return error > 0.0 && static_cast<double>(up) == sum ? next_up(up) : up;
}

PYROBUST_HD float sub_up(float a, float b) { return add_up(a, -b); }

PYROBUST_HD float mul_up(float a, float b) {
  return to_float_up(static_cast<double>(a) * static_cast<double>(b));
}

PYROBUST_HD float fma_up(float a, float b, float c) {
  double error;
  const double sum = two_sum(static_cast<double>(a) * static_cast<double>(b), c, &error);
  const float up = to_float_up(sum);
  return error > 0.0 && static_cast<double>(up) == sum ? next_up(up) : up;
}

PYROBUST_HD float add_down(float a, float b) { return -add_up(-a, -b); }
PYROBUST_HD float sub_down(float a, float b) { return -add_up(-a, b); }
PYROBUST_HD float mul_down(float a, float b) { return -mul_up(-a, b); }
PYROBUST_HD float fma_down(float a, float b, float c) { return -fma_up(-a, b, -c); }

// gamma_n = n u / (1 - n u) bounds |prod (1 + d_i) - 1| over n roundings. The factor 1 + 2^-48
// covers the roundings of this line. Needs n u < 1.
PYROBUST_HD double gamma_bound(double roundings) {
  const double total = roundings * kUnit;
  return total / (1.0 - total) * (1.0 + 1.0 / 281474976710656.0);
}

// A float at most (at least) the neighbour of `value` on that side, in vectorisable operations
// (Rump, Zimmermann, Boldo, Melquiond 2009): value -+ (u(1 + 2u)|value| + 2^-149).
constexpr float kNeighbour = 1.0f / 16777216.0f * (1.0f + 1.0f / 8388608.0f);
constexpr float kLeast = 1.40129846e-45f;  // 2^-149
PYROBUST_HD float below(float value) { return value - (std::fabs(value) * kNeighbour + kLeast); }
PYROBUST_HD float above(float value) { return value + (std::fabs(value) * kNeighbour + kLeast); }

}  // namespace rounding
}  // namespace pyrobust
