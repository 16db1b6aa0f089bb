// Batch norm with running statistics and sums of two boxes, in one pass over memory, rounded
// outward; a ReLU before them is carried out on the way.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "runtime/float_environment.h"

namespace pyrobust {
namespace interval {

// Ends of a box, dense; `rectified`: the box is that of max(0, x).
struct Box {
  const float* lower;
  const float* upper;
  bool rectified;
};

// (x - mean) scale + shift of each channel. kReal contains the exact image where the given scale
// has a relative error of 4 * 2^-53; kDeployed also what float32 evaluations of this form, of x
// scale + (shift - mean scale) and of those that multiply by the factors of the scale one after the
// other return. Each factor is at most `gain` in size, and a scale of parameters that are flushed
// differs from the given one by at most 2^-126 gain.
struct ChannelAffine {
  Box box;  // (images, channels, pixels)
  int64_t images, channels, pixels;
  const double* mean;
  const double* scale;
  const double* shift;
  const double* gain;
  Rounding rounding;
  float* out_lower;
  float* out_upper;
};

// The least box of x + y; nothing is added in kDeployed, as rounding is monotone.
struct BoxSum {
  Box x, y;
  int64_t count;
  Rounding rounding;
  float* out_lower;
  float* out_upper;
};

// The loop of a channel but for its elements; `rectified`: after a ReLU.
AffineLoop channel_loop(double mean, double scale, double shift, double gain, bool rectified,
                        Rounding rounding);
// Gives it `count` elements and runs it; tells whether all ends are finite.
bool run_channel(AffineLoop loop, Rounding rounding, const ElementLoops& loops, const float* lower,
                 const float* upper, int64_t count, float* out_lower, float* out_upper);
// The gain of weight / sqrt(variance + eps), w r with r the inverse root, in float32.
//
// Its factors are w and r, r0 = 1 / sqrt(v0) where v0 is the sum of what flushing leaves of its two
// terms, t = 2^-126. A weight below t that is read as zero takes less than t r of the scale.
// A sum v <= v0 + 2 t that becomes v0 adds |w| (1 / sqrt(v0) - 1 / sqrt(v)) <= t |w| r0^3 (the root
// is convex). Where v0 < t, an evaluation may divide by zero.
inline double gain_of(double variance, double eps, double weight) {
  constexpr double kTiny = std::numeric_limits<float>::min();
  const double left = (variance < kTiny ? 0.0 : variance) + (eps < kTiny ? 0.0 : eps);
  if (!(left >= kTiny)) return std::numeric_limits<double>::infinity();
  const double root = 1.0 / std::sqrt(left), size = std::fabs(weight);
  const double of_factors = size > root ? size : root;
  if (left == variance + eps) return of_factors;
  const double of_sum = size * root * root * root;
  return of_factors > of_sum ? of_factors : of_sum;
}

// Batch norm with running statistics as (4, channels) numbers: mean, weight / sqrt(variance + eps)
// with an error of 4 units at most, bias and gain. `weight` and `bias` may be null, for ones and
// zeros.
template <typename T>
void normalizing_map(const T* mean, const T* variance, const T* weight, const T* bias, double eps,
                     int64_t channels, double* numbers) {
  const DefaultFloatEnvironment environment;
  for (int64_t n = 0; n < channels; ++n) {
    const double slope = weight != nullptr ? weight[n] : 1.0;
    numbers[n] = mean[n];
    numbers[channels + n] = 1.0 / std::sqrt(static_cast<double>(variance[n]) + eps) * slope;
    numbers[2 * channels + n] = bias != nullptr ? bias[n] : 0.0;
    numbers[3 * channels + n] = gain_of(variance[n], eps, slope);
  }
}

// The loop of a sum but for its elements.
SumLoop sum_loop(bool rectified_x, bool rectified_y, Rounding rounding);

// Channels that are neighbours in memory, one end of each: the numbers of AffineLoop for all.
class ColumnLoops {
 public:
  ColumnLoops(const double* mean, const double* scale, const double* shift, const double* gain,
              int64_t channels, bool rectified, Rounding rounding);
  // The affine map of channels [first, first + count); tells whether all ends are finite.
  bool run(const ElementLoops& loops, const float* lower, const float* upper, int64_t first,
           int64_t count, float* out_lower, float* out_upper) const;

 private:
  int64_t stride_;
  std::vector<double> numbers_;  // (6, stride): mean, scale, shift, errors of |x| and else, limit
  double value_error_ = 0.0;
  float floor_, least_;
  Rounding rounding_;
};

// What the backward pass of ChannelAffine gives: gradients of the box's ends, unless null, and of
// scale and shift, unless null, from those of the outputs' ends.
struct ChannelAffineBackward {
  const float* of_lower;
  const float* of_upper;
  Box box;
  int64_t images, channels, pixels;
  const double* mean;
  const double* scale;
  float* to_lower;
  float* to_upper;
  double* to_scale;  // (channels), zeros at first
  double* to_shift;
};

// All within `radius`, finite and >= 0, of the numbers of x and within [first, last].
struct Ball {
  const float* x;
  int64_t count;
  double radius;
  float first, last;
  Rounding rounding;
  float* out_lower;
  float* out_upper;
};

// The ends, rounded outward from the exact ones unless for kNearest, and for kDeployed ready for
// flushed denormals. False where an end is not finite or a ball lies outside of [first, last].
bool ball_ends(const Ball& work, int num_threads);

// Both tell whether all ends are finite; where an evaluation in float32 might overflow on its way,
// the affine map in kDeployed says that they are not. An end that overflows, or is not a number, is
// infinite on its outer side.
bool channel_affine(const ChannelAffine& work, int num_threads);
bool add_boxes(const BoxSum& work, int num_threads);
void channel_affine_backward(const ChannelAffineBackward& work, int num_threads);

}  // namespace interval
}  // namespace pyrobust
