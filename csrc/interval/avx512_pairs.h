// Included by the files whose radii meet |W| in bfloat16: both rounded up, or |W| as whole numbers,
// two of them in a word; and sums in the order of panels.
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

// |W| by its factor: a whole number of at most 8 bits, to which the product is far nearer than half
// a step of bfloat16.
struct WholeNumber {
  __m512 inverse;

  explicit WholeNumber(float factor)
      : inverse(_mm512_set1_ps(factor > 0.0f ? 1.0f / factor : 0.0f)) {}
  __m512i operator()(__m512i weight) const {
    const __m512 number = _mm512_mul_ps(_mm512_castsi512_ps(weight), inverse);
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(number));
    return _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
  }
};

template <typename Size>
inline __m512i words_of(__m512i left, __m512i right, const Size& size) {
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
  const __m512i a = size(left), b = size(right);
  return pair_up(_mm512_permutex2var_epi32(a, evens, b), _mm512_permutex2var_epi32(a, odds, b));
}

// A row's words, and zeros after them: `stride` words, whole registers. size_of(k) makes those of
// the 32 terms from k on.
template <typename SizeOf>
inline void round_row(const float* weight, int64_t terms, int64_t stride, const SizeOf& size_of,
                      uint32_t* sizes) {
  const int64_t whole = terms / 32 * 32;
  int64_t k = 0;
  for (; k < whole; k += 32) {
    const __m512i words =
        words_of(_mm512_loadu_si512(weight + k), _mm512_loadu_si512(weight + k + 16), size_of(k));
    _mm512_storeu_si512(sizes + k / 2, words);
  }
  for (; k < 2 * stride; k += 32) {
    const auto mask = [&](int64_t from) {
      const int64_t count = terms - from;
      return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
    };
    const __m512i left = _mm512_maskz_loadu_epi32(mask(k), weight + k);
    const __m512i right = _mm512_maskz_loadu_epi32(mask(k + 16), weight + k + 16);
    _mm512_storeu_si512(sizes + k / 2, words_of(left, right, size_of(k)));
  }
}

void round_sizes(const RoundSizes& work) {
  const int64_t rows = coarse_rows(work.rows);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t terms = n < work.rows ? work.terms : 0;
    const float* row = work.weight + (terms > 0 ? n : 0) * work.stride;
    uint32_t* sizes = work.sizes + n * work.size_stride;
    const float* factors = work.factors.from(n, 0).values;
    if (factors != nullptr && terms > 0) {
      const auto whole = [&](int64_t k) {
        return WholeNumber(k < terms ? factors[k / kRun] : 0.0f);
      };
      round_row(row, terms, work.size_stride, whole, sizes);
    } else {
      round_row(row, terms, work.size_stride, [](int64_t) { return size_up; }, sizes);
    }
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
