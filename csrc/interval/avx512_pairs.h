// Included by the files whose radii meet |W| in bfloat16: both rounded up, two of them in a word,
// and sums in the order of panels.
#pragma once

#include <immintrin.h>

#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

inline __m512i round_up(__m512i bits) { return _mm512_add_epi32(bits, _mm512_set1_epi32(0xffff)); }

inline __m512i pair_up(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16),
                         _mm512_and_si512(second, _mm512_set1_epi32(-0x10000)));
}

// The products take denormals for zero: what is not zero becomes a normal number.
inline __m512i size_up(__m512i weight) {
  const __m512i size = _mm512_and_si512(weight, _mm512_set1_epi32(0x7fffffff));
  return _mm512_mask_max_epu32(size, _mm512_test_epi32_mask(size, size), round_up(size),
                               _mm512_set1_epi32(0x00800000));
}

// Words [q, q + 16) of a row of `terms` terms.
inline void round_words(const float* weight, int64_t terms, int64_t q, uint32_t* sizes) {
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
  const int64_t left = terms - 2 * q;
  const auto mask = [](int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
  };
  const __m512i a = size_up(_mm512_maskz_loadu_epi32(mask(left), weight + 2 * q));
  const __m512i b = size_up(_mm512_maskz_loadu_epi32(mask(left - 16), weight + 2 * q + 16));
  const __m512i words =
      pair_up(_mm512_permutex2var_epi32(a, evens, b), _mm512_permutex2var_epi32(a, odds, b));
  _mm512_mask_storeu_epi32(sizes + q, mask(pairs_of(terms) - q), words);
}

void round_sizes(const RoundSizes& work) {
  const int64_t pairs = pairs_of(work.terms), rows = coarse_rows(work.rows);
  for (int64_t n = 0; n < work.rows; ++n) {
    uint32_t* sizes = work.sizes + n * work.size_stride;
    for (int64_t q = 0; q < pairs; q += 16) {
      round_words(work.weight + n * work.stride, work.terms, q, sizes);
    }
    for (int64_t q = pairs; q < work.size_stride; ++q) sizes[q] = 0;
  }
  for (int64_t at = work.rows * work.size_stride; at < rows * work.size_stride; ++at) {
    work.sizes[at] = 0;
  }
}

void pair_channels(const float* radius, int64_t channels, int64_t plane, uint32_t* radii) {
  for (int64_t c = 0; c + 1 < channels; c += 2, radius += 2 * plane, radii += plane) {
    for (int64_t i = 0; i < plane; i += 16) {
      const int64_t rest = plane - i;
      const auto mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
      const __m512i a = _mm512_maskz_loadu_epi32(mask, radius + i);
      const __m512i b = _mm512_maskz_loadu_epi32(mask, radius + plane + i);
      _mm512_mask_storeu_epi32(radii + i, mask, pair_up(round_up(a), round_up(b)));
    }
  }
}

// Columns of two panels become 16 centres and 16 radii.
struct Column {
  __m512 centre, radius;
};

inline Column column_of(const float* left, const float* right) {
  const __m512 a = _mm512_loadu_ps(left), b = _mm512_loadu_ps(right);
  return {_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)};
}

// Centres and radii of 16 inputs in the order of two panels; the right one may be absent.
inline void add_to_panels(float* left, float* right, bool fresh, __m512 c, __m512 r) {
  const __m512 zero = _mm512_setzero_ps();
  _mm512_storeu_ps(
      left, _mm512_add_ps(fresh ? zero : _mm512_loadu_ps(left), _mm512_shuffle_f32x4(c, r, 0x44)));
  if (right == nullptr) return;
  _mm512_storeu_ps(right, _mm512_add_ps(fresh ? zero : _mm512_loadu_ps(right),
                                        _mm512_shuffle_f32x4(c, r, 0xee)));
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
