// Boxes under a function of one number: both ends evaluated in double with a proven error
// (curve_functions.h), rounded outward once, in one pass over memory.
#pragma once

#include <cstdint>

#include "interval/interval.h"

namespace pyrobust {
namespace interval {

// `numbers` of a call belong to the function: kElu has three, for x > 0 the slope of x, else
// depth (e^(x / stretch) - 1); kLog one, the factor of the natural logarithm.
enum class Curve : int {
  kGelu,
  kGeluTanh,
  kSilu,
  kMish,
  kHardswish,
  kHardsigmoid,
  kSoftplus,
  kLogSigmoid,
  kSigmoid,
  kTanh,
  kSoftsign,
  kExp,
  kExpm1,
  kElu,
  kLog,
  kLog1p,
  kErf,
  kAtan,
  kSqrt,
  kRsqrt,
  kSquare,
};
constexpr int kCurves = 21;
constexpr int kCurveNumbers = 3;

// What a float32 evaluation may err by: `value` units of 2^-24 of the largest value in the box,
// `input` units of the largest |x|, cut at 8, and `absolute` units; and what underflow loses.
struct CurveErrors {
  double value, input, absolute;
};

struct CurveOf {
  Curve curve;
  double numbers[kCurveNumbers];
};

// kReal contains the exact image, kDeployed also float32 evaluations that err by `deployed` at
// most; kNearest rounds both ends to nearest.
struct CurveBox {
  CurveOf of;
  const float* lower;
  const float* upper;
  int64_t count;
  Rounding rounding;
  CurveErrors deployed;
  float* out_lower;
  float* out_upper;
};

// Gradients of the box's ends from those of the image's. The lower end of a valley's image belongs
// to the end of the box that gives it, or to none; the upper one to the higher end, or half to
// each.
struct CurveBackward {
  CurveOf of;
  const float* of_lower;
  const float* of_upper;
  const float* lower;
  const float* upper;
  int64_t count;
  float* to_lower;
  float* to_upper;
};

// Whether all ends are finite; others are infinite on their outer side.
bool bound_curve(const CurveBox& work, int num_threads);
void bound_curve_backward(const CurveBackward& work, int num_threads);
// The values in double before anything is added, for tests of their error.
void evaluate_curve(const CurveOf& of, const float* x, int64_t count, double* out);

}  // namespace interval
}  // namespace pyrobust
