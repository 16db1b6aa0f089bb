// Included by avx512.cpp alone: rows of x to 8 bits (core/activation_int8.h by vectors, to the same
// bits), in the order of columns of wide_bytes(), and their sums per group.
#pragma once

#include "matmul/avx2_tile.h"
#include "matmul/avx512_decode.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kFewRows = 4;   // rows of x up to which no panel of W is made
constexpr int64_t kTileRows = 8;  // rows of x that meet a panel together

// Prepared x, then the sums per row and group. Up to kFewRows rows of bytes; of more rows, tiles of
// eight in which four columns of row 0, four of row 1, ... follow one another: a panel then meets
// one stream of x. (Eight rows a power of two apart would fall into the same sets of the cache.)
struct WideRows {
  int8_t* q;
  int32_t* q_sum;
  int64_t stride;
  bool tiled;

  WideRows(void* data, const PackedMatrix& w, int64_t rows)
      : q(static_cast<int8_t*>(data)), stride(blocks_of(w) * kBlock), tiled(rows > kFewRows) {
    q_sum = reinterpret_cast<int32_t*>(q + padded(rows) * stride);
  }
  static int64_t padded(int64_t rows) { return rows > kFewRows ? round_up(rows, kTileRows) : rows; }
  static int64_t bytes(const PackedMatrix& w, int64_t rows) {
    return padded(rows) * blocks_of(w) * kBlock +
           rows * groups_of(w) * static_cast<int64_t>(sizeof(int32_t));
  }
  const int8_t* tile(int64_t m) const { return q + m / kTileRows * kTileRows * stride; }
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

// activation_step(): magnitudes compare as integers, and what is not finite exceeds all others.
inline double step_of(const void* x, FloatType type, int64_t cols) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < cols; k += kLanes) {
    const __m512i bits = _mm512_castps_si512(load_floats(x, type, k, first_lanes(cols - k)));
    largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  if (bits > 0x7f7fffff) return __builtin_nan("");
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
  return static_cast<double>(magnitude) / 127.0;
}

// 16 columns; division and conversion round as quantized_activation().
inline __m128i quantize_16(__m512 x, __m512d step) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  const __m256i a = _mm512_cvtpd_epi32(_mm512_div_pd(low, step));
  const __m256i b = _mm512_cvtpd_epi32(_mm512_div_pd(high, step));
  return _mm512_cvtepi32_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

inline __m512i quantize_64(const void* x, FloatType type, int64_t k, int64_t cols, __m512d step) {
  const auto part = [&](int i) {
    const int64_t at = k + kLanes * i;
    return quantize_16(load_floats(x, type, at, first_lanes(cols - at)), step);
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
  const int bits = stored_bits(w);
  *step = step_of(x, type, w.cols);
  const bool some = *step > 0.0;
  const __m512d divisor = _mm512_set1_pd(*step);
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    __m512i sum = _mm512_setzero_si512();
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    for (; b < stop; ++b) {
      const __m512i q =
          some ? quantize_64(x, type, b * kBlock, w.cols, divisor) : _mm512_setzero_si512();
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), q);
      if (!out.tiled) {
        store_ordered(bits, q, out.q + m * out.stride + b * kBlock);
        continue;
      }
      int8_t ordered[kBlock];
      store_ordered(bits, q, ordered);
      int8_t* at = out.q + (m - m % kTileRows) * out.stride + b * kBlock * kTileRows;
      for (int64_t d = 0; d < kLanes; ++d) {
        __builtin_memcpy(at + (d * kTileRows + m % kTileRows) * 4, ordered + 4 * d, 4);
      }
    }
    out.q_sum[m * groups + g] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
