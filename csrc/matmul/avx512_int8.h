// Included by avx512.cpp alone: the product with activations rounded to 8 bits, for groups of whole
// blocks, on the dot-product instruction of AVX-512 VNNI (unsigned codes times signed x).
//
// Up to four rows of x: avx512_few.h. More: 32 rows of W are unpacked into a panel whose register
// holds 4 columns of 16 rows, so that sums need no lanes added; x is broadcast, 8 rows at a time:
//
//   panel   block 0, columns 0..3: rows 0..15, rows 16..31; columns 4..7: ...     64 bytes each
//
// Both give the integer sums and the double epilogue of matmul.h, hence the same bits.
#pragma once

#include "matmul/avx512_few.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kWidth = kWideTiles * kLanes;

// Four columns of 16 rows each, v transposed, to places `from` .. `from` + 15 of tile t's panel.
inline void store_panel(__m512i* v, int count, uint8_t* panel, int64_t t) {
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    _mm512_storeu_si512(panel + (j * kWideTiles + t) * kBlock, v[j]);
  }
}

template <int kBits, bool kBook>
inline void unpack_block(const WideScratch& s, __m512i table, int64_t b, int64_t t,
                         uint8_t* panel) {
  __m512i v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    v[i] =
        wide_values<kBits, kBook>(s.rows[t * 4 + i / kTile].block(i % kTile, b, 8 * kBits), table);
    if constexpr (kBits == 1 && !kBook) v[i] = _mm512_add_epi8(v[i], v[i]);
  }
  transpose_16(v);
  store_panel(v, kLanes, panel, t);
}

// Two blocks of 4 bits: of either register the lower eight dwords belong to the first block.
template <bool kBook>
inline void unpack_pair(const WideScratch& s, __m512i table, int64_t b, int64_t t, uint8_t* panel) {
  constexpr int64_t kHalf = 8 * kWideTiles * kBlock;
  __m512i low[kLanes], high[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const IntegerPair pair =
        nibble_pair<kBook>(s.rows[t * 4 + i / kTile].row[i % kTile] + b * 32, table);
    low[i] = pair.low;
    high[i] = pair.high;
  }
  transpose_16(low);
  store_panel(low, 8, panel, t);
  store_panel(low + 8, 8, panel + 2 * kHalf, t);
  transpose_16(high);
  store_panel(high, 8, panel + kHalf, t);
  store_panel(high + 8, 8, panel + 3 * kHalf, t);
}

// Blocks [from, to) of 32 rows of W to the panel.
template <int kBits, bool kBook>
void unpack_wide(const WideScratch& s, __m512i table, int64_t from, int64_t to) {
  constexpr int64_t kPitch = kLanes * kWideTiles * kBlock;
  for (int64_t t = 0; t < kWideTiles; ++t) {
    int64_t b = from;
    if constexpr (kBits == 4) {
      for (; b + 2 <= to && b + 2 <= s.rows->whole; b += 2) {
        unpack_pair<kBook>(s, table, b, t, s.panel + (b - from) * kPitch);
      }
    }
    for (; b < to; ++b) unpack_block<kBits, kBook>(s, table, b, t, s.panel + (b - from) * kPitch);
  }
}

// kRows rows of one tile of x times `steps` times four columns of the panel.
template <int kRows>
inline void panel_sums(const uint8_t* panel, const int8_t* q, int64_t steps,
                       __m512i (&sum)[kRows][kWideTiles]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
  for (int64_t j = 0; j < steps; ++j, panel += kWideTiles * kBlock, q += 4 * kTileRows) {
    const __m512i left = _mm512_loadu_si512(panel);
    const __m512i right = _mm512_loadu_si512(panel + kBlock);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      __builtin_memcpy(&four, q + 4 * i, sizeof(four));
      const __m512i value = _mm512_set1_epi32(four);
      add_dots(sum[i][0], left, value);
      add_dots(sum[i][1], right, value);
    }
  }
}

// kRows rows of x from row m on, a multiple of 8, times the panel of blocks [from, to), onto their
// totals.
template <int kRows>
void panel_wide(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t from, int64_t to,
                const WideScratch& s) {
  const int64_t groups = groups_of(w), per_group = group_blocks(w);
  for (int64_t b = from; b < to;) {
    const int64_t g = b / per_group;
    const int64_t stop = to - b < per_group ? to : b + per_group;
    __m512i sum[kRows][kWideTiles];
    panel_sums<kRows>(s.panel + (b - from) * kLanes * kWideTiles * kBlock,
                      x.tile(m) + b * kBlock * kTileRows, (stop - b) * kLanes, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i all = _mm512_set1_epi32(x.q_sum[(m + i) * groups + g]);
#pragma GCC unroll 2
      for (int t = 0; t < kWideTiles; ++t) {
        double* total = s.total + (m + i) * kWidth + t * kLanes;
        __m512d low = _mm512_loadu_pd(total), high = _mm512_loadu_pd(total + 8);
        const int64_t at = g * kWidth + t * kLanes;
        add_group(sum[i][t], s.scale + at, s.zero + at, all, &low, &high);
        _mm512_storeu_pd(total, low);
        _mm512_storeu_pd(total + 8, high);
      }
    }
    b = stop;
  }
}

void panel_rows_of_x(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t count,
                     int64_t from, int64_t to, const WideScratch& s) {
  switch (count) {
    case 1:
      return panel_wide<1>(w, x, m, from, to, s);
    case 2:
      return panel_wide<2>(w, x, m, from, to, s);
    case 3:
      return panel_wide<3>(w, x, m, from, to, s);
    case 4:
      return panel_wide<4>(w, x, m, from, to, s);
    case 5:
      return panel_wide<5>(w, x, m, from, to, s);
    case 6:
      return panel_wide<6>(w, x, m, from, to, s);
    case 7:
      return panel_wide<7>(w, x, m, from, to, s);
    default:
      return panel_wide<8>(w, x, m, from, to, s);
  }
}

// 16 results of row m from row n of W on, as store_result() would; floats without a remainder.
void store_16(const Output& out, int64_t m, int64_t n, const double* total, double step) {
  auto* y = static_cast<float*>(out.data) + (out.row + m) * out.stride + n - out.first;
  for (int i = 0; i < 16; i += 8) {
    __m512d value = _mm512_loadu_pd(total + i);
    if (out.row_scale != nullptr) {
      value = _mm512_mul_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n + i)));
    }
    value = _mm512_mul_pd(value, _mm512_set1_pd(step));
    if (out.bias != nullptr) {
      value = _mm512_add_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n + i)));
    }
    _mm256_storeu_ps(y + i, _mm512_cvtpd_ps(value));
  }
}

template <int kBits, bool kBook>
void multiply_panels(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                     int64_t end, const Output& out, const WideScratch& s) {
  const int64_t blocks = blocks_of(w), chunk = wide_chunk(w), rows = block.rows;
  const __m512i table = codebook_table(w);
  const bool plain = out.type == FloatType::kFloat32 && out.remainder == nullptr;
  for (int64_t first = begin; first < end; first += kWidth) {
    load_wide_codes(w, first, kWidth, s);
    for (int64_t t = 0; t < kWideTiles; ++t) {
      load_lanes<kLanes>(w, first + t * kLanes, kWidth, t * kLanes, first == begin, s);
    }
    __builtin_memset(s.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += chunk) {
      const int64_t to = blocks - from < chunk ? blocks : from + chunk;
      unpack_wide<kBits, kBook>(s, table, from, to);
      for (int64_t m = 0; m < rows; m += kTileRows) {
        panel_rows_of_x(w, x, m, rows - m, from, to, s);
      }
    }
    const int64_t count = end - first < kWidth ? end - first : kWidth;
    for (int64_t m = 0; m < rows; ++m) {
      const double* total = s.total + m * kWidth;
      int64_t i = 0;
      for (; plain && i + kLanes <= count; i += kLanes) {
        store_16(out, m, first + i, total + i, block.step[m]);
      }
      for (; i < count; ++i) store_result(out, m, first + i, total[i], block.step[m]);
    }
  }
}

template <int kBits, bool kBook>
void multiply_wide(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* memory) {
  const WideRows x(const_cast<void*>(block.data), w, block.rows);
  const WideScratch s(memory, w, block.rows);
  switch (block.rows) {
    case 1:
      return multiply_few_rows<kBits, kBook, 1>(w, x, block, begin, end, out, s);
    case 2:
      return multiply_few_rows<kBits, kBook, 2>(w, x, block, begin, end, out, s);
    case 3:
      return multiply_few_rows<kBits, kBook, 3>(w, x, block, begin, end, out, s);
    case kFewRows:
      return multiply_few_rows<kBits, kBook, 4>(w, x, block, begin, end, out, s);
    default:
      return multiply_panels<kBits, kBook>(w, x, block, begin, end, out, s);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
