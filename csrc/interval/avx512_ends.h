// Included by avx512.cpp alone: centres and radii of ends, and ends of sums, sixteen at a time. The
// same arithmetic as in avx2.cpp, operation by operation.
#pragma once

#include <immintrin.h>

#include "core/rounding.h"
#include "interval/avx512_packed.h"
#include "interval/ends.h"
#include "interval/kernels.h"
#include "interval/patches.h"

namespace pyrobust {
namespace interval {
namespace {

inline __mmask16 lanes_mask(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

// Whole registers take plain moves: a load waits for a masked store that it would read.
inline __m512 load_lanes(const float* from, int64_t count) {
  return count >= 16 ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(lanes_mask(count), from);
}

inline void store_lanes(float* to, int64_t count, __m512 value) {
  if (count >= 16) {
    _mm512_storeu_ps(to, value);
  } else {
    _mm512_mask_storeu_ps(to, lanes_mask(count), value);
  }
}

// Whole lines may go past the caches, which otherwise read them first (3 to 64 channels of 32 x 32,
// batch 128, Zen 5: 4.7 ms to 4.1).
inline void store_end(float* to, int64_t count, __m512 value, bool past_cache) {
  if (past_cache && count >= 16 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_ps(to, value);
  } else {
    store_lanes(to, count, value);
  }
}

// Floats ahead: rows are short and neighbours, and the processor looks ahead within a page only.
constexpr int64_t kAhead = 1024;

struct Sixteen {
  __m512 centre, radius, magnitude;
  __mmask16 unbounded;
};

inline Sixteen prepare_sixteen(__m512 low, __m512 high, __m512 floor, const Constants& constants) {
  const __m512 half = _mm512_set1_ps(0.5f), zero = _mm512_setzero_ps();
  low = _mm512_max_ps(floor, low);  // in this order a NaN stays
  high = _mm512_max_ps(floor, high);
  const __m512 middle = _mm512_add_ps(_mm512_mul_ps(half, low), _mm512_mul_ps(half, high));
  const __m512 c = _mm512_mask_mov_ps(middle, _mm512_cmp_ps_mask(low, high, _CMP_EQ_OQ), low);
  __m512 r = _mm512_max_ps(_mm512_sub_ps(high, c), _mm512_sub_ps(c, low));
  const auto unbounded =
      static_cast<__mmask16>(_mm512_cmp_ps_mask(_mm512_sub_ps(c, c), zero, _CMP_NEQ_UQ) |
                             _mm512_cmp_ps_mask(_mm512_sub_ps(r, r), zero, _CMP_NEQ_UQ));
  if (constants.outward) {
    const __m512 grown = _mm512_mul_ps(r, _mm512_set1_ps(constants.radius_gain));
    const __m512 error = _mm512_mul_ps(magnitude(c), _mm512_set1_ps(constants.centre_gain));
    r = _mm512_add_ps(_mm512_mul_ps(_mm512_add_ps(grown, error), _mm512_set1_ps(kSlack)),
                      _mm512_set1_ps(constants.input_floor));
  }
  return {c, r, _mm512_max_ps(magnitude(low), magnitude(high)), unbounded};
}

float prepare(const Ends& ends, const Constants& constants, float* centre, float* radius) {
  const __m512 floor = _mm512_set1_ps(ends.floor);
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unbounded = 0;
  for (int64_t i = 0; i < ends.count; i += 16) {
    const int64_t rest = ends.count - i;
    _mm_prefetch(reinterpret_cast<const char*>(ends.lower + i + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(ends.upper + i + kAhead), _MM_HINT_T0);
    const Sixteen now = prepare_sixteen(load_lanes(ends.lower + i, rest),
                                        load_lanes(ends.upper + i, rest), floor, constants);
    store_lanes(centre + i, rest, now.centre);
    store_lanes(radius + i, rest, now.radius);
    largest = _mm512_max_ps(now.magnitude, largest);
    unbounded |= now.unbounded;
  }
  return unbounded != 0 ? rounding::infinity() : _mm512_reduce_max_ps(largest);
}

// Every second column by permutations, in the order of patches.h.
void spread_by_registers(const SpreadColumns& work) {
  if (work.stride != 2) return spread(work);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int64_t remainder = 0; remainder < 2; ++remainder) {
    const int64_t lack = work.pad - remainder;  // columns before the first that is given
    const int64_t first = lack > 0 ? (lack + 1) / 2 : 0, from = first * 2 - lack;
    const int64_t count = from < work.width ? (work.width - from + 1) / 2 : 0;
    float* to = work.row + remainder * work.phase_size + first;
    for (int64_t i = 0; i < count; i += 16) {
      const float* at = work.line + from + 2 * i;
      const int64_t rest = work.width - from - 2 * i;
      const __m512 a = load_lanes(at, rest);
      const __m512 b = rest > 16 ? load_lanes(at + 16, rest - 16) : a;
      store_lanes(to + i, count - i, _mm512_permutex2var_ps(a, even, b));
    }
  }
}

// One neighbour or more away from x on the side of `direction` (-1 or 1): core/rounding.h.
inline __m512 step_over(__m512 x, __m512 direction) {
  const __m512 step =
      _mm512_add_ps(_mm512_mul_ps(magnitude(x), _mm512_set1_ps(rounding::kNeighbour)),
                    _mm512_set1_ps(rounding::kLeast));
  return _mm512_add_ps(x, _mm512_mul_ps(step, direction));
}

struct SixteenEnds {
  __m512 lower, upper;
};

// `largest` grows to the largest of the upper and of the negated lower ends: infinite where one is.
inline SixteenEnds finish_sixteen(__m512 centre, __m512 radius, __m512 shift, __m512 offset,
                                  const Constants& constants, __m512* largest) {
  const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
  const __m512 zero = _mm512_setzero_ps(), infinite = _mm512_set1_ps(rounding::infinity());
  centre = _mm512_add_ps(centre, shift);
  __m512 low = _mm512_sub_ps(centre, radius), high = _mm512_add_ps(centre, radius);
  if (constants.outward) {
    const __m512 grown = _mm512_mul_ps(radius, _mm512_set1_ps(constants.inflate));
    const __m512 late = _mm512_mul_ps(magnitude(shift), _mm512_set1_ps(constants.bias_gain));
    const __m512 value = _mm512_mul_ps(magnitude(centre), _mm512_set1_ps(constants.value_gain));
    radius = _mm512_add_ps(_mm512_add_ps(grown, late), _mm512_add_ps(value, offset));
    radius = _mm512_mul_ps(radius, _mm512_set1_ps(kSlack));
    low = step_over(_mm512_sub_ps(step_over(centre, minus), radius), minus);
    high = step_over(_mm512_add_ps(step_over(centre, one), radius), one);
  }
  const __mmask16 bounded = _mm512_cmp_ps_mask(magnitude(centre), infinite, _CMP_LT_OQ) &
                            _mm512_cmp_ps_mask(radius, _mm512_set1_ps(constants.limit), _CMP_LT_OQ);
  low = _mm512_mask_mov_ps(_mm512_sub_ps(zero, infinite), bounded, low);
  high = _mm512_mask_mov_ps(infinite, bounded, high);
  if (constants.least > 0.0f) {  // an end between zero and `least` becomes zero, on the outer side
    const __m512 least = _mm512_set1_ps(constants.least), below = _mm512_sub_ps(zero, least);
    const auto between = [](__m512 x, __m512 from, __m512 to) {
      return static_cast<__mmask16>(_mm512_cmp_ps_mask(x, from, _CMP_GT_OQ) &
                                    _mm512_cmp_ps_mask(x, to, _CMP_LT_OQ));
    };
    low = _mm512_mask_mov_ps(low, between(low, zero, least), zero);
    high = _mm512_mask_mov_ps(high, between(high, below, zero), zero);
  }
  *largest = _mm512_max_ps(*largest, _mm512_max_ps(high, _mm512_sub_ps(zero, low)));
  return {low, high};
}

inline bool finite(__m512 largest) {
  return _mm512_cmp_ps_mask(largest, _mm512_set1_ps(rounding::infinity()), _CMP_LT_OQ) == 0xffff;
}

// Lanes of two panels at once where they are neighbours in memory, as pixels are.
bool finish_pixels(const FinishPanel& work, const Constants& constants) {
  if (work.row_stride == 1) return avx2_kernels()->finish_panel(work, constants);
  const __m512 offset = _mm512_broadcast_f32x8(_mm256_loadu_ps(work.offsets));
  __m512 largest = _mm512_setzero_ps();
  for (int64_t n = 0; n < work.rows; ++n) {
    const __m512 shift = _mm512_set1_ps(work.bias != nullptr ? work.bias[n] : 0.0f);
    const float* sums = work.sums + n * kPanelWidth;
    for (int64_t lane = 0; lane < work.lanes; lane += 16, sums += 2 * work.sum_stride) {
      const bool both = lane + kLanes < work.lanes;
      const __m512 left = _mm512_loadu_ps(sums);
      const __m512 right = both ? _mm512_loadu_ps(sums + work.sum_stride) : left;
      const SixteenEnds ends = finish_sixteen(_mm512_shuffle_f32x4(left, right, 0x44),
                                              _mm512_shuffle_f32x4(left, right, 0xee), shift,
                                              offset, constants, &largest);
      const int64_t at = n * work.row_stride + lane;
      store_end(work.out_lower + at, work.lanes - lane, ends.lower, work.past_cache);
      store_end(work.out_upper + at, work.lanes - lane, ends.upper, work.past_cache);
    }
  }
  if (work.past_cache) _mm_sfence();
  return finite(largest);
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
