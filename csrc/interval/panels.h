// How images reach the panel kernels, and what the rounding of activations adds to radii.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/rounding.h"
#include "interval/interval.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {

// Half a step of the dynamic 8-bit rounding of core/activation_int8.h on |x| <= largest; the factor
// covers the roundings of the step, of the quotient and of this line.
inline float half_step(float largest) {
  constexpr double kHalfOver127 = 0.5 / 127.0 * (1.0 + 1.0 / 1048576.0);
  return rounding::to_float_up(static_cast<double>(largest) * kHalfOver127);
}

// Adds the half step of one input to its radii; |c| + r bounds the input. The gain is 1 + g_x, and
// 1 + 8u covers the roundings of the sum.
inline void widen_to_int8(const float* centre, float* radius, int64_t terms, int64_t stride,
                          const Constants& constants) {
  float largest = 0.0f;
  for (int64_t k = 0; k < terms; ++k) {
    const float size = std::fabs(centre[k * stride]) + radius[k * stride];
    if (!(size <= largest)) largest = size;
  }
  const float extra = half_step(largest) * constants.radius_gain;
  for (int64_t k = 0; k < terms; ++k) {
    radius[k * stride] = (radius[k * stride] + extra) * (1.0f + 8.0f / 16777216.0f);
  }
}

// An image's prepared centres and radii with the zeros of the padding around them.
struct PaddedImage {
  const float* centre;  // (channels, height, width)
  const float* radius;
  int64_t height;
  int64_t width;
};

// Patches of output pixels [first, first + lanes), row-major over the output; terms run over
// (channel, kernel row, kernel column) of `channels` channels from the start of `image`.
inline void pack_patches(const PaddedImage& image, const Window& window, int64_t channels,
                         int64_t first, int64_t lanes, float* panel) {
  int64_t base[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t pixel = first + (lane < lanes ? lane : lanes - 1);
    base[lane] = pixel / window.out_width * window.stride_height * image.width +
                 pixel % window.out_width * window.stride_width;
  }
  const bool contiguous = lanes == kLanes && base[kLanes - 1] == base[0] + kLanes - 1;
  float* column = panel;
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t y = 0; y < window.kernel_height; ++y) {
      for (int64_t x = 0; x < window.kernel_width; ++x, column += kPanelWidth) {
        const int64_t at = (channel * image.height + y * window.dilation_height) * image.width +
                           x * window.dilation_width;
        const float *centre = image.centre + at, *radius = image.radius + at;
        if (contiguous) {
          std::memcpy(column, centre + base[0], kLanes * sizeof(float));
          std::memcpy(column + kLanes, radius + base[0], kLanes * sizeof(float));
          continue;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          column[lane] = centre[base[lane]];
          column[kLanes + lane] = radius[base[lane]];
        }
      }
    }
  }
}

}  // namespace interval
}  // namespace pyrobust
