// Radii that take up the rounding errors of their centres' sums, term by term: interval.h. Included
// by the file of each instruction set, whose order of summation the counts follow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "interval/ends.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// N floats as one vector of the compiler's: as loops over arrays the counts would live in memory.
template <int N>
struct Together {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef int32_t Bits __attribute__((vector_size(4 * N)));

  // By reference: how a vector is returned depends on the instruction set.
  static void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof(to)); }
  static void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof(value)); }
};

// What the radii of N sums side by side grow with.
template <int N>
struct RunGains {
  float centre[N], radius[N];
  float term, floor;
};

// A run backwards, N sums side by side that `rest` further roundings wait for. Every column has N
// centres and radii, `column` floats from one to the next.
template <int N>
void widen_run(const float* centre, float* radius, int64_t count, int64_t column, float rest,
               const RunGains<N>& gains) {
  using Floats = typename Together<N>::Floats;
  using Bits = typename Together<N>::Bits;
  Floats of_centre, of_radius, c, r;
  Together<N>::load(gains.centre, of_centre);
  Together<N>::load(gains.radius, of_radius);
  const Floats zero = {}, one = zero + 1.0f;
  const Bits magnitude = Bits{} + 0x7fffffff;
  Floats roundings = zero + rest;
  for (int64_t k = count - 1; k >= 0; --k) {
    Together<N>::load(centre + k * column, c);
    Together<N>::load(radius + k * column, r);
    roundings += reinterpret_cast<Floats>(reinterpret_cast<Bits>(one) &
                                          (c != zero));  // an exact zero rounds nothing
    const Floats gain = roundings * gains.term + of_centre;
    const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Bits>(c) & magnitude);
    Together<N>::store(radius + k * column, (r * of_radius + size * gain) * kSlack + gains.floor);
  }
}

// `kProducts`: 1 where products are rounded before they are added, 0 with FMA.
template <int kProducts>
void widen_panel(const WidenPanel& work) {
  RunGains<kLanes> gains{{}, {}, work.inputs[0]->term_gain, work.inputs[0]->input_floor};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    gains.centre[lane] = work.inputs[lane]->centre_gain;
    gains.radius[lane] = work.inputs[lane]->radius_gain;
    gains.term = std::fmax(gains.term, work.inputs[lane]->term_gain);
  }
  for (int64_t from = 0; from < work.terms; from += kRun) {
    const int64_t count = work.terms - from < kRun ? work.terms - from : kRun;
    const int64_t rest = kProducts + additions_after_run(work.begin + from, work.total);
    float* panel = work.panel + from * kPanelWidth;
    widen_run<kLanes>(panel, panel + kLanes, count, kPanelWidth, static_cast<float>(rest), gains);
  }
}

// kDotLanes sums side by side, which are added in a tree at last.
template <int kDotLanes, int kProducts>
void widen_row(const WidenRow& work, const Constants& constants) {
  RunGains<kDotLanes> gains{{}, {}, constants.term_gain, constants.input_floor};
  for (int i = 0; i < kDotLanes; ++i) {
    gains.centre[i] = constants.centre_gain;
    gains.radius[i] = constants.radius_gain;
  }
  int64_t tree = 0;
  for (int lanes = kDotLanes; lanes > 1; lanes /= 2) ++tree;
  const int64_t steps = (work.terms + kDotLanes - 1) / kDotLanes, runs = (steps + kRun - 1) / kRun;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t from = run * kRun * kDotLanes, left = work.terms - from;
    const auto rest = static_cast<float>(kProducts + additions_after(run, runs) + tree);
    const int64_t count = left < kRun * kDotLanes ? left / kDotLanes : kRun;
    const int64_t tail = left < kRun * kDotLanes ? left % kDotLanes : 0;
    const auto widen = [&](const float* centre, float* radius, int64_t columns, float after) {
      widen_run<kDotLanes>(centre, radius, columns, kDotLanes, after, gains);
    };
    widen(work.centre + from, work.radius + from, count, rest + (tail > 0 ? 1.0f : 0.0f));
    if (tail == 0) continue;
    float centre[kDotLanes] = {}, radius[kDotLanes] = {};
    for (int64_t i = 0; i < tail; ++i) {
      centre[i] = work.centre[from + count * kDotLanes + i];
      radius[i] = work.radius[from + count * kDotLanes + i];
    }
    widen(centre, radius, 1, rest);
    for (int64_t i = 0; i < tail; ++i) work.radius[from + count * kDotLanes + i] = radius[i];
  }
}

void count_nonzero(const float* panel, int64_t terms, int32_t* nonzero) {
  Together<kLanes>::Floats c, r;
  Together<kLanes>::Bits count = {};
  for (int64_t k = 0; k < terms; ++k, panel += kPanelWidth) {
    Together<kLanes>::load(panel, c);
    Together<kLanes>::load(panel + kLanes, r);
    count -= (c != 0.0f) | (r != 0.0f);  // of -1 where true
  }
  std::memcpy(nonzero, &count, sizeof(count));
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
