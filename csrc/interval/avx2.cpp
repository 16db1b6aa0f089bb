// Eight lanes and FMA: the loops of portable.cpp with W loaded once for centre and radius, |W| made
// in a register. Round to nearest throughout; the bounds of interval.h do the rest, as AVX2 has no
// embedded rounding.
#include <immintrin.h>

#include "core/rounding.h"
#include "interval/curve_loops.h"
#include "interval/element_loops.h"
#include "interval/ends.h"
#include "interval/few_inputs.h"
#include "interval/integer_loops.h"
#include "interval/pair_loops.h"
#include "interval/patches.h"
#include "interval/plane_loops.h"
#include "interval/radius_loops.h"
#include "interval/uniform_loops.h"

namespace pyrobust {
namespace interval {
namespace {

inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

inline __m256i tail_mask(int64_t count) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}

// Whole vectors take plain moves: a masked store is microcoded on Zen, some 20 cycles each.
inline __m256 load(const float* from, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, tail_mask(count));
}

inline void store(float* to, int64_t count, __m256 value) {
  if (count >= 8) {
    _mm256_storeu_ps(to, value);
  } else {
    _mm256_maskstore_ps(to, tail_mask(count), value);
  }
}

inline float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float max_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// --- centre and radius
// ----------------------------------------------------------------------------

struct Eight {
  __m256 centre, radius, magnitude, unbounded;
};

inline Eight prepare_eight(__m256 low, __m256 high, __m256 floor, const Constants& constants) {
  low = _mm256_max_ps(floor, low);  // in this order a NaN stays
  high = _mm256_max_ps(floor, high);
  const __m256 half = _mm256_set1_ps(0.5f);
  const __m256 middle = _mm256_add_ps(_mm256_mul_ps(half, low), _mm256_mul_ps(half, high));
  const __m256 same = _mm256_cmp_ps(low, high, _CMP_EQ_OQ);
  const __m256 c = _mm256_blendv_ps(middle, low, same);
  const __m256 reach = _mm256_max_ps(_mm256_sub_ps(high, c), _mm256_sub_ps(c, low));
  const __m256 zero = _mm256_setzero_ps();
  const __m256 unbounded =
      _mm256_or_ps(_mm256_cmp_ps(_mm256_sub_ps(c, c), zero, _CMP_NEQ_UQ),
                   _mm256_cmp_ps(_mm256_sub_ps(reach, reach), zero, _CMP_NEQ_UQ));
  __m256 radius = reach;
  if (constants.outward) {
    const __m256 grown = _mm256_mul_ps(reach, _mm256_set1_ps(constants.radius_gain));
    const __m256 error = _mm256_mul_ps(magnitude(c), _mm256_set1_ps(constants.centre_gain));
    radius = _mm256_add_ps(_mm256_mul_ps(_mm256_add_ps(grown, error), _mm256_set1_ps(kSlack)),
                           _mm256_set1_ps(constants.input_floor));
  }
  return {c, radius, _mm256_max_ps(magnitude(low), magnitude(high)), unbounded};
}

float prepare(const Ends& ends, const Constants& constants, float* centre, float* radius) {
  __m256 largest = _mm256_setzero_ps(), unbounded = _mm256_setzero_ps();
  const __m256 floor = _mm256_set1_ps(ends.floor);
  for (int64_t i = 0; i < ends.count; i += 8) {
    const int64_t rest = ends.count - i;
    const Eight now =
        prepare_eight(load(ends.lower + i, rest), load(ends.upper + i, rest), floor, constants);
    store(centre + i, rest, now.centre);
    store(radius + i, rest, now.radius);
    largest = _mm256_max_ps(now.magnitude, largest);
    unbounded = _mm256_or_ps(now.unbounded, unbounded);
  }
  return _mm256_movemask_ps(unbounded) != 0 ? rounding::infinity() : max_of(largest);
}

// --- a few inputs: R rows of W against B inputs
// ----------------------------------------------------

struct Inputs {
  const float* centre;
  const float* radius;
  int64_t stride;
};

template <int R, int B>
inline void dot_step(const float* weight, int64_t row_stride, const Inputs& input, int64_t k,
                     __m256i mask, bool whole, __m256 (&c)[R][B], __m256 (&r)[R][B]) {
  for (int i = 0; i < R; ++i) {
    const float* at = weight + i * row_stride + k;
    const __m256 w = whole ? _mm256_loadu_ps(at) : _mm256_maskload_ps(at, mask);
    const __m256 size = magnitude(w);
    for (int b = 0; b < B; ++b) {
      const float *centre = input.centre + b * input.stride + k,
                  *radius = input.radius + b * input.stride + k;
      const __m256 x = whole ? _mm256_loadu_ps(centre) : _mm256_maskload_ps(centre, mask);
      const __m256 y = whole ? _mm256_loadu_ps(radius) : _mm256_maskload_ps(radius, mask);
      c[i][b] = _mm256_fmadd_ps(w, x, c[i][b]);
      r[i][b] = _mm256_fmadd_ps(size, y, r[i][b]);
    }
  }
}

template <int R, int B>
void dot_rows(const Dots& work, int64_t n) {
  const float* weight = work.weight + n * work.terms;
  const Inputs input{work.centre, work.radius, work.terms};
  const int64_t whole = work.terms / 8 * 8;
  __m256 total_c[R][B], total_r[R][B];
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) total_c[i][b] = total_r[i][b] = _mm256_setzero_ps();
  }
  const __m256i mask = tail_mask(work.terms - whole);
  for (int64_t begin = 0; begin < work.terms; begin += 8 * kRun) {
    const int64_t end = whole < begin + 8 * kRun ? whole : begin + 8 * kRun;
    __m256 c[R][B], r[R][B];
    for (int i = 0; i < R; ++i) {
      for (int b = 0; b < B; ++b) c[i][b] = r[i][b] = _mm256_setzero_ps();
    }
    for (int64_t k = begin; k < end; k += 8) {
      dot_step<R, B>(weight, work.terms, input, k, mask, true, c, r);
    }
    if (end == whole && end < work.terms && end < begin + 8 * kRun) {
      dot_step<R, B>(weight, work.terms, input, end, mask, false, c, r);
    }
    for (int i = 0; i < R; ++i) {
      for (int b = 0; b < B; ++b) {
        total_c[i][b] = _mm256_add_ps(total_c[i][b], c[i][b]);
        total_r[i][b] = _mm256_add_ps(total_r[i][b], r[i][b]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) {
      work.centre_sums[b * work.sum_stride + n + i] = sum_of(total_c[i][b]);
      work.radius_sums[b * work.sum_stride + n + i] = sum_of(total_r[i][b]);
    }
  }
}

struct FewInputs {
  // R x B x 2 accumulators hide the latency of FMA: 8 or 12 of the 16 registers.
  static constexpr int kRows[4] = {4, 2, 2, 1};

  template <int R, int B>
  static void rows(const Dots& work, int64_t n) {
    dot_rows<R, B>(work, n);
  }
};

// --- panels: R rows of W against eight inputs
// ------------------------------------------------------

// Ten accumulators, the two input vectors, W, |W| and the sign mask: 15 of the 16 registers. Six
// rows would spill one.
constexpr int kTileRows = 5;

// `kRadii`: the upper half of a panel holds radii, which meet |W|.
template <int R, bool kRadii>
void add_chunk(const float* panel, const float* weight, int64_t stride, int64_t terms,
               float* sums) {
  __m256 total_c[R], total_r[R];
  for (int i = 0; i < R; ++i) {
    total_c[i] = _mm256_loadu_ps(sums + i * kPanelWidth);
    total_r[i] = _mm256_loadu_ps(sums + i * kPanelWidth + kLanes);
  }
  __m256 chunk_c[R], chunk_r[R];
  for (int i = 0; i < R; ++i) chunk_c[i] = chunk_r[i] = _mm256_setzero_ps();
  for (int64_t begin = 0; begin < terms; begin += kRun) {
    const int64_t end = terms < begin + kRun ? terms : begin + kRun;
    __m256 c[R], r[R];
    for (int i = 0; i < R; ++i) c[i] = r[i] = _mm256_setzero_ps();
    for (int64_t k = begin; k < end; ++k) {
      const __m256 x = _mm256_loadu_ps(panel + k * kPanelWidth);
      const __m256 y = _mm256_loadu_ps(panel + k * kPanelWidth + kLanes);
      for (int i = 0; i < R; ++i) {
        const __m256 w = _mm256_broadcast_ss(weight + i * stride + k);
        c[i] = _mm256_fmadd_ps(w, x, c[i]);
        r[i] = _mm256_fmadd_ps(kRadii ? magnitude(w) : w, y, r[i]);
      }
    }
    for (int i = 0; i < R; ++i) {
      chunk_c[i] = _mm256_add_ps(chunk_c[i], c[i]);
      chunk_r[i] = _mm256_add_ps(chunk_r[i], r[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    _mm256_storeu_ps(sums + i * kPanelWidth, _mm256_add_ps(total_c[i], chunk_c[i]));
    _mm256_storeu_ps(sums + i * kPanelWidth + kLanes, _mm256_add_ps(total_r[i], chunk_r[i]));
  }
}

template <bool kRadii>
void tiles_of_panel(const Tiles& work, const float* panel, float* sums) {
  for (int64_t i = 0; !work.add && i < work.rows * kPanelWidth; i += 8) {
    _mm256_storeu_ps(sums + i, _mm256_setzero_ps());
  }
  for (int64_t begin = 0; begin < work.terms; begin += kChunk) {
    const int64_t count = work.terms - begin < kChunk ? work.terms - begin : kChunk;
    const float *column = panel + begin * kPanelWidth, *weight = work.weight + begin;
    int64_t n = 0;
    for (; n + kTileRows <= work.rows; n += kTileRows) {
      add_chunk<kTileRows, kRadii>(column, weight + n * work.weight_stride, work.weight_stride,
                                   count, sums + n * kPanelWidth);
    }
    for (; n < work.rows; ++n) {
      add_chunk<1, kRadii>(column, weight + n * work.weight_stride, work.weight_stride, count,
                           sums + n * kPanelWidth);
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

struct EightFloats {
  using Vector = __m256;
  static constexpr int64_t kWidth = 8;
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* from, int64_t count) { return interval::load(from, count); }
  static __m256 add_size(__m256 x, __m256 sum) { return _mm256_add_ps(sum, magnitude(x)); }
  static __m256 add_square(__m256 x, __m256 sum) { return _mm256_fmadd_ps(x, x, sum); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static float sum(__m256 x) { return sum_of(x); }
};

// --- ends
// -----------------------------------------------------------------------------------------

// One neighbour or more away from x on the side of `direction` (-1 or 1): core/rounding.h.
inline __m256 step_over(__m256 x, __m256 direction) {
  const __m256 step =
      _mm256_add_ps(_mm256_mul_ps(magnitude(x), _mm256_set1_ps(rounding::kNeighbour)),
                    _mm256_set1_ps(rounding::kLeast));
  return _mm256_add_ps(x, _mm256_mul_ps(step, direction));
}

// An end between zero and `least` becomes zero, on the outer side.
inline __m256 without_denormals(__m256 x, __m256 from, __m256 to) {
  const __m256 flushed =
      _mm256_and_ps(_mm256_cmp_ps(x, from, _CMP_GT_OQ), _mm256_cmp_ps(x, to, _CMP_LT_OQ));
  return _mm256_andnot_ps(flushed, x);
}

// `largest` grows to the largest of the upper and of the negated lower ends: infinite where one is.
inline void finish_eight(__m256 centre, __m256 radius, __m256 shift, __m256 offset,
                         const Constants& constants, __m256* lower, __m256* upper,
                         __m256* largest) {
  const __m256 one = _mm256_set1_ps(1.0f), minus = _mm256_set1_ps(-1.0f);
  const __m256 infinite = _mm256_set1_ps(rounding::infinity());
  centre = _mm256_add_ps(centre, shift);
  __m256 low = _mm256_sub_ps(centre, radius), high = _mm256_add_ps(centre, radius);
  if (constants.outward) {
    const __m256 grown = _mm256_mul_ps(radius, _mm256_set1_ps(constants.inflate));
    const __m256 late = _mm256_mul_ps(magnitude(shift), _mm256_set1_ps(constants.bias_gain));
    const __m256 value = _mm256_mul_ps(magnitude(centre), _mm256_set1_ps(constants.value_gain));
    radius = _mm256_add_ps(_mm256_add_ps(grown, late), _mm256_add_ps(value, offset));
    radius = _mm256_mul_ps(radius, _mm256_set1_ps(kSlack));
    low = step_over(_mm256_sub_ps(step_over(centre, minus), radius), minus);
    high = step_over(_mm256_add_ps(step_over(centre, one), radius), one);
  }
  const __m256 bounded =
      _mm256_and_ps(_mm256_cmp_ps(magnitude(centre), infinite, _CMP_LT_OQ),
                    _mm256_cmp_ps(radius, _mm256_set1_ps(constants.limit), _CMP_LT_OQ));
  low = _mm256_blendv_ps(_mm256_mul_ps(infinite, minus), low, bounded);
  high = _mm256_blendv_ps(infinite, high, bounded);
  if (constants.least > 0.0f) {
    const __m256 zero = _mm256_setzero_ps(), least = _mm256_set1_ps(constants.least);
    low = without_denormals(low, zero, least);
    high = without_denormals(high, _mm256_mul_ps(least, minus), zero);
  }
  *lower = low;
  *upper = high;
  *largest = _mm256_max_ps(*largest, _mm256_max_ps(high, _mm256_mul_ps(low, minus)));
}

inline bool finite(__m256 largest) {
  const __m256 infinite = _mm256_set1_ps(rounding::infinity());
  return _mm256_movemask_ps(_mm256_cmp_ps(largest, infinite, _CMP_LT_OQ)) == 0xff;
}

bool finish_row(const FinishRow& work, const Constants& constants) {
  __m256 largest = _mm256_setzero_ps();
  const __m256 offset = _mm256_set1_ps(work.offset);
  for (int64_t n = 0; n < work.count; n += 8) {
    const int64_t rest = work.count - n;
    const __m256 shift = work.bias != nullptr ? load(work.bias + n, rest) : _mm256_setzero_ps();
    __m256 lower, upper;
    finish_eight(load(work.centre_sums + n, rest), load(work.radius_sums + n, rest), shift, offset,
                 constants, &lower, &upper, &largest);
    store(work.out_lower + n, rest, lower);
    store(work.out_upper + n, rest, upper);
  }
  return finite(largest);
}

inline void transpose(__m256 (&x)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

void pack(const PackRows& work) {
  const int64_t whole = work.terms / 8 * 8;
  for (int64_t half = 0; half < 2; ++half) {
    const float* from = half == 0 ? work.centre : work.radius;
    for (int64_t k = 0; k < whole; k += 8) {
      __m256 x[8];
      for (int64_t lane = 0; lane < 8; ++lane) {
        x[lane] = lane < work.lanes ? _mm256_loadu_ps(from + lane * work.stride + k)
                                    : _mm256_setzero_ps();
      }
      transpose(x);
      for (int64_t i = 0; i < 8; ++i) {
        _mm256_storeu_ps(work.panel + (k + i) * kPanelWidth + half * kLanes, x[i]);
      }
    }
    for (int64_t k = whole; k < work.terms; ++k) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        work.panel[k * kPanelWidth + half * kLanes + lane] =
            lane < work.lanes ? from[lane * work.stride + k] : 0.0f;
      }
    }
  }
}

// Rows [n, n + count) with count <= 8, outputs of one input adjacent in memory.
bool finish_transposed(const FinishPanel& work, const Constants& constants, int64_t n,
                       int64_t count) {
  __m256 largest = _mm256_setzero_ps();
  const __m256 offset = _mm256_loadu_ps(work.offsets);
  __m256 lower[8], upper[8];
  for (int64_t i = 0; i < 8; ++i) {
    const int64_t row = n + (i < count ? i : 0);
    const float* sums = work.sums + row * kPanelWidth;
    const __m256 shift = _mm256_set1_ps(work.bias != nullptr ? work.bias[row] : 0.0f);
    finish_eight(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + kLanes), shift, offset, constants,
                 lower + i, upper + i, &largest);
  }
  transpose(lower);
  transpose(upper);
  for (int64_t lane = 0; lane < work.lanes; ++lane) {
    store(work.out_lower + lane * work.lane_stride + n, count, lower[lane]);
    store(work.out_upper + lane * work.lane_stride + n, count, upper[lane]);
  }
  return finite(largest);
}

// One of the two strides is 1: rows adjacent (linear) or lanes adjacent (convolution).
bool finish_panel(const FinishPanel& work, const Constants& constants) {
  if (work.row_stride == 1) {
    bool all = true;
    for (int64_t n = 0; n < work.rows; n += 8) {
      all &= finish_transposed(work, constants, n, work.rows - n < 8 ? work.rows - n : 8);
    }
    return all;
  }
  __m256 largest = _mm256_setzero_ps();
  const __m256 offset = _mm256_loadu_ps(work.offsets);
  for (int64_t n = 0; n < work.rows; ++n) {
    const float* sums = work.sums + n * kPanelWidth;
    const __m256 shift = _mm256_set1_ps(work.bias != nullptr ? work.bias[n] : 0.0f);
    for (int64_t lane = 0; lane < work.lanes; lane += kLanes, sums += work.sum_stride) {
      __m256 lower, upper;
      finish_eight(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + kLanes), shift, offset, constants,
                   &lower, &upper, &largest);
      const int64_t at = n * work.row_stride + lane;
      store(work.out_lower + at, work.lanes - lane, lower);
      store(work.out_upper + at, work.lanes - lane, upper);
    }
  }
  return finite(largest);
}

// --- planes of one channel
// -----------------------------------------------------------------------------

// Pairs of a, b, a, b become those of a and then of b.
inline __m256 in_order(__m256 x) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}

struct EightLanes {
  using Floats = __m256;
  static constexpr int kWidth = 8;

  static __m256 all(float x) { return _mm256_set1_ps(x); }
  static __m256 size(__m256 x) { return magnitude(x); }
  static __m256 larger(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
  static __m256 multiply_add(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
  static __m256 first(__m256 x, int64_t count) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(tail_mask(count)));
  }
  static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static __m256 load(const float* from, int64_t count) { return interval::load(from, count); }
  static __m256 even(__m256 a, __m256 b) { return in_order(_mm256_shuffle_ps(a, b, 0x88)); }
  static __m256 odd(__m256 a, __m256 b) { return in_order(_mm256_shuffle_ps(a, b, 0xdd)); }
  static void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
  static void store_end(float* to, int64_t count, __m256 x, bool) { interval::store(to, count, x); }
  static float largest(__m256 x) { return max_of(x); }
  static bool all_finite(__m256 x) { return finite(x); }

  static PreparedLanes<__m256> prepare(__m256 low, __m256 high, __m256 floor,
                                       const Constants& constants) {
    const Eight out = prepare_eight(low, high, floor, constants);
    const __m256 infinite = _mm256_set1_ps(rounding::infinity());
    return {out.centre, out.radius, _mm256_blendv_ps(out.magnitude, infinite, out.unbounded)};
  }
  static EndLanes<__m256> finish(__m256 centre, __m256 radius, __m256 shift, __m256 offset,
                                 const Constants& constants, __m256* largest) {
    EndLanes<__m256> out;
    finish_eight(centre, radius, shift, offset, constants, &out.lower, &out.upper, largest);
    return out;
  }
};

constexpr IntervalKernels kKernels = {
    prepare,
    pack,
    pack_patches,
    spread,
    dots<FewInputs>,
    tiles<true>,
    finish_row,
    finish_panel,
    kElementLoops,
    kCurveLoops,
    kPairLoops,
    {widen_panel<0>, widen_row<8, 0>, count_nonzero},
    uniform_loops<EightFloats, 0>(tiles<false>),
    &kIntegerLoops,
    nullptr,
    fill_plane<EightLanes>,
    plane_ends<EightLanes>,
};

}  // namespace

const IntervalKernels* avx2_kernels() { return &kKernels; }

}  // namespace interval
}  // namespace pyrobust
