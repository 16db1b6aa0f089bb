// Patches of images as panels: included by the file of each instruction set and compiled with its
// flags, as the moves want wide registers.
#pragma once

#include <cstring>

#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// The lanes of a panel as one vector of the compiler's.
typedef float LaneFloats __attribute__((vector_size(4 * kLanes)));
typedef int32_t LaneBits __attribute__((vector_size(4 * kLanes)));

// Where the lanes of a panel start in the image. Neighbours there are a run.
struct Lanes {
  int64_t base[kLanes];
  bool adjacent;       // one run
  int64_t second;      // where lane 0 of a second run would be; 0 where there are not two runs
  LaneBits of_second;  // its lanes
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
  out.second = 0;
  const int64_t row = work.out_width - first % work.out_width;  // lanes of its first row
  if (out.adjacent || present < kLanes || row + work.out_width < kLanes) return out;
  out.second = out.base[row] - row;  // an earlier row of the same image lies before
  for (int64_t lane = 0; lane < kLanes; ++lane) out.of_second[lane] = lane < row ? 0 : -1;
  return out;
}

inline void copy_two_runs(const float* first, const float* second, const LaneBits& of_second,
                          float* to) {
  LaneFloats a, b;
  std::memcpy(&a, first, sizeof(a));
  std::memcpy(&b, second, sizeof(b));
  const LaneFloats both = of_second ? b : a;
  std::memcpy(to, &both, sizeof(both));
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
        if (from.second != 0) {
          copy_two_runs(centre + from.base[0], centre + from.second, from.of_second, to);
          copy_two_runs(radius + from.base[0], radius + from.second, from.of_second, to + kLanes);
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
