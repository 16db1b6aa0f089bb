// Included by avx512.cpp alone: float rows of x as 8-bit parts, so that the integer kernels
// multiply them: bfloat16 and float16 as two, float32 as three or four (avx512_float_rows.h). With
// two
//
//   step = the least power of two that is >= max |x| / 32512 over the columns of a group of W
//   v    = x / step, rounded to an integer       |v| <= 32512 = 127 * 256
//   v    = 256 high + low, -128 <= low <= 127    the sums of both are exact
//
// As the step is a power of two, v is exact where the last bit of x is worth a step or more: for
// |x| >= max / 63 in bfloat16, whose 8 bits reach down to |x| / 256 > max / 16256 > step, and for
// |x| >= max / 7 in float16. Smaller elements err by at most half a step, below max / 32512: a step
// that is not a power of two would round every element. That is below the input's own rounding,
// 2^-9 or 2^-12 of sum |x||W|, but where a group's columns of large x meet weights that are all but
// zero. Three and four parts are digits of base 256 likewise:
//
//   step >= max |x| / 8355711      v = 65536 a + 256 b + c
//   step >= max |x| / 2139062143   v = 2^24 a + 65536 b + 256 c + d
#pragma once

#include "matmul/avx512_prepare.h"

namespace pyrobust::matmul {
namespace {

// The largest integer that kParts digits of base 256 within -127 .. 127 write.
template <int kParts>
constexpr double largest_of() {
  return kParts == 2 ? 32512.0 : kParts == 3 ? 8355711.0 : 2139062143.0;
}

// The least power of two that is at least `value`, a normal number; zero and NaN stay.
inline double power_of_two(double value) {
  constexpr uint64_t kMantissa = (uint64_t{1} << 52) - 1;
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if (value > 0.0) bits = (bits + kMantissa) & ~kMantissa;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Rounded multiples of 1 / `inverse` of 16 columns.
inline __m512i multiples_16(__m512 x, __m512d inverse) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  const __m256i a = _mm512_cvtpd_epi32(_mm512_mul_pd(low, inverse));
  const __m256i b = _mm512_cvtpd_epi32(_mm512_mul_pd(high, inverse));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// The parts of 64 columns from k on, the uppermost first; zeros where `inverse` is 0. Products with
// a power of two are exact in float too, where it is one of float.
template <int kParts>
__attribute__((always_inline)) inline void parts_64(const void* x, FloatType type, int64_t k,
                                                    int64_t cols, double inverse, __m512i* part) {
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) part[p] = _mm512_setzero_si512();
  if (!(inverse > 0.0)) return;
  const bool in_float = inverse >= 0x1p-126 && inverse <= 0x1p127;
  const __m512 factor = _mm512_set1_ps(in_float ? static_cast<float>(inverse) : 0.0f);
  __m512 value[4];
  __m512i v[4], digit[4];
  load_64(x, type, k, cols, value);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = in_float ? _mm512_cvtps_epi32(_mm512_mul_ps(value[i], factor))
                    : multiples_16(value[i], _mm512_set1_pd(inverse));
  }
#pragma GCC unroll 4
  for (int p = kParts - 1; p > 0; --p) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(v[i], _mm512_set1_epi32(128)), 8);
      digit[i] = _mm512_sub_epi32(v[i], _mm512_slli_epi32(upper, 8));
      v[i] = upper;
    }
    part[p] = narrow_64(digit);
  }
  part[0] = narrow_64(v);
}

// Row m of the block: `x` holds its `cols` elements.
template <int kParts>
void prepare_parts_row(const PackedMatrix& w, const void* x, FloatType type, int64_t m,
                       const WideRows& out) {
  const int64_t blocks = blocks_of(w), groups = groups_of(w), per_group = group_blocks(w);
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    const int64_t end = stop * kBlock < w.cols ? stop * kBlock : w.cols;
    const double step = power_of_two(step_of(x, type, b * kBlock, end, largest_of<kParts>()));
    const double inverse = step > 0.0 ? 1.0 / step : 0.0;
    __m512i sum[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sum[p] = _mm512_setzero_si512();
    for (; b < stop; ++b) {
      __m512i part[kParts];
      parts_64<kParts>(x, type, b * kBlock, w.cols, inverse, part);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        sum[p] = _mm512_dpbusd_epi32(sum[p], _mm512_set1_epi8(1), part[p]);
        out.store(part[p], m, p, b);
      }
    }
    out.step[m * groups + g] = step;
    for (int p = 0; p < kParts; ++p) {
      out.q_sum[(m * kParts + p) * groups + g] = _mm512_reduce_add_epi32(sum[p]);
    }
  }
}

// Whether 256 high + low, times 2^shift, fits in 32 bits for sums of a group: of |code - zero| <=
// `weight`.
inline bool is_narrow(const PackedMatrix& w, int shift = 0) {
  const int64_t columns = w.group_size < w.cols ? w.group_size : w.cols;
  const int64_t weight = w.codebook != nullptr ? 255 : w.levels;
  return columns * weight * (32512 + 256) < (int64_t{1} << 31) >> shift;
}

// total += scale * step * (256 high + low) of eight rows of W: high parts in lanes 0 to 7, low ones
// in 8 to 15.
inline void add_parts(__m512i sums, const float* scale, const int32_t* zero, __m512i q,
                      const double* step, __m512d* total) {
  const __m512i offset = _mm512_mullo_epi32(_mm512_loadu_si512(zero), q);
  const __m512i exact = _mm512_sub_epi32(sums, offset);
  const __m512d high = _mm512_cvtepi32_pd(_mm512_castsi512_si256(exact));
  const __m512d low = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, 1));
  const __m512d both = _mm512_fmadd_pd(high, _mm512_set1_pd(256.0), low);
  *total = _mm512_fmadd_pd(_mm512_mul_pd(both, _mm512_loadu_pd(step)),
                           _mm512_cvtps_pd(_mm256_loadu_ps(scale)), *total);
}

}  // namespace
}  // namespace pyrobust::matmul
