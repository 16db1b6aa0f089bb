// Included by avx512.cpp alone: integer sums of one input against a weight in panel order
// (matmul/panels.h), 32 rows in the lanes of two registers, two panels side by side: sixteen sums,
// where eight in a row would just hide the latency of a product (8% slower). Four columns of the
// input are broadcast at a time: upper and lower bytes of the centre, unsigned, meet the signed
// weights; magnitudes, unsigned, meet upper and lower bytes of the radius, which are signed. For
// every product of bytes of the packed layer there are four here, and codes are unpacked once for
// all.
//
// Codes of at most four bits less a zero below 128 are signed bytes. Others (8 bits, entries
// of a codebook) are moved down by 128, and the sum of q times 128 - zero is added to their sums.
#pragma once

#include <algorithm>

#include "interval/avx512_integer_input.h"
#include "matmul/avx512_panel_quad.h"

namespace pyrobust {
namespace interval {
namespace {

using matmul::kLineBytes;
using matmul::kPanelRows;
using matmul::kQuadColumns;
using matmul::PanelLayout;

// Sums of a group over 16 rows: of the weights times both bytes of q, of magnitudes times both of
// p, and of weights.
struct HalfSums {
  __m512i q_high, q_low, p_high, p_low, weights;
};

inline __m512i four_bytes(const uint8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Sixteen bytes, each in the four bytes of a lane.
inline __m512i four_times(__m128i bytes) {
  const __m512i from =
      _mm512_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                        0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c,
                        0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), from);
}

// The zeros of a panel's rows as its head has them, or the one of all.
inline __m256i panel_zeros(const matmul::PackedMatrix& w, const uint8_t* zeros) {
  if (w.zero == nullptr) return _mm256_set1_epi8(static_cast<char>(matmul::symmetric_zero(w)));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zeros));
}

// What a code less its zero is, as signed bytes and as magnitudes. `zero` holds a row's in each of
// its four bytes.
template <bool kWide>
__attribute__((always_inline)) inline void weigh(__m512i code, __m512i zero, __m512i* weight,
                                                 __m512i* size) {
  if constexpr (kWide) {
    *weight = _mm512_xor_si512(code, _mm512_set1_epi8(-128));
    *size = _mm512_sub_epi8(_mm512_max_epu8(code, zero), _mm512_min_epu8(code, zero));
  } else {
    // No absolute values: each takes the place of a product on Zen 4 (5.1 cycles a step, not 4.6).
    *weight = _mm512_sub_epi8(code, zero);
    *size = _mm512_min_epu8(*weight, _mm512_sub_epi8(zero, code));
  }
}

// Of P panels, whose codes are `panel_bytes` apart.
template <int kBits, bool kBook, bool kWide, bool kShifted, int P>
__attribute__((always_inline)) inline void group_sums(const uint8_t* codes, int64_t panel_bytes,
                                                      const uint8_t* x, const uint8_t* ones,
                                                      int64_t quads, __m512i table,
                                                      const __m512i (&zero)[2 * P],
                                                      HalfSums (&sum)[2 * P]) {
  using Quad = matmul::PanelQuad<kBits, kBook>;
#pragma GCC unroll 4
  for (int h = 0; h < 2 * P; ++h) {
    sum[h].q_high = sum[h].q_low = sum[h].p_high = sum[h].p_low = sum[h].weights =
        _mm512_setzero_si512();
  }
  const int64_t ahead = matmul::panel_ahead();
  for (int64_t j = 0; j < quads; ++j) {
    Quad quad[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      quad[p].load(codes + p * panel_bytes);
      matmul::prefetch_lines(codes + p * panel_bytes + ahead, kBits * kLineBytes);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const uint8_t* bytes = x + kStepBytes * s;
      const __m512i q_high = four_bytes(bytes), q_low = four_bytes(bytes + 4);
      const __m512i p_high = four_bytes(bytes + 8), p_low = four_bytes(bytes + 12);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        __m512i code[2];
        quad[p].step(s, table, code, code + 1);
        if constexpr (kBits == 1 && !kBook) {
          code[0] = _mm512_add_epi8(code[0], code[0]);  // one bit stands for -1 and 1
        } else if constexpr (Quad::kShift > 0) {
          code[1] = _mm512_srli_epi16(code[1], Quad::kShift);
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          HalfSums& to = sum[2 * p + h];
          __m512i weight, size;
          weigh<kWide>(code[h], zero[2 * p + h], &weight, &size);
          matmul::add_dots(to.q_high, q_high, weight);
          matmul::add_dots(to.q_low, q_low, weight);
          matmul::add_dots(to.p_high, size, p_high);
          matmul::add_dots(to.p_low, size, p_low);
          if constexpr (kShifted) matmul::add_dots(to.weights, four_bytes(ones + 4 * s), weight);
        }
      }
    }
    codes += kBits * kLineBytes;
    x += 4 * kStepBytes;
    ones += kQuadColumns;
  }
}

// Eight of sixteen lanes as doubles.
inline __m512d eight_lanes(__m512i lanes, int half) {
  return _mm512_cvtepi32_pd(half == 0 ? _mm512_castsi512_si256(lanes)
                                      : _mm512_extracti64x4_epi64(lanes, 1));
}

// 256 high + low of eight lanes; `narrow` where that fits 32 bits.
inline __m512d joined_lanes(__m512i high, __m512i low, bool narrow, int half) {
  if (narrow) return eight_lanes(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), half);
  return _mm512_fmadd_pd(eight_lanes(high, half), _mm512_set1_pd(256.0), eight_lanes(low, half));
}

// A group of a panel and its place in the input. (To add its sums to the totals while the products
// of the next group run, as matmul does, was slower: 9% of a layer, which the loop then lost.)
struct PanelGroup {
  const IntegerInput* input;
  int64_t g;
  bool wide;    // codes were moved down by 128
  bool narrow;  // joined sums fit 32 bits
};

// Adds a group's sums of 16 rows to their totals. Every number before the two products is an exact
// integer.
template <bool kShifted>
__attribute__((always_inline)) inline void add_group(const PanelGroup& group, const HalfSums& sums,
                                                     const __m512d* scale, __m512i zero,
                                                     double* centre, double* radius) {
  const IntegerInput& input = *group.input;
  const __m512d step = _mm512_set1_pd(input.step[group.g]);
  const __m512d radius_step = _mm512_set1_pd(input.radius_step[group.g]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512d c = joined_lanes(sums.q_high, sums.q_low, group.narrow, half);
    const __m512d r = joined_lanes(sums.p_high, sums.p_low, group.narrow, half);
    __m512d moved = _mm512_setzero_pd();
    if (group.wide) {
      moved = _mm512_sub_pd(_mm512_set1_pd(128.0), eight_lanes(_mm512_srli_epi32(zero, 24), half));
      c = _mm512_fmadd_pd(moved, _mm512_set1_pd(static_cast<double>(input.total[group.g])), c);
    }
    if constexpr (kShifted) {
      __m512d weights = eight_lanes(sums.weights, half);
      weights = _mm512_fmadd_pd(moved, _mm512_set1_pd(static_cast<double>(input.count(group.g))),
                                weights);
      c = _mm512_fmadd_pd(weights, _mm512_set1_pd(input.shift[group.g]), c);
    }
    const __m512d own = scale[half];
    const __m512d added = _mm512_mul_pd(c, _mm512_mul_pd(own, step));
    const __m512d spread = _mm512_mul_pd(r, _mm512_mul_pd(_mm512_abs_pd(own), radius_step));
    _mm512_storeu_pd(centre + 8 * half, _mm512_add_pd(_mm512_loadu_pd(centre + 8 * half), added));
    _mm512_storeu_pd(radius + 8 * half, _mm512_add_pd(_mm512_loadu_pd(radius + 8 * half), spread));
  }
}

template <int kBits, bool kBook, bool kShifted, int P>
void panel_sums(const matmul::PackedMatrix& w, const PanelLayout& layout, const uint8_t* panel,
                const IntegerInput& input, double* centre, double* radius) {
  // what gcc makes of std::fill, `rep stos`, took 4% of a layer (Zen 4)
  for (int64_t i = 0; i < P * kPanelRows; i += 8) {
    _mm512_storeu_pd(centre + i, _mm512_setzero_pd());
    _mm512_storeu_pd(radius + i, _mm512_setzero_pd());
  }
  constexpr bool kAlwaysWide = kBits == 8 || kBook;
  const __m512i table = matmul::codebook_table(w);
  const bool narrow = input.group <= 128;  // 255 * 65535 * 128 < 2^31
  for (int64_t g = 0; g < input.groups; ++g) {
    const uint8_t* head = panel + g * layout.group_bytes;
    __m512i zero[2 * P];  // of a row in each of its four bytes
    int large = 0;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m256i zeros =
          panel_zeros(w, head + p * layout.panel_bytes + kPanelRows * layout.scale_bytes);
      large |= _mm256_movemask_epi8(zeros);
      zero[2 * p] = four_times(_mm256_castsi256_si128(zeros));
      zero[2 * p + 1] = four_times(_mm256_extracti128_si256(zeros, 1));
    }
    const int64_t quads = matmul::ceil_div(input.count(g), kQuadColumns);  // the rest is padding
    const uint8_t *codes = head + layout.head_bytes, *x = input.quads + 4 * g * input.stride;
    const uint8_t* ones = input.ones + g * input.stride;
    HalfSums sums[2 * P];
    const PanelGroup group{&input, g, kAlwaysWide || large != 0, narrow};
    if (group.wide) {
      group_sums<kBits, kBook, true, kShifted, P>(codes, layout.panel_bytes, x, ones, quads, table,
                                                  zero, sums);
    } else if constexpr (!kAlwaysWide) {
      group_sums<kBits, kBook, false, kShifted, P>(codes, layout.panel_bytes, x, ones, quads, table,
                                                   zero, sums);
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      __m512d scale[4];
      matmul::load_panel_scales<0>(w, head + p * layout.panel_bytes, scale);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        add_group<kShifted>(group, sums[2 * p + h], scale + 2 * h, zero[2 * p + h],
                            centre + kPanelRows * p + 16 * h, radius + kPanelRows * p + 16 * h);
      }
    }
  }
}

template <int kBits, bool kBook>
void panel_rows(const IntegerDots& work) {
  const matmul::PackedMatrix& w = *work.weight;
  const PanelLayout layout(w);
  for (int64_t n = 0; n < work.rows;) {
    const uint8_t* panel = w.panels + (work.first + n) / kPanelRows * layout.panel_bytes;
    double *centre = work.centre_sums + n, *radius = work.radius_sums + n;
    int64_t rows = kPanelRows;
    if (work.input->shifted) {
      panel_sums<kBits, kBook, true, 1>(w, layout, panel, *work.input, centre, radius);
    } else if (work.rows - n > kPanelRows) {
      rows = 2 * kPanelRows;
      panel_sums<kBits, kBook, false, 2>(w, layout, panel, *work.input, centre, radius);
    } else {
      panel_sums<kBits, kBook, false, 1>(w, layout, panel, *work.input, centre, radius);
    }
    const int64_t count = work.rows - n < rows ? work.rows - n : rows;
    for (int64_t i = 0; i < count && w.row_scale != nullptr; ++i) {
      const double outer = w.row_scale[work.first + n + i];
      centre[i] *= outer;
      radius[i] *= std::fabs(outer);
    }
    n += rows;
  }
}

void integer_panels(const IntegerDots& work) {
  const bool book = work.weight->codebook != nullptr;
  switch (PanelLayout(*work.weight).bits) {
    case 1:
      return book ? panel_rows<1, true>(work) : panel_rows<1, false>(work);
    case 2:
      return book ? panel_rows<2, true>(work) : panel_rows<2, false>(work);
    case 3:
      return book ? panel_rows<3, true>(work) : panel_rows<3, false>(work);
    case 4:
      return book ? panel_rows<4, true>(work) : panel_rows<4, false>(work);
    default:
      return panel_rows<8, false>(work);
  }
}

// finish_integers(), eight rows at a time.
bool finish_by_eights(const IntegerEnds& work, const IntegerConstants& constants) {
  const auto all = [](double value) { return _mm512_set1_pd(value); };
  const __m256 infinity = _mm256_set1_ps(rounding::infinity()), zero = _mm256_setzero_ps();
  const __m256 least = _mm256_set1_ps(constants.least), sign = _mm256_set1_ps(-0.0f);
  const auto step_of = [&](__m256 x) {  // rounding::below and above
    return _mm256_add_ps(
        _mm256_mul_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(rounding::kNeighbour)),
        _mm256_set1_ps(rounding::kLeast));
  };
  bool finite = true;
  for (int64_t n = 0; n < work.count; n += 8) {
    const int64_t left = work.count - n;
    const auto mask = static_cast<__mmask8>(left < 8 ? (1 << left) - 1 : 0xff);
    __m512d shift = _mm512_setzero_pd();
    if (work.bias != nullptr) shift = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, work.bias + n));
    const __m512d value = _mm512_add_pd(_mm512_maskz_loadu_pd(mask, work.centre_sums + n), shift);
    const __m512d size = _mm512_abs_pd(value);
    __m512d radius = _mm512_maskz_loadu_pd(mask, work.radius_sums + n);
    radius = _mm512_add_pd(_mm512_mul_pd(radius, all(constants.inflate)), all(work.offset));
    radius = _mm512_add_pd(
        radius, _mm512_add_pd(_mm512_mul_pd(_mm512_abs_pd(shift), all(constants.bias_gain)),
                              _mm512_mul_pd(size, all(constants.value_gain))));
    radius = _mm512_add_pd(_mm512_mul_pd(radius, all(kSlackOfDouble)),
                           _mm512_mul_pd(size, all(kSlackOfValue)));
    const __mmask8 bounded =
        _mm512_cmp_pd_mask(radius, all(constants.limit), _CMP_LT_OQ) &
        _mm512_cmp_pd_mask(_mm512_add_pd(size, radius), all(kMostOfFloat), _CMP_LT_OQ);
    __m256 low = _mm512_cvtpd_ps(_mm512_sub_pd(value, radius));
    __m256 high = _mm512_cvtpd_ps(_mm512_add_pd(value, radius));
    low = _mm256_sub_ps(low, step_of(low));
    high = _mm256_add_ps(high, step_of(high));
    const __mmask8 low_flushed =
        _mm256_cmp_ps_mask(low, zero, _CMP_GT_OQ) & _mm256_cmp_ps_mask(low, least, _CMP_LT_OQ);
    const __mmask8 high_flushed = _mm256_cmp_ps_mask(high, zero, _CMP_LT_OQ) &
                                  _mm256_cmp_ps_mask(high, _mm256_xor_ps(least, sign), _CMP_GT_OQ);
    low = _mm256_mask_mov_ps(low, low_flushed, zero);
    high = _mm256_mask_mov_ps(high, high_flushed, zero);
    low = _mm256_mask_mov_ps(_mm256_xor_ps(infinity, sign), bounded, low);
    _mm256_mask_storeu_ps(work.out_lower + n, mask, low);
    _mm256_mask_storeu_ps(work.out_upper + n, mask, _mm256_mask_mov_ps(infinity, bounded, high));
    finite &= (bounded & mask) == mask;
  }
  return finite;
}

constexpr IntegerKernels kIntegers = {prepare_integers<Avx512Input>, integer_rows, finish_by_eights,
                                      order_quads, integer_panels};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
