// Batch norm with running statistics and sums of two boxes, in one pass over memory, rounded
// outward; a ReLU before them is carried out on the way.
#pragma once

#include <cstdint>

#include "interval/interval.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {

// Ends of a box, dense; `rectified`: the box is that of max(0, x).
struct Box {
  const float* lower;
  const float* upper;
  bool rectified;
};

// (x - mean) scale + shift of each channel. kReal contains the exact image where the given scale
// has a relative error of 4 * 2^-53; kDeployed also what float32 evaluations of this form and of x
// scale + (shift - mean scale) return.
struct ChannelAffine {
  Box box;  // (images, channels, pixels)
  int64_t images, channels, pixels;
  const double* mean;
  const double* scale;
  const double* shift;
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
AffineLoop channel_loop(double mean, double scale, double shift, bool rectified, Rounding rounding);
// Gives it `count` elements and runs it; tells whether all ends are finite.
bool run_channel(AffineLoop loop, Rounding rounding, const ElementLoops& loops, const float* lower,
                 const float* upper, int64_t count, float* out_lower, float* out_upper);
// The loop of a sum but for its elements.
SumLoop sum_loop(bool rectified_x, bool rectified_y, Rounding rounding);

// Both tell whether all ends are finite; where an evaluation in float32 might overflow on its way,
// the affine map in kDeployed says that they are not. An end that overflows, or is not a number, is
// infinite on its outer side.
bool channel_affine(const ChannelAffine& work, int num_threads);
bool add_boxes(const BoxSum& work, int num_threads);

}  // namespace interval
}  // namespace pyrobust
