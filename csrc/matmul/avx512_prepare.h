// Included by avx512.cpp alone: rows of x to 8 bits (core/activation_int8.h by vectors, to the same
// bits), in the order of columns of wide_bytes(), and their sums per group.
#pragma once

#include "matmul/avx2_tile.h"
#include "matmul/avx512_decode.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kFewRows = 4;   // rows of x up to which no panel of W is made
constexpr int64_t kTritRows = 2;  // rows of bytes up to which trits are not unpacked
constexpr int64_t kTileRows = 8;  // rows of x that meet a panel together

// Prepared x: bytes, then the steps of 16-bit activations and the sums of the bytes, per row and
// group. A row in 8 bits is one row of bytes, a row in 16 bits has two (`parts`): the upper bytes
// and the lower ones. Up to kFewRows rows of bytes lie one after the other, all upper ones first;
// more of them as tiles of eight, in which four columns of row 0, four of row 1, ... follow one
// another: a panel then meets one stream of x. (Eight rows a power of two apart would fall into the
// same sets of the cache.)
struct WideRows {
  int8_t* q;
  double* step;              // (rows, groups), where there are two parts
  int32_t* q_sum;            // (rows, parts, groups)
  int16_t* trits = nullptr;  // few rows and ternary codes: avx512_trits.h
  int64_t trit_steps = 0;    // of a group
  int64_t stride, rows;
  int parts;
  int bits;  // whose order the bytes have
  int64_t used;

  WideRows(void* data, const PackedMatrix& w, int64_t count, Mode mode)
      : stride(blocks_of(w) * kBlock),
        rows(count),
        parts(mode == Mode::kParts ? 2 : 1),
        bits(stored_bits(w)) {
    const int64_t groups = groups_of(w), all = rows * parts;
    const int64_t padded = tiled() ? round_up(rows, x_rows()) * parts : all;
    Arena arena{static_cast<char*>(data)};
    q = arena.take<int8_t>(padded * stride);
    step = arena.take<double>(parts == 2 ? rows * groups : 0);
    q_sum = arena.take<int32_t>(all * groups);
    if (w.levels == kTernaryLevels && w.codebook == nullptr && all <= kTritRows) {
      const int64_t columns = w.group_size < w.cols ? w.group_size : w.cols;
      const int64_t step = 32 * kTritsPerByte;  // columns
      trit_steps = (columns + 2 * (kTritsPerByte - 1) + step - 1) / step;
      trits = arena.take<int16_t>(all * groups * trit_steps * step);
      bits = 8;
    }
    used = arena.used;
  }
  bool has_trits() const { return trit_steps > 0; }
  bool tiled() const { return rows * parts > kFewRows; }
  int64_t x_rows() const { return kTileRows / parts; }  // rows of x in a tile
  const int8_t* tile(int64_t m) const { return q + m / x_rows() * kTileRows * stride; }

  // 64 columns of a part of row m, in the order of wide_bytes(), to block b.
  void store(__m512i bytes, int64_t m, int part, int64_t b) const {
    if (!tiled()) return store_ordered(bits, bytes, q + (part * rows + m) * stride + b * kBlock);
    int8_t ordered[kBlock];
    store_ordered(bits, bytes, ordered);
    const int64_t row = part * x_rows() + m % x_rows();
    int8_t* at = q + (m / x_rows() * stride + b * kBlock) * kTileRows + row * 4;
    for (int64_t d = 0; d < kLanes; ++d) {
      __builtin_memcpy(at + d * kTileRows * 4, ordered + 4 * d, 4);
    }
  }
};

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// Elements [at, at + 16) of a float array, those of `mask`; 0 for the others.
inline __m512 load_floats(const void* data, FloatType type, int64_t at, __mmask16 mask) {
  if (type == FloatType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
  }
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at);
  if (type == FloatType::kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Bits of the largest magnitude of columns [from, to): they compare as integers, and what is not
// finite exceeds all others.
inline int32_t largest_bits(const void* x, FloatType type, int64_t from, int64_t to) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = from; k < to; k += kLanes) {
    const __m512i bits = _mm512_castps_si512(load_floats(x, type, k, first_lanes(to - k)));
    largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epi32(largest);
}

// The largest magnitude over `steps`; NaN where a value is not finite. With 127 activation_step().
inline double step_of(const void* x, FloatType type, int64_t from, int64_t to, double steps) {
  const int32_t bits = largest_bits(x, type, from, to);
  if (bits > 0x7f7fffff) return __builtin_nan("");
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
  return static_cast<double>(magnitude) / steps;
}

// Lanes that lie so near the middle of two integers that the quotient, at most 127 and at most
// 127 * 2^-51 away, may round the other way.
inline __mmask8 near_middles(__m512d value) {
  constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512d away = _mm512_sub_pd(value, _mm512_roundscale_pd(value, kToNearest));
  return _mm512_cmp_pd_mask(_mm512_abs_pd(away), _mm512_set1_pd(0.5 - 1e-12), _CMP_GT_OQ);
}

// 16 columns, rounded as quantized_activation() does: the quotients by `step` to nearest even.
// Products with the inverse take a fifth of the time of divisions.
inline __m128i quantize_16(__m512 x, __m512d step, __m512d inverse) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  __m512d first = _mm512_mul_pd(low, inverse), second = _mm512_mul_pd(high, inverse);
  if ((near_middles(first) | near_middles(second)) != 0) {
    first = _mm512_div_pd(low, step);
    second = _mm512_div_pd(high, step);
  }
  const __m256i a = _mm512_cvtpd_epi32(first), b = _mm512_cvtpd_epi32(second);
  return _mm512_cvtepi32_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

inline __m512i quantize_64(const void* x, FloatType type, int64_t k, int64_t cols, double step) {
  const __m512d divisor = _mm512_set1_pd(step), inverse = _mm512_set1_pd(1.0 / step);
  const auto part = [&](int i) {
    const int64_t at = k + kLanes * i;
    return quantize_16(load_floats(x, type, at, first_lanes(cols - at)), divisor, inverse);
  };
  __m512i q = _mm512_castsi128_si512(part(0));
  q = _mm512_inserti32x4(q, part(1), 1);
  q = _mm512_inserti32x4(q, part(2), 2);
  return _mm512_inserti32x4(q, part(3), 3);
}

// Row m of the block: `x` holds its `cols` elements.
inline void prepare_wide_row(const PackedMatrix& w, const void* x, FloatType type, int64_t m,
                             const WideRows& out, double* step) {
  const int64_t blocks = blocks_of(w), groups = groups_of(w), per_group = group_blocks(w);
  *step = step_of(x, type, 0, w.cols, 127.0);
  const bool some = *step > 0.0;
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    __m512i sum = _mm512_setzero_si512();
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    for (; b < stop; ++b) {
      const __m512i q =
          some ? quantize_64(x, type, b * kBlock, w.cols, *step) : _mm512_setzero_si512();
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), q);
      out.store(q, m, 0, b);
    }
    out.q_sum[m * groups + g] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
