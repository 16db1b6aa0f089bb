// Included by the loops: what they share, the last step from float64 to float32 among it.
#pragma once

#include "core/outward_floats.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr double kStep = 1.0 / 4503599627370496.0;  // 2^-52

inline double larger(double a, double b) { return a > b ? a : b; }
inline double smaller(double a, double b) { return a < b ? a : b; }
inline double at_least_zero(double a) { return a > 0.0 ? a : 0.0; }

using rounding::float_down;
using rounding::float_up;
using rounding::flushed;
using rounding::odd;

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
