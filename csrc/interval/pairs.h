// Sums, differences, products and quotients of two boxes, element by element, in one pass over
// memory: the least float32 boxes around the exact ones.
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

}  // namespace interval
}  // namespace pyrobust
