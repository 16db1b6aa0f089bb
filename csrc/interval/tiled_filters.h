// Included by filtered_convolution.h alone: radii of an image as words of two channels, and their
// product on tiles, where only centres are filtered ("Radii on tiles" in filtering.h).
#pragma once

#include <vector>

#include "interval/convolution_plan.h"

namespace pyrobust {
namespace interval {
namespace {

bool tiles_take_radii(const Call& call, const Images& images, const Window& window,
                      const IntervalKernels& table) {
  return table.tiled_filter.product != nullptr && coarse_pays(call, table, call.weight.rows) &&
         window.out_width % kPixels == 0 && images.channels % 2 == 0;
}

// Where the radii of an image are, and |W|.
struct RadiusPlanes {
  int64_t row_size;     // words of a row: with stride 2 of even pixels, then of odd ones
  int64_t plane;        // of a pair of channels
  int64_t pairs;        // of channels, whole tiles
  int64_t size_stride;  // words of a row of W
  std::vector<int64_t> places;
  std::vector<uint32_t> sizes;

  int64_t words() const { return whole_lines(pairs * plane); }
};

// `height` rows of a channel, with padding; without |W|.
RadiusPlanes radius_planes(const Images& images, const Window& window, int64_t height) {
  const bool strided = window.stride_width == 2;
  const int64_t taps = window.kernel_height * window.kernel_width;
  RadiusPlanes out{};
  out.row_size = strided ? 2 * (window.out_width + 1) : window.out_width + 2;
  out.plane = height * out.row_size;
  out.pairs = coarse_pairs(pairs_of(images.channels));
  out.size_stride = taps * out.pairs;
  for (int64_t y = 0; y < window.kernel_height; ++y) {
    for (int64_t x = 0; x < window.kernel_width; ++x) {
      out.places.push_back(y * out.row_size + (strided ? x % 2 * (out.row_size / 2) + x / 2 : x));
    }
  }
  return out;
}

// |W| of all rows.
void set_sizes(const Weight& weight, const float* values, const IntervalKernels& table,
               RadiusPlanes* planes) {
  const auto taps = static_cast<int64_t>(planes->places.size());
  planes->sizes.resize(static_cast<size_t>(coarse_sizes(weight.rows, planes->size_stride)));
  table.round_channels(
      {values, weight.rows, weight.terms, taps, planes->sizes.data(), planes->size_stride});
}

// Sums of pixels [first, first + count), whole groups, for rows [n, n + rows) of W.
void multiply_radii(const RadiusPlanes& planes, const Window& window, const IntervalKernels& table,
                    const uint32_t* words, int64_t n, int64_t rows, int64_t first, int64_t count,
                    float* sums) {
  int64_t bases[kTiledPixels / kPixels];
  for (int64_t g = 0; g < count / kPixels; ++g) {
    const int64_t pixel = first + g * kPixels;
    bases[g] = pixel / window.out_width * window.stride_height * planes.row_size +
               pixel % window.out_width;
  }
  table.tiled_filter.product({words, bases, planes.places.data(),
                              static_cast<int64_t>(planes.places.size()), planes.plane,
                              planes.pairs, planes.sizes.data() + n * planes.size_stride,
                              planes.size_stride, rows, count / kPixels, sums});
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
