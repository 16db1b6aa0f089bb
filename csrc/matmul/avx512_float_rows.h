// Included by avx512.cpp alone: in how many 8-bit parts a float32 row of x is multiplied.
//
// Parts round x to multiples of a step a group (avx512_parts.h), by r_k in column k; the product
// then errs by sum_k |r_k| |W_k|. A row takes three parts where
//
//   sum_k |r_k| <= 2^-21 S,   S = sum |x_k| over all k but the eight of largest |x| in each group
//
// or all r_k are 0; else four where those do; else float arithmetic. That is 4.8e-7 of sum |x||W|
// where |W| is no smaller at large x than at small, though eight columns of a group have weights of
// zero. Three parts do for normal numbers, four where the largest |x| is up to a thousand times the
// others. The row alone counts, so that its result does not depend on the batch.
#pragma once

#include "matmul/avx512_parts.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

constexpr double kMostRounded = 0x1p-21;
constexpr double kLeastMagnitude = 0x1p-90;  // of a group: 1 / step is a float then
constexpr double kDropped = 8.0;             // columns of a group

inline double total_of(const __m512* v) {
  return static_cast<double>(_mm512_reduce_add_ps(v[0]) + _mm512_reduce_add_ps(v[1]));
}

// What parts take from a group and what counts against it: sums of |r| and, from below, of |x| less
// the largest ones.
struct Rounded {
  double rest = 0.0, size = 0.0;
};

// Columns [from, to), of the largest magnitude `largest`. For every c the sum of |x| without its
// eight largest is at least that of min(|x|, c), less 8 c: c is the largest magnitude, and with
// four parts also 1/16 and 1/256 of it. Sums are of multiples of the step, lest they overflow.
template <int kParts>
Rounded rounded_group(const float* x, int64_t from, int64_t to, double largest) {
  constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  constexpr int kClips = kParts == 3 ? 1 : 3;
  const double step = power_of_two(largest / largest_of<kParts>());
  const __m512 inverse = _mm512_set1_ps(static_cast<float>(1.0 / step));
  double clip[kClips];
  __m512 rest[2], size[kClips][2];
  for (int c = 0; c < kClips; ++c) clip[c] = largest / step / (1 << 4 * c);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    rest[i] = _mm512_setzero_ps();
#pragma GCC unroll 3
    for (int c = 0; c < kClips; ++c) size[c][i] = _mm512_setzero_ps();
  }
  for (int64_t k = from; k < to; k += kBlock) {
    __m512 value[4];
    load_64(x, FloatType::kFloat32, k, to, value);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 v = _mm512_abs_ps(_mm512_mul_ps(value[i], inverse));
      const __m512 r = _mm512_sub_ps(v, _mm512_roundscale_ps(v, kToNearest));
      rest[i % 2] = _mm512_add_ps(rest[i % 2], _mm512_abs_ps(r));
      size[0][i % 2] = _mm512_add_ps(size[0][i % 2], v);
#pragma GCC unroll 2
      for (int c = 1; c < kClips; ++c) {
        const __m512 clipped = _mm512_min_ps(v, _mm512_set1_ps(static_cast<float>(clip[c])));
        size[c][i % 2] = _mm512_add_ps(size[c][i % 2], clipped);
      }
    }
  }
  double most = 0.0;
  for (int c = 0; c < kClips; ++c) {
    const double left = total_of(size[c]) - kDropped * clip[c];
    most = left > most ? left : most;
  }
  return {total_of(rest) * step, most * step};
}

template <int kParts>
bool rounds_little(const PackedMatrix& w, const float* x) {
  const int64_t columns = pads_groups(w) ? step_groups(w) * w.group_size : step_blocks(w) * kBlock;
  Rounded all;
  for (int64_t from = 0; from < w.cols; from += columns) {
    const int64_t to = w.cols - from < columns ? w.cols : from + columns;
    const double largest = step_of(x, FloatType::kFloat32, from, to, 1.0);
    if (largest == 0.0) continue;
    if (!(largest >= kLeastMagnitude)) return false;  // NaN: not finite
    const Rounded own = rounded_group<kParts>(x, from, to, largest);
    all.rest += own.rest;
    all.size += own.size;
  }
  return all.rest == 0.0 || all.rest <= kMostRounded * all.size;
}

Mode mode_of_float_row(const PackedMatrix& w, const float* x) {
  if (rounds_little<3>(w, x)) return Mode::kThreeParts;
  return rounds_little<4>(w, x) ? Mode::kFourParts : Mode::kExact;
}

}  // namespace
}  // namespace pyrobust::matmul
