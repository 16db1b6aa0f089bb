// Inputs whose radii are all the same: what stands in for the product with radii
// (uniform_inputs.h). Included by the file of each instruction set and compiled with its flags; the
// set supplies
//
//   struct Set {
//     using Vector;
//     static constexpr int64_t kWidth;  // floats of one
//     static Vector zero();
//     static Vector load(const float* from, int64_t count);  // zeros beyond
//     static Vector add_size(Vector x, Vector sum);          // sum + |x|
//     static Vector add_square(Vector x, Vector sum);        // sum + x x
//     static Vector add(Vector a, Vector b);
//     static float sum(Vector x);
//   };
#pragma once

#include <cmath>
#include <cstdint>

#include "interval/ends.h"
#include "interval/kernels.h"
#include "interval/radius_loops.h"

namespace pyrobust {
namespace interval {
namespace {

// Sums of up to kRun terms and of the runs of kWeighedTerms pass fewer than 64 roundings.
constexpr float kSumSlack = 1.0f + 64.0f / 16777216.0f;

// At least the root of a sum of at most kRun squares, whose relative errors the slack covers; what
// they lose where they underflow is below 2^-145, its root below the 2^-70.
inline float root_up(float squares) {
  constexpr float kRootFloor = 8.470329e-22f;  // 2^-70
  return std::sqrt(squares) * kSumSlack + kRootFloor;
}

inline RadiusRange radius_range(const Ends& ends) {
  using Floats = Together<kPanelWidth>::Floats;
  float low_left[kPanelWidth], high_left[kPanelWidth];
  Floats low, high, most = {}, size = {}, poison = {};
  const Floats zero = {}, floor = zero + ends.floor;
  Floats least = zero + rounding::infinity();
  for (int64_t k = 0; k < ends.count; k += kPanelWidth) {
    const float *lower = ends.lower + k, *upper = ends.upper + k;
    if (ends.count - k < kPanelWidth) {  // the last end fills up
      for (int64_t i = 0; i < kPanelWidth; ++i) {
        const int64_t at = k + i < ends.count ? i : ends.count - 1 - k;
        low_left[i] = lower[at];
        high_left[i] = upper[at];
      }
      lower = low_left;
      upper = high_left;
    }
    Together<kPanelWidth>::load(lower, low);
    Together<kPanelWidth>::load(upper, high);
    low = low < floor ? floor : low;
    high = high < floor ? floor : high;
    const Floats middle = 0.5f * low + 0.5f * high, c = low == high ? low : middle;
    const Floats right = high - c, left = c - low, r = right > left ? right : left;
    least = r < least ? r : least;
    most = r > most ? r : most;
    const Floats farther = -low > high ? -low : high;
    size = farther > size ? farther : size;
    poison += r * 0.0f;
  }
  RadiusRange range{rounding::infinity(), 0.0f, 0.0f};
  for (int64_t i = 0; i < kPanelWidth; ++i) {
    range.least = std::fmin(range.least, poison[i] == 0.0f ? least[i] : -rounding::infinity());
    range.most = std::fmax(range.most, most[i]);
    range.size = std::fmax(range.size, size[i]);
  }
  return range;
}

// `kProducts` as of widen_panel, whose count of roundings this is.
template <int kProducts>
void panel_errors(const PanelErrors& work) {
  using Floats = Together<kPanelWidth>::Floats;
  using Bits = Together<kPanelWidth>::Bits;
  const Floats zero = {}, one = zero + 1.0f;
  const Bits magnitude = Bits{} + 0x7fffffff;
  const float floor = work.inputs[0]->input_floor;
  float of_centre[kPanelWidth], of_term = 0.0f;
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    of_centre[lane] = work.inputs[lane]->centre_gain;
    if (work.counted) of_term = std::fmax(of_term, work.inputs[lane]->term_gain);
  }
  Floats gain_of_all, most, c;
  Together<kPanelWidth>::load(of_centre, gain_of_all);
  Together<kPanelWidth>::load(work.most, most);
  for (int64_t from = 0; from < work.terms; from += kRun) {
    const int64_t count = work.terms - from < kRun ? work.terms - from : kRun;
    const int64_t rest = kProducts + additions_after_run(work.begin + from, work.total);
    Floats roundings = zero + static_cast<float>(rest), squares = zero;
    for (int64_t k = from + count - 1; k >= from; --k) {
      Together<kPanelWidth>::load(work.panel + k * kPanelWidth, c);
      roundings += reinterpret_cast<Floats>(reinterpret_cast<Bits>(one) &
                                            (c != zero));  // an exact zero rounds nothing
      const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Bits>(c) & magnitude);
      const Floats error = size * (roundings * of_term + gain_of_all) * kSlack + floor;
      squares += error * error;
      most = error > most ? error : most;
    }
    float* norms = work.norms + from / kRun * kPanelWidth;
    for (int64_t lane = 0; lane < kPanelWidth; ++lane) norms[lane] = root_up(squares[lane]);
  }
  Together<kPanelWidth>::store(work.most, most);
}

template <typename Set>
void weigh_row(const float* weight, const WeighRows& work, float* sizes) {
  auto total = Set::zero();
  for (int64_t from = 0; from < work.terms; from += kRun) {
    const int64_t to = work.terms - from < kRun ? work.terms : from + kRun;
    auto size = Set::zero(), squares = Set::zero();
    for (int64_t k = from; k < to; k += Set::kWidth) {
      const auto w = Set::load(weight + k, to - k);
      size = Set::add_size(w, size);
      squares = Set::add_square(w, squares);
    }
    total = Set::add(total, size);
    if (work.outward) sizes[1 + (work.begin + from) / kRun] = Set::sum(squares);
  }
  const float before = work.begin > 0 ? sizes[0] : 0.0f, now = Set::sum(total);
  constexpr float kAdded = 1.0f + 4.0f / 16777216.0f;  // of the addition and its own product
  sizes[0] = work.outward ? (before + now * kSumSlack) * kAdded : before + now;
  if (!work.outward) return;
  float* norms = sizes + 1 + work.begin / kRun;
  const int64_t runs = (work.terms + kRun - 1) / kRun;
  for (int64_t run = 0; run < runs; ++run) norms[run] = root_up(norms[run]);
}

template <typename Set>
void weigh_rows(const WeighRows& work) {
  for (int64_t n = 0; n < work.rows; ++n) {
    weigh_row<Set>(work.weight + n * work.stride, work, work.sizes + n * work.size_stride);
  }
}

inline void join_sums(const JoinSums& work) {
  using Floats = Together<kLanes>::Floats;
  Floats first, second, sum, top, left;
  for (int64_t n = 0; n < work.rows; ++n) {
    float *centres = work.centres + n * kPanelWidth, *radii = work.radii + n * kPanelWidth;
    const float size = work.sizes[n * work.size_stride];
    Together<kLanes>::load(centres + kLanes, second);
    Together<kLanes>::load(radii, sum);
    Together<kLanes>::load(work.top, top);
    first = top * size;
    left = first < sum ? first : sum;
    Together<kLanes>::load(radii + kLanes, sum);
    Together<kLanes>::load(work.top + kLanes, top);
    first = top * size;
    Together<kLanes>::store(centres + kLanes, left);
    Together<kLanes>::store(radii, second);
    Together<kLanes>::store(radii + kLanes, first < sum ? first : sum);
  }
}

template <typename Set, int kProducts>
constexpr UniformLoops uniform_loops(void (*tiles)(const Tiles&)) {
  return {tiles, radius_range, panel_errors<kProducts>, weigh_rows<Set>, join_sums};
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
