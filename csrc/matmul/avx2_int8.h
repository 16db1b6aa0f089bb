// Included by avx2.cpp and avx512.cpp: the product with activations rounded to 8 bits. Bytes times
// bytes to int32 (at 8 bits 16 times 16), exact in any order, then the double epilogue of matmul.h.
#pragma once

#include "matmul/avx2_tile.h"

namespace pyrobust::matmul {
namespace {

// --- int8 mode ----------------------------------------------------------------------------------

inline __m256i load_256(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

// Eight int32 partial sums of 64 products. At most 15 * 127 * 4 in 16 bits: no saturation.
inline __m256i dot_bytes(const Bytes& codes, __m256i even, __m256i odd) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes.even, even),
                                         _mm256_maddubs_epi16(codes.odd, odd));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline __m256i dot_wide(const uint8_t* codes, const int16_t* q) {
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i code =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(code, load_256(q + 16 * i)));
  }
  return sum;
}

inline __m128i lane_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i quads = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
}

// Group sums of q (multiplier code - zero), their product with the scales, in ascending order.
// q_sum: per row of x and group the sum of q; zero: kMagic + zero per row of W and group.
template <int kBits, int kRows>
inline void integer_blocks(const TileRows& codes, const double* scale, const float* zero,
                           int64_t groups, int64_t per_group, int64_t blocks, const void* q,
                           int64_t stride, const int32_t* q_sum, __m256d* total) {
  constexpr int kStep = kBits == 8 ? 2 : 1;  // bytes an activation takes
  const auto* x = static_cast<const char*>(q);
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    __m256i sum[kRows][kTile];
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kTile; ++n) sum[m][n] = _mm256_setzero_si256();
    }
    for (; b < stop; ++b) {
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
        const uint8_t* block = codes.block(n, b, 8 * kBits);
        if constexpr (kBits == 8) {
          for (int m = 0; m < kRows; ++m) {
            const char* row = x + (m * stride + b * kBlock) * kStep;
            sum[m][n] =
                _mm256_add_epi32(sum[m][n], dot_wide(block, reinterpret_cast<const int16_t*>(row)));
          }
        } else {
          const Bytes bytes = load_bytes<kBits>(block);
          for (int m = 0; m < kRows; ++m) {
            const char* row = x + m * stride + b * kBlock;
            sum[m][n] =
                _mm256_add_epi32(sum[m][n], dot_bytes(bytes, load_256(row), load_256(row + 32)));
          }
        }
      }
    }
    const __m128 zeros =
        _mm_setr_ps(zero[g], zero[groups + g], zero[2 * groups + g], zero[3 * groups + g]);
    const __m128i offset = _mm_cvtps_epi32(_mm_sub_ps(zeros, _mm_set1_ps(kMagic)));
    const __m256d scales = _mm256_loadu_pd(scale + g * kTile);
    for (int m = 0; m < kRows; ++m) {
      __m128i products = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      if constexpr (kBits == 1) products = _mm_add_epi32(products, products);
      const __m128i all = _mm_set1_epi32(q_sum[m * groups + g]);
      const __m128i exact = _mm_sub_epi32(products, _mm_mullo_epi32(offset, all));
      // 46 bits: the product is exact, so a fused add rounds like a separate one.
      total[m] = _mm256_fmadd_pd(_mm256_cvtepi32_pd(exact), scales, total[m]);
    }
  }
}

// Prepared int8 rows of the block path: q in byte_order (int16 in plain order at 8 bits), then the
// sums of q per row and group.
struct IntegerRows {
  char* q;
  int32_t* q_sum;
  int64_t stride;  // activations a row
  int64_t step;    // bytes an activation takes

  IntegerRows(void* data, const PackedMatrix& w, int64_t rows)
      : q(static_cast<char*>(data)), stride(blocks_of(w) * kBlock), step(bits_of(w) == 8 ? 2 : 1) {
    q_sum = reinterpret_cast<int32_t*>(q + rows * stride * step);
  }
};

// One or two rows of x; more take avx2_int8_panel.h.
template <int kBits>
void multiply_integer_blocks(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const IntegerRows x(const_cast<void*>(block.data), w, block.rows);
  const int64_t groups = groups_of(w);
  for (int64_t first = begin; first < end; first += kTile) {
    load_tile(w, first, scratch.expanded, scratch.rows);
    load_group_scales(w, first, scratch.group_scale, scratch.group_zero);
    __m256d total[kFusedRows] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    const auto multiply =
        block.rows == 1 ? integer_blocks<kBits, 1> : integer_blocks<kBits, kFusedRows>;
    multiply(*scratch.rows, scratch.group_scale, scratch.group_zero, groups, group_blocks(w),
             blocks_of(w), x.q, x.stride, x.q_sum, total);
    for (int64_t m = 0; m < block.rows; ++m) {
      double value[kTile];
      _mm256_storeu_pd(value, total[m]);
      for (int64_t n = 0; n < kTile && first + n < end; ++n) {
        store_result(out, m, first + n, value[n], block.step[m]);
      }
    }
  }
}

// Groups along the rows of W: double sums of the exact products q * weight.
template <int kBits>
void multiply_double_columns(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const auto* x = static_cast<const float*>(block.data);
  const int64_t blocks = blocks_of(w), stride = blocks * kBlock;
  int64_t loaded[kPanelTiles * kTile];
  for (int64_t& slot : loaded) slot = -1;
  for (int64_t first = begin; first < end; first += kTile) {
    const float *scale[kTile], *zero[kTile];
    load_tile(w, first, scratch.expanded, scratch.rows);
    tile_column_scales(w, first, 0, loaded, scratch, scale, zero);
    decode_scaled<kBits>(*scratch.rows, scale, zero, 0, blocks, scratch.panel);
    for (int64_t m = 0; m < block.rows; ++m) {
      __m256d low[kTile], high[kTile];
      for (int n = 0; n < kTile; ++n) low[n] = high[n] = _mm256_setzero_pd();
      for (int64_t s = 0; s < blocks * 8; ++s) {
        const __m256d x_low = _mm256_cvtps_pd(_mm_loadu_ps(x + m * stride + s * 8));
        const __m256d x_high = _mm256_cvtps_pd(_mm_loadu_ps(x + m * stride + s * 8 + 4));
#pragma GCC unroll 4
        for (int n = 0; n < kTile; ++n) {
          const float* weight = scratch.panel + (s * kTile + n) * 8;
          low[n] = _mm256_fmadd_pd(x_low, _mm256_cvtps_pd(_mm_loadu_ps(weight)), low[n]);
          high[n] = _mm256_fmadd_pd(x_high, _mm256_cvtps_pd(_mm_loadu_ps(weight + 4)), high[n]);
        }
      }
      for (int64_t n = 0; n < kTile && first + n < end; ++n) {
        double lane[8];
        _mm256_storeu_pd(lane, low[n]);
        _mm256_storeu_pd(lane + 4, high[n]);
        const double total = ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
                             ((lane[4] + lane[5]) + (lane[6] + lane[7]));
        store_result(out, m, first + n, total, block.step[m]);
      }
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
