// The reference: plain loops, round to nearest, bounds as proven in interval.h.
#include <algorithm>

#include "core/rounding.h"
#include "interval/curve_loops.h"
#include "interval/element_loops.h"
#include "interval/ends.h"
#include "interval/integer_loops.h"
#include "interval/kernels.h"
#include "interval/pair_loops.h"
#include "interval/patches.h"
#include "interval/radius_loops.h"
#include "interval/uniform_loops.h"

namespace pyrobust {
namespace interval {
namespace {

float prepare(const Ends& ends, const Constants& constants, float* centre, float* radius) {
  float largest = 0.0f;
  for (int64_t i = 0; i < ends.count; ++i) {
    // Written so that a NaN stays.
    const float low = ends.lower[i] < ends.floor ? ends.floor : ends.lower[i];
    const float high = ends.upper[i] < ends.floor ? ends.floor : ends.upper[i];
    const float c = low == high ? low : 0.5f * low + 0.5f * high;
    const float reach = std::fmax(high - c, c - low), size = std::fabs(c);
    const float magnitude = std::fmax(std::fabs(low), std::fabs(high));
    centre[i] = c;
    radius[i] = constants.outward
                    ? (reach * constants.radius_gain + size * constants.centre_gain) * kSlack +
                          constants.input_floor
                    : reach;
    // Written so that a NaN counts as infinite.
    if (!(magnitude <= largest)) largest = magnitude;
    if (!(c - c == 0.0f && reach - reach == 0.0f)) largest = rounding::infinity();
  }
  return largest;
}

struct Sums {
  float centre;
  float radius;
};

// As many lanes as chunks have runs, so that a chunk of the proof is kDotLanes runs of kRun terms.
constexpr int kDotLanes = 16;

Sums dot(const float* weight, const float* centre, const float* radius, int64_t terms) {
  float total_c[kDotLanes] = {}, total_r[kDotLanes] = {};
  for (int64_t block = 0; block < terms; block += kDotLanes * kRun) {
    const int64_t end = terms < block + kDotLanes * kRun ? terms : block + kDotLanes * kRun;
    float part_c[kDotLanes] = {}, part_r[kDotLanes] = {};
    int64_t k = block;
    for (; k + kDotLanes <= end; k += kDotLanes) {
      for (int lane = 0; lane < kDotLanes; ++lane) {
        part_c[lane] += weight[k + lane] * centre[k + lane];
        part_r[lane] += std::fabs(weight[k + lane]) * radius[k + lane];
      }
    }
    for (int lane = 0; k < end; ++k, ++lane) {
      part_c[lane] += weight[k] * centre[k];
      part_r[lane] += std::fabs(weight[k]) * radius[k];
    }
    for (int lane = 0; lane < kDotLanes; ++lane) {
      total_c[lane] += part_c[lane];
      total_r[lane] += part_r[lane];
    }
  }
  for (int half = kDotLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      total_c[lane] += total_c[lane + half];
      total_r[lane] += total_r[lane + half];
    }
  }
  return {total_c[0], total_r[0]};
}

void dots(const Dots& work) {
  for (int64_t n = 0; n < work.rows; ++n) {
    for (int64_t b = 0; b < work.batch; ++b) {
      const Sums sums = dot(work.weight + n * work.terms, work.centre + b * work.terms,
                            work.radius + b * work.terms, work.terms);
      work.centre_sums[b * work.sum_stride + n] = sums.centre;
      work.radius_sums[b * work.sum_stride + n] = sums.radius;
    }
  }
}

void pack(const PackRows& work) {
  constexpr int64_t kStep = 16;  // terms at a time: one cache line of each row
  for (int64_t begin = 0; begin < work.terms; begin += kStep) {
    const int64_t end = work.terms < begin + kStep ? work.terms : begin + kStep;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool present = lane < work.lanes;
      for (int64_t k = begin; k < end; ++k) {
        float* column = work.panel + k * kPanelWidth + lane;
        column[0] = present ? work.centre[lane * work.stride + k] : 0.0f;
        column[kLanes] = present ? work.radius[lane * work.stride + k] : 0.0f;
      }
    }
  }
}

// `kRadii`: the upper half of a panel holds radii, which meet |W|.
template <bool kRadii>
void add_chunk(const float* panel, const float* weight, int64_t terms, float* sums) {
  float total[kPanelWidth] = {};
  for (int64_t begin = 0; begin < terms; begin += kRun) {
    const int64_t end = terms < begin + kRun ? terms : begin + kRun;
    float part[kPanelWidth] = {};
    for (int64_t k = begin; k < end; ++k) {
      const float w = weight[k], size = kRadii ? std::fabs(w) : w;
      const float* column = panel + k * kPanelWidth;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        part[lane] += w * column[lane];
        part[kLanes + lane] += size * column[kLanes + lane];
      }
    }
    for (int64_t lane = 0; lane < kPanelWidth; ++lane) total[lane] += part[lane];
  }
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) sums[lane] += total[lane];
}

template <bool kRadii>
void tiles_of_panel(const Tiles& work, const float* panel, float* sums) {
  if (!work.add) std::fill(sums, sums + work.rows * kPanelWidth, 0.0f);
  for (int64_t begin = 0; begin < work.terms; begin += kChunk) {
    const int64_t count = work.terms - begin < kChunk ? work.terms - begin : kChunk;
    for (int64_t n = 0; n < work.rows; ++n) {
      add_chunk<kRadii>(panel + begin * kPanelWidth, work.weight + n * work.weight_stride + begin,
                        count, sums + n * kPanelWidth);
    }
  }
}

template <bool kRadii>
void tiles(const Tiles& work) {
  for (int64_t p = 0; p < work.panels; ++p) {
    tiles_of_panel<kRadii>(work, work.panel + p * work.panel_stride,
                           work.sums + p * work.sum_stride);
  }
}

struct OneFloat {
  using Vector = float;
  static constexpr int64_t kWidth = 1;
  static float zero() { return 0.0f; }
  static float load(const float* from, int64_t) { return *from; }
  static float add_size(float x, float sum) { return sum + std::fabs(x); }
  static float add_square(float x, float sum) { return sum + x * x; }
  static float add(float a, float b) { return a + b; }
  static float sum(float x) { return x; }
};

// finish_one, and whether the ends are finite.
bool finish(float centre, float radius, float shift, float offset, const Constants& constants,
            float* lower, float* upper) {
  finish_one(centre, radius, shift, offset, constants, lower, upper);
  return rounding::is_finite(*lower) && rounding::is_finite(*upper);
}

bool finish_row(const FinishRow& work, const Constants& constants) {
  bool finite = true;
  for (int64_t n = 0; n < work.count; ++n) {
    const float shift = work.bias != nullptr ? work.bias[n] : 0.0f;
    finite &= finish(work.centre_sums[n], work.radius_sums[n], shift, work.offset, constants,
                     work.out_lower + n, work.out_upper + n);
  }
  return finite;
}

bool finish_panel(const FinishPanel& work, const Constants& constants) {
  bool finite = true;
  for (int64_t n = 0; n < work.rows; ++n) {
    const float* sums = work.sums + n * kPanelWidth;
    const float shift = work.bias != nullptr ? work.bias[n] : 0.0f;
    for (int64_t lane = 0; lane < work.lanes; ++lane) {
      const int64_t at = n * work.row_stride + lane * work.lane_stride, place = lane % kLanes;
      const float* pair = sums + lane / kLanes * work.sum_stride + place;
      finite &= finish(pair[0], pair[kLanes], shift, work.offsets[place], constants,
                       work.out_lower + at, work.out_upper + at);
    }
  }
  return finite;
}

}  // namespace

const IntervalKernels kPortableKernels = {
    prepare,
    pack,
    pack_patches,
    spread,
    dots,
    tiles<true>,
    finish_row,
    finish_panel,
    kElementLoops,
    kCurveLoops,
    kPairLoops,
    {widen_panel<1>, widen_row<kDotLanes, 1>, count_nonzero},
    uniform_loops<OneFloat, 1>(tiles<false>),
    &kIntegerLoops,
};

}  // namespace interval
}  // namespace pyrobust
