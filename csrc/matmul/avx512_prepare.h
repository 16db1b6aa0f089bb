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

// Prepared x: bytes, then the steps of float activations and the sums of the bytes, per row and
// group. A row in 8 bits is one row of bytes, a row in 16, 24 or 32 bits has two to four (`parts`),
// the uppermost bytes first. Up to kFewRows rows of bytes lie one after the other, all upper ones
// first; more of them as tiles of eight, in which four columns of row 0, four of row 1, ... follow
// one another: a panel then meets one stream of x. (Eight rows a power of two apart would fall into
// the same sets of the cache.)
struct WideRows {
  int8_t* q;
  double* step;              // (rows, groups), where there are parts
  int32_t* q_sum;            // (rows, parts, groups)
  int16_t* trits = nullptr;  // few rows and ternary codes: avx512_trits.h
  int64_t trit_steps = 0;    // of a group
  int64_t stride, rows;
  int parts;
  int bits;  // whose order the bytes have
  int64_t used;

  WideRows(void* data, const PackedMatrix& w, int64_t count, Mode mode)
      : stride(blocks_of(w) * kBlock), rows(count), parts(parts_of(mode)), bits(stored_bits(w)) {
    const int64_t groups = groups_of(w), all = rows * parts;
    const int64_t padded = tiled() ? ceil_div(rows, x_rows()) * kTileRows : all;
    Arena arena{static_cast<char*>(data)};
    q = arena.take<int8_t>(padded * stride);
    step = arena.take<double>(parts > 1 ? rows * groups : 0);
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
  bool tiled() const { return rows * parts > kFewRows || parts > 2; }
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

// Elements [at, at + 64), 0 past `end`.
__attribute__((always_inline)) inline void load_64(const void* data, FloatType type, int64_t at,
                                                   int64_t end, __m512* out) {
  if (type == FloatType::kFloat32 && end - at >= kBlock) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      out[i] = _mm512_loadu_ps(static_cast<const float*>(data) + at + kLanes * i);
    }
    return;
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t k = at + kLanes * i;
    out[i] = load_floats(data, type, k, first_lanes(end - k));
  }
}

// Bits of the largest magnitude of columns [from, to): they compare as integers, and what is not
// finite exceeds all others.
inline int32_t largest_bits(const void* x, FloatType type, int64_t from, int64_t to) {
  __m512i largest[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) largest[i] = _mm512_setzero_si512();
  for (int64_t k = from; k < to; k += kBlock) {
    __m512 x_64[4];
    load_64(x, type, k, to, x_64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(x_64[i]));
      largest[i] = _mm512_max_epi32(largest[i], bits);
    }
  }
  const __m512i first = _mm512_max_epi32(largest[0], largest[1]);
  return _mm512_reduce_max_epi32(_mm512_max_epi32(first, _mm512_max_epi32(largest[2], largest[3])));
}

// The largest magnitude over `steps`; NaN where a value is not finite. With 127 activation_step().
inline double step_of(const void* x, FloatType type, int64_t from, int64_t to, double steps) {
  const int32_t bits = largest_bits(x, type, from, to);
  if (bits > 0x7f7fffff) return __builtin_nan("");
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
  return static_cast<double>(magnitude) / steps;
}

// How a row is divided by its step. A product with the inverse in float is at most 127 * 2^-23 from
// the quotient: where it is no nearer than that to the middle of two integers, both round alike.
struct Divisor {
  double step = 0.0;
  float inverse = 0.0f;  // 0: beyond float, or so near that x may be denormal

  Divisor() = default;
  explicit Divisor(double s) : step(s), inverse(s > 1e-30 ? static_cast<float>(1.0 / s) : 0.0f) {}
};

inline __mmask16 near_middles(__m512 value) {
  constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 away = _mm512_sub_ps(value, _mm512_roundscale_ps(value, kToNearest));
  return _mm512_cmp_ps_mask(_mm512_abs_ps(away), _mm512_set1_ps(0.49998f), _CMP_GT_OQ);
}

// The quotients of 16 columns by `step`, to nearest even: quantized_activation().
inline __m512i quotients_16(__m512 x, double step) {
  const __m512d divisor = _mm512_set1_pd(step);
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  const __m256i a = _mm512_cvtpd_epi32(_mm512_div_pd(low, divisor));
  const __m256i b = _mm512_cvtpd_epi32(_mm512_div_pd(high, divisor));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// Bytes of 64 integers of 16 bits or less, `v[i]` columns 16 i .. 16 i + 15, saturated.
inline __m512i narrow_64(const __m512i* v) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  return _mm512_permutexvar_epi32(order, bytes);
}

inline __m512i quantize_64(const void* x, FloatType type, int64_t k, int64_t cols,
                           const Divisor& by) {
  __m512 value[4];
  __m512i q[4];
  const __m512 inverse = _mm512_set1_ps(by.inverse);
  unsigned near = by.inverse > 0.0f ? 0 : 1;
  load_64(x, type, k, cols, value);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 quotient = _mm512_mul_ps(value[i], inverse);
    near |= near_middles(quotient);
    q[i] = _mm512_cvtps_epi32(quotient);
  }
  if (near != 0) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = quotients_16(value[i], by.step);
  }
  return narrow_64(q);
}

// Row m of the block: `x` holds its `cols` elements.
inline void prepare_wide_row(const PackedMatrix& w, const void* x, FloatType type, int64_t m,
                             const WideRows& out, double* step) {
  const int64_t blocks = blocks_of(w), groups = groups_of(w), per_group = group_blocks(w);
  *step = step_of(x, type, 0, w.cols, 127.0);
  const bool some = *step > 0.0;
  const Divisor by(*step);
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    __m512i sum = _mm512_setzero_si512();
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    for (; b < stop; ++b) {
      const __m512i q =
          some ? quantize_64(x, type, b * kBlock, w.cols, by) : _mm512_setzero_si512();
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), q);
      out.store(q, m, 0, b);
    }
    out.q_sum[m * groups + g] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
