// Patches of images as panels: included by the file of each instruction set and compiled with its
// flags, as the moves want wide registers.
#pragma once

#include <cstring>

#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// Where the lanes of a panel start in the image, and whether they are neighbours there.
struct Lanes {
  int64_t base[kLanes];
  bool adjacent;
};

inline Lanes lanes_of(const PackPatches& work, int64_t panel) {
  Lanes out;
  const int64_t first = work.first[panel];
  const int64_t present = work.pixels - first < kLanes ? work.pixels - first : kLanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t pixel = first + (lane < present ? lane : present - 1);
    out.base[lane] = work.image[panel] + pixel / work.out_width * work.row_step * work.row_size +
                     pixel % work.out_width;
  }
  // lanes without a pixel repeat the last: with steps to other rows they may end in the same place
  out.adjacent = present == kLanes && out.base[kLanes - 1] == out.base[0] + kLanes - 1;
  return out;
}

// Terms run over (channel, kernel row, kernel column). Every term of all panels at once: they share
// the rows of the image that are in the first-level cache.
void pack_patches(const PackPatches& work) {
  Lanes lanes[kMaxPanels];
  for (int64_t p = 0; p < work.panels; ++p) lanes[p] = lanes_of(work, p);
  float* column = work.packed;
  for (int64_t row = 0; row < work.channels * work.kernel_height; ++row) {
    const int64_t at = work.rows[row];
    for (int64_t x = 0; x < work.kernel_width; ++x, column += kPanelWidth) {
      const float *centre = work.centre + at + work.columns[x],
                  *radius = work.radius + at + work.columns[x];
      for (int64_t p = 0; p < work.panels; ++p) {
        float* to = column + p * work.panel_stride;
        const Lanes& from = lanes[p];
        if (from.adjacent) {
          std::memcpy(to, centre + from.base[0], kLanes * sizeof(float));
          std::memcpy(to + kLanes, radius + from.base[0], kLanes * sizeof(float));
          continue;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          to[lane] = centre[from.base[lane]];
          to[kLanes + lane] = radius[from.base[lane]];
        }
      }
    }
  }
}

// Every second column is moved by shuffles where the compiler knows the stride.
template <int64_t kStride>
void spread_phase(const float* from, int64_t count, int64_t stride, float* to) {
  const int64_t step = kStride != 0 ? kStride : stride;
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
}

void spread(const SpreadColumns& work) {
  for (int64_t remainder = 0; remainder < work.stride; ++remainder) {
    const int64_t lack = work.pad - remainder;  // columns before the first that is given
    const int64_t first = lack > 0 ? (lack + work.stride - 1) / work.stride : 0;
    const int64_t from = first * work.stride - lack;
    const int64_t count =
        from < work.width ? (work.width - from + work.stride - 1) / work.stride : 0;
    float* to = work.row + remainder * work.phase_size + first;
    if (work.stride == 2) {
      spread_phase<2>(work.line + from, count, 2, to);
    } else {
      spread_phase<0>(work.line + from, count, work.stride, to);
    }
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
