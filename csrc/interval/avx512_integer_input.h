// Included by avx512_integers.h alone: one input as integers, sixteen columns at a time, with the
// bits of integer_loops.h, and in the order that panels want.
#pragma once

#include <immintrin.h>

#include "interval/integer_loops.h"

namespace pyrobust {
namespace interval {
namespace {

inline __m512i nearest_integers(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // as nearest_integer()
  return _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(x, magic)), _mm512_castps_si512(magic));
}

struct Avx512Input {
  struct Sixteen {
    __mmask16 mask;
    __m512 low, high, middle;

    Sixteen(const Ends& ends, int64_t from, int64_t count)
        : mask(static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff)) {
      const __m512 floor = _mm512_set1_ps(ends.floor), half = _mm512_set1_ps(0.5f);
      low = _mm512_maskz_loadu_ps(mask, ends.lower + from);
      high = _mm512_maskz_loadu_ps(mask, ends.upper + from);
      low = _mm512_max_ps(floor, low);  // in this order a NaN stays
      high = _mm512_max_ps(floor, high);
      middle = _mm512_add_ps(_mm512_mul_ps(half, low), _mm512_mul_ps(half, high));
    }
  };

  static Extent extent(const Ends& ends, int64_t begin, int64_t count) {
    __m512 least = _mm512_set1_ps(rounding::infinity()),
           most = _mm512_set1_ps(-rounding::infinity());
    __m512 largest = _mm512_setzero_ps(), defect = largest;
    for (int64_t k = 0; k < count; k += 16) {
      const Sixteen x(ends, begin + k, count - k);
      const __m512 size = _mm512_max_ps(_mm512_abs_ps(x.low), _mm512_abs_ps(x.high));
      least = _mm512_mask_min_ps(least, x.mask, x.middle, least);
      most = _mm512_mask_max_ps(most, x.mask, x.middle, most);
      largest = _mm512_mask_max_ps(largest, x.mask, size, largest);
      const __m512 own = _mm512_add_ps(_mm512_sub_ps(x.low, x.low), _mm512_sub_ps(x.high, x.high));
      defect = _mm512_mask_add_ps(defect, x.mask, defect, own);
    }
    return {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most), _mm512_reduce_max_ps(largest),
            _mm512_reduce_add_ps(defect)};
  }

  static float place_centres(const IntegerPrepare& work, const CentreGrid& grid, int64_t g) {
    const IntegerInput& out = *work.out;
    const IntegerConstants& constants = work.constants;
    const int64_t count = out.count(g);
    int16_t* centre = out.centre + g * out.stride;
    const __m512i shift = _mm512_set1_epi32(grid.shift), edge = _mm512_set1_epi32(65535);
    const __m512 step = _mm512_set1_ps(grid.step), inverse = _mm512_set1_ps(grid.inverse);
    __m512 largest = _mm512_setzero_ps();
    __m512i total = _mm512_setzero_si512();  // unsigned
    for (int64_t k = 0; k < count; k += 16) {
      const Sixteen x(work.ends, g * out.group + k, count - k);
      __m512i q = _mm512_sub_epi32(nearest_integers(_mm512_mul_ps(x.middle, inverse)), shift);
      q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), edge);
      const __m512 at = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(q, shift)), step);
      const __m512 reach = _mm512_max_ps(_mm512_sub_ps(x.high, at), _mm512_sub_ps(at, x.low));
      const __m512 grown = _mm512_mul_ps(reach, _mm512_set1_ps(constants.radius_gain));
      const __m512 error = _mm512_mul_ps(_mm512_abs_ps(at), _mm512_set1_ps(constants.centre_gain));
      const __m512 radius =
          _mm512_add_ps(_mm512_mul_ps(_mm512_add_ps(grown, error), _mm512_set1_ps(kSlack)),
                        _mm512_set1_ps(constants.input_floor));
      const __m512i words = _mm512_sub_epi32(q, _mm512_set1_epi32(32768));
      _mm512_mask_cvtepi32_storeu_epi16(centre + k, x.mask, words);
      _mm512_storeu_ps(work.scratch + k, radius);
      largest = _mm512_mask_max_ps(largest, x.mask, radius, largest);
      total = _mm512_mask_add_epi32(total, x.mask, total, q);
    }
    const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(total));
    const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(total, 1));
    out.total[g] = _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
    return _mm512_reduce_max_ps(largest);
  }

  static int64_t place_radii(const IntegerPrepare& work, const RadiusGrid& grid, int64_t g) {
    const IntegerInput& out = *work.out;
    const int64_t count = out.count(g);
    int16_t* radius = out.radius + g * out.stride;
    const __m512 inverse = _mm512_set1_ps(grid.inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 16) {
      const int64_t left = count - k;
      const auto mask = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff);
      const __m512 quotient = _mm512_mul_ps(_mm512_loadu_ps(work.scratch + k), inverse);
      const __m512i whole = _mm512_cvttps_epi32(_mm512_max_ps(quotient, _mm512_setzero_ps()));
      const __m512i p = _mm512_add_epi32(whole, _mm512_set1_epi32(1));
      _mm512_mask_cvtepi32_storeu_epi16(radius + k, mask, p);
      sum = _mm512_mask_add_epi32(sum, mask, sum, p);
    }
    return _mm512_reduce_add_epi32(sum);
  }
};

// The bytes of a step of four columns follow one another: centres' upper ones, lower ones, radii's
// upper ones, lower ones.
constexpr int64_t kStepBytes = 16;

inline void store_step_bytes(const __m512i (&part)[4], uint8_t* out) {
  const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]);
  const __m512i b = _mm512_unpackhi_epi32(part[0], part[1]);
  const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]);
  const __m512i d = _mm512_unpackhi_epi32(part[2], part[3]);
  // Lane l of step[j] is step 4 l + j.
  const __m512i step[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                           _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  auto* to = reinterpret_cast<__m128i*>(out);
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_si128(to + j, _mm512_castsi512_si128(step[j]));
    _mm_storeu_si128(to + 4 + j, _mm512_extracti32x4_epi32(step[j], 1));
    _mm_storeu_si128(to + 8 + j, _mm512_extracti32x4_epi32(step[j], 2));
    _mm_storeu_si128(to + 12 + j, _mm512_extracti32x4_epi32(step[j], 3));
  }
}

// Bits 8 and up, and bits 0 to 7, of 64 words.
inline __m512i bytes_of(__m512i first, __m512i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)),
                            _mm512_cvtepi16_epi8(second), 1);
}

void order_quads(IntegerInput* input, int64_t first_group, int64_t last_group) {
  const int64_t end = last_group * input->stride;
  const __m512i flip = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
  const __m512i half = _mm512_set1_epi16(128);
  for (int64_t k = first_group * input->stride; k < end; k += kIntegerBlock) {
    __m512i q[2], p[2], up[2];
    for (int i = 0; i < 2; ++i) {
      q[i] = _mm512_xor_si512(_mm512_loadu_si512(input->centre + k + 32 * i), flip);
      p[i] = _mm512_loadu_si512(input->radius + k + 32 * i);
      up[i] = _mm512_srai_epi16(_mm512_add_epi16(p[i], half), 8);
    }
    const __m512i part[4] = {bytes_of(_mm512_srli_epi16(q[0], 8), _mm512_srli_epi16(q[1], 8)),
                             bytes_of(q[0], q[1]), bytes_of(up[0], up[1]), bytes_of(p[0], p[1])};
    store_step_bytes(part, input->quads + 4 * k);
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
