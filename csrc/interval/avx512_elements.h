// Included by avx512.cpp alone: the loops of element_loops.h by embedded rounding, which makes ends
// without knowing the error of a sum. A lower end that overflows upwards stays finite, as the upper
// one does not.
#pragma once

#include <immintrin.h>

#include "interval/avx512_ends.h"
#include "interval/element_loops.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kLargerMagnitude = 0x0b;  // of vrangepd

// Whether a lane is an infinity or no number.
inline __mmask16 odd_lanes(__m512 value) { return _mm512_fpclass_ps_mask(value, 0x99); }

// An end between zero and `least` becomes zero, on the outer side.
inline SixteenEnds flushed_ends(SixteenEnds ends, float least) {
  const __m512 zero = _mm512_setzero_ps(), above = _mm512_set1_ps(least);
  const __m512 below = _mm512_sub_ps(zero, above);
  const __mmask16 low = static_cast<__mmask16>(_mm512_cmp_ps_mask(ends.lower, zero, _CMP_GT_OQ) &
                                               _mm512_cmp_ps_mask(ends.lower, above, _CMP_LT_OQ));
  const __mmask16 high = static_cast<__mmask16>(_mm512_cmp_ps_mask(ends.upper, below, _CMP_GT_OQ) &
                                                _mm512_cmp_ps_mask(ends.upper, zero, _CMP_LT_OQ));
  return {_mm512_mask_mov_ps(ends.lower, low, zero), _mm512_mask_mov_ps(ends.upper, high, zero)};
}

template <bool kOutward>
bool sum_sixteen(const SumLoop& work) {
  const __m512 floor_x = _mm512_set1_ps(work.floor_x), floor_y = _mm512_set1_ps(work.floor_y);
  __mmask16 unbounded = 0;
  for (int64_t i = 0; i < work.count; i += 16) {
    const int64_t rest = work.count - i;
    // in this order a NaN stays
    const __m512 a = _mm512_max_ps(floor_x, load_lanes(work.low_x + i, rest));
    const __m512 b = _mm512_max_ps(floor_y, load_lanes(work.low_y + i, rest));
    const __m512 c = _mm512_max_ps(floor_x, load_lanes(work.high_x + i, rest));
    const __m512 d = _mm512_max_ps(floor_y, load_lanes(work.high_y + i, rest));
    SixteenEnds ends{_mm512_add_ps(a, b), _mm512_add_ps(c, d)};
    if (kOutward) ends = {_mm512_add_round_ps(a, b, kDown), _mm512_add_round_ps(c, d, kUp)};
    if (work.least > 0.0f) ends = flushed_ends(ends, work.least);
    unbounded |= lanes_mask(rest) & (odd_lanes(ends.lower) | odd_lanes(ends.upper));
    store_end(work.out_lower + i, rest, ends.lower, work.past_cache);
    store_end(work.out_upper + i, rest, ends.upper, work.past_cache);
  }
  if (work.past_cache) _mm_sfence();
  if (unbounded != 0) open_ends(work.count, work.out_lower, work.out_upper);
  return unbounded == 0;
}

bool sum_by_registers(const SumLoop& work) {
  return work.outward ? sum_sixteen<true>(work) : sum_sixteen<false>(work);
}

// The numbers of an AffineLoop in all lanes.
struct AffineLanes {
  __m512d mean, scale, shift, value_error, input_error, error, limit;

  explicit AffineLanes(const AffineLoop& work)
      : mean(_mm512_set1_pd(work.mean)),
        scale(_mm512_set1_pd(work.scale)),
        shift(_mm512_set1_pd(work.shift)),
        value_error(_mm512_set1_pd(work.value_error)),
        input_error(_mm512_set1_pd(work.input_error)),
        error(_mm512_set1_pd(work.error)),
        limit(_mm512_set1_pd(work.limit)) {}

  // of the eight channels from `i` on
  AffineLanes(const AffineColumns& work, int64_t i)
      : mean(_mm512_loadu_pd(work.mean + i)),
        scale(_mm512_loadu_pd(work.scale + i)),
        shift(_mm512_loadu_pd(work.shift + i)),
        value_error(_mm512_set1_pd(work.value_error)),
        input_error(eight_or_zero(work.input_error, i)),
        error(_mm512_loadu_pd(work.error + i)),
        limit(eight_or_zero(work.limit, i)) {}

  __mmask8 falls() const { return _mm512_cmp_pd_mask(scale, _mm512_setzero_pd(), _CMP_LT_OQ); }

 private:
  static __m512d eight_or_zero(const double* values, int64_t i) {
    return values != nullptr ? _mm512_loadu_pd(values + i) : _mm512_setzero_pd();
  }
};

struct EightEnds {
  __m256 lower, upper;
  __mmask8 beyond;  // where an input is
};

// The roundings of all but the last sums are part of the errors.
template <bool kOfInputs>
inline EightEnds affine_eight(const AffineLanes& of, __m256 first, __m256 last) {
  const __m512d x = _mm512_cvtps_pd(first), y = _mm512_cvtps_pd(last);
  const __m512d a = _mm512_mul_pd(_mm512_sub_pd(x, of.mean), of.scale);
  const __m512d b = _mm512_mul_pd(_mm512_sub_pd(y, of.mean), of.scale);
  __m512d error =
      _mm512_fmadd_pd(of.value_error, _mm512_range_pd(a, b, kLargerMagnitude), of.error);
  const __m512d input = _mm512_range_pd(x, y, kLargerMagnitude);
  if (kOfInputs) error = _mm512_fmadd_pd(of.input_error, input, error);
  const __m512d low = _mm512_sub_round_pd(_mm512_add_round_pd(a, of.shift, kDown), error, kDown);
  const __m512d high = _mm512_add_round_pd(_mm512_add_round_pd(b, of.shift, kUp), error, kUp);
  const __mmask8 beyond =
      kOfInputs ? _mm512_cmp_pd_mask(input, of.limit, _CMP_NLE_UQ) : __mmask8{0};
  return {_mm512_cvt_roundpd_ps(low, kDown), _mm512_cvt_roundpd_ps(high, kUp), beyond};
}

// `first` and `last` are the ends that give the lower and the upper ones.
template <bool kOfInputs>
inline SixteenEnds affine_ends(const AffineLanes& of_left, const AffineLanes& of_right,
                               __m512 first, __m512 last, float least, __mmask16 lanes,
                               __mmask16* unbounded) {
  const EightEnds left =
      affine_eight<kOfInputs>(of_left, _mm512_castps512_ps256(first), _mm512_castps512_ps256(last));
  const EightEnds right = affine_eight<kOfInputs>(of_right, _mm512_extractf32x8_ps(first, 1),
                                                  _mm512_extractf32x8_ps(last, 1));
  SixteenEnds ends{_mm512_insertf32x8(_mm512_castps256_ps512(left.lower), right.lower, 1),
                   _mm512_insertf32x8(_mm512_castps256_ps512(left.upper), right.upper, 1)};
  if (least > 0.0f) ends = flushed_ends(ends, least);
  const auto beyond = static_cast<__mmask16>(left.beyond | right.beyond << 8);
  *unbounded |= lanes & (odd_lanes(ends.lower) | odd_lanes(ends.upper) | beyond);
  return ends;
}

template <bool kOfInputs>
bool affine_sixteen(const AffineLoop& work) {
  const AffineLanes of(work);
  const __m512 floor = _mm512_set1_ps(work.floor);
  __mmask16 unbounded = 0;
  for (int64_t i = 0; i < work.count; i += 16) {
    const int64_t rest = work.count - i;
    // in this order a NaN stays
    const __m512 first = _mm512_max_ps(floor, load_lanes(work.first + i, rest));
    const __m512 last = _mm512_max_ps(floor, load_lanes(work.last + i, rest));
    const SixteenEnds ends =
        affine_ends<kOfInputs>(of, of, first, last, work.least, lanes_mask(rest), &unbounded);
    store_end(work.out_lower + i, rest, ends.lower, work.past_cache);
    store_end(work.out_upper + i, rest, ends.upper, work.past_cache);
  }
  if (work.past_cache) _mm_sfence();
  if (unbounded != 0) open_ends(work.count, work.out_lower, work.out_upper);
  return unbounded == 0;
}

bool affine_by_registers(const AffineLoop& work) {
  return work.input_error > 0.0 ? affine_sixteen<true>(work) : affine_sixteen<false>(work);
}

template <bool kOfInputs>
bool columns_sixteen(const AffineColumns& work) {
  const __m512 floor = _mm512_set1_ps(work.floor);
  __mmask16 unbounded = 0;
  for (int64_t i = 0; i < work.count; i += 16) {
    const int64_t rest = work.count - i;
    const AffineLanes left(work, i), right(work, i + 8);
    const auto falls = static_cast<__mmask16>(left.falls() | right.falls() << 8);
    // in this order a NaN stays
    const __m512 low = _mm512_max_ps(floor, load_lanes(work.lower + i, rest));
    const __m512 high = _mm512_max_ps(floor, load_lanes(work.upper + i, rest));
    const SixteenEnds ends = affine_ends<kOfInputs>(
        left, right, _mm512_mask_mov_ps(low, falls, high), _mm512_mask_mov_ps(high, falls, low),
        work.least, lanes_mask(rest), &unbounded);
    store_end(work.out_lower + i, rest, ends.lower, false);
    store_end(work.out_upper + i, rest, ends.upper, false);
  }
  if (unbounded != 0) open_ends(work.count, work.out_lower, work.out_upper);
  return unbounded == 0;
}

bool columns_by_registers(const AffineColumns& work) {
  return work.input_error != nullptr ? columns_sixteen<true>(work) : columns_sixteen<false>(work);
}

constexpr ElementLoops kRegisterLoops = {
    sum_by_registers,     affine_by_registers, nearest_affine_loop,   columns_by_registers,
    nearest_columns_loop, gradients_loop,      column_gradients_loop, ball_loop};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
