// e^x in doubles, a register at a time, with a proven error and the same bits everywhere.
//
// x = k ln 2 + r with |r| <= 0.34658 (half of ln 2, and what rounding k loses), and e^r - 1 = p(r)
// = r + r^2 q(r), q interpolated at Chebyshev points. Errors, relative to the result:
//   p: |r q'(r)| <= 2^-48.4 by the interpolation and its rounded coefficients
//      (tests/interval/test_exponential.py proves it in rational numbers), and below 2^-51 by
//      roundings, all of which but the last are of terms below 0.35 |r|;
//   r: 2^-54 in all. k has 10 bits and the first part of ln 2 has 43, so that their product is
//      exact; the second product is below 2^-33, and ln 2 is given to 2^-96.
// e^x = 2^k (1 + p) errs by |p| times the first, the second and a rounding: below 2^-48.
// e^x - 1 = (2^k - 1) + 2^k p likewise: where k is 0 it is p; elsewhere it is at least 0.29 of
// 2^k, or of 1 for negative k, and the error is below 2^-47.
#pragma once

#include "interval/double_lanes.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kExponentialError = 0x1p-48;  // of exponential(), relative
constexpr double kExponentialLessOneError = 0x1p-47;

// Beyond these an exponential is taken for that of the border, below 2^-1020 or above 2^1022.
constexpr double kLeastExponent = -708.0, kMostExponent = 709.0;

// 2^power (1 + rest).
struct Exponential {
  Doubles power, rest;
};

inline Exponential split_exponential(Doubles x) {
  constexpr double kRoundingShift = 0x1.8p52;  // adding it leaves an integer in the last bits
  x = within(x, kLeastExponent, kMostExponent);
  const Doubles shifted = x * 0x1.71547652b82fep+0 + kRoundingShift;
  const Doubles k = shifted - kRoundingShift;
  const Doubles r = (x - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45;
  const Doubles square = r * r;
  const Doubles even =
      0x1p-1 +
      square * (0x1.5555555554cb8p-5 +
                square * (0x1.6c16c1738f05cp-10 +
                          square * (0x1.a019c9aa11c0bp-16 + square * 0x1.28803a9f7bb01p-22)));
  const Doubles odd = 0x1.5555555553b7cp-3 +
                      square * (0x1.1111111c46274p-7 +
                                square * (0x1.a019adaa6411ep-13 + square * 0x1.72c722e81c5f2p-19));
  const Longs exponent = (reinterpret_cast<Longs>(shifted) << 52) + (int64_t{1023} << 52);
  return {reinterpret_cast<Doubles>(exponent), r + square * (even + r * odd)};
}

// e^x; NaN for NaN. Between kLeastExponent and kMostExponent the error is below kExponentialError.
inline Doubles exponential(Doubles x) {
  const Exponential parts = split_exponential(x);
  return parts.power + parts.power * parts.rest;
}

// e^x - 1, likewise below kExponentialLessOneError of it: near zero too.
inline Doubles exponential_less_one(Doubles x) {
  const Exponential parts = split_exponential(x);
  return (parts.power - 1.0) + parts.power * parts.rest;
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
