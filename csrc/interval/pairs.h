// Sums, differences, products and quotients of two boxes, or of a box and a constant, element by
// element, in one pass over memory: the least float32 boxes around the exact ones.
#pragma once

#include <cstdint>

#include "interval/interval.h"

namespace pyrobust {
namespace interval {

enum class Pairing : int { kSum, kDifference, kProduct, kQuotient };

// A tensor is a box whose ends are the same memory. Nothing is added in kDeployed, as rounding is
// monotone, but ends that flushing may read as zero become zero.
struct BoxPair {
  Pairing pairing;
  const float *low_x, *high_x, *low_y, *high_y;
  int64_t count;
  Rounding rounding;
  float *out_lower, *out_upper;
};

// The same of a box and a number between `first` and `last`, which are 0 or of magnitudes between
// 2^-127 and 2^127; `reversed`: the constant comes first. What float32 cannot hold makes products
// and quotients step: their ends may be a float further out where the exact ones are floats.
struct BoxConstant {
  Pairing pairing;
  bool reversed;
  double first, last;
  const float *lower, *upper;
  int64_t count;
  Rounding rounding;
  float *out_lower, *out_upper;
};

struct ConstantBackward {
  Pairing pairing;
  bool reversed;
  double first, last;
  const float *of_lower, *of_upper, *lower, *upper;
  int64_t count;
  float *to_lower, *to_upper;
};

// Gradients of all four ends from those of the result's. An end that several corners give equally
// goes to them as torch's minimum of one after the other shares it.
struct PairBackward {
  Pairing pairing;
  const float *of_lower, *of_upper, *low_x, *high_x, *low_y, *high_y;
  int64_t count;
  float *to_low_x, *to_high_x, *to_low_y, *to_high_y;
};

// Whether all numbers that were met are finite and no divisor holds zero. If not, a sum of numbers
// that are infinite is infinite or NaN; products and quotients say nothing.
bool bound_pair(const BoxPair& work, int num_threads);
void bound_pair_backward(const PairBackward& work, int num_threads);
bool bound_constant(const BoxConstant& work, int num_threads);
void bound_constant_backward(const ConstantBackward& work, int num_threads);

}  // namespace interval
}  // namespace pyrobust
