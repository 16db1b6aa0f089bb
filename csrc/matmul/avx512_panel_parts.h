// Included by avx512.cpp alone: one row of x in 8-bit parts against a panel of W. Totals stay in
// registers, and as little as can be is done besides products: where W comes from beyond the second
// cache, the fewer instructions a group has, the further ahead of them the processor reads. (4
// bits, two parts, Zen 5: 96 cycles a group of 128 columns of 32 rows, 64 of them for products; 112
// with four sums for each lane, conversions of both parts, and members of the streams read each
// time.)
#pragma once

#include "matmul/avx512_panel_tile.h"

namespace pyrobust::matmul {
namespace {

// The sums of one row's parts, the uppermost first, of eight rows of W: l counts through both
// halves of the panel. `narrow`: is_narrow().
template <int kParts>
__attribute__((always_inline)) inline __m512d join_parts(const __m512i* sum, bool narrow, int l) {
  const auto part = [&](__m512i v) {
    return _mm512_cvtepi32_pd(l % 2 == 0 ? _mm512_castsi512_si256(v)
                                         : _mm512_extracti64x4_epi64(v, 1));
  };
  const __m512d unit = _mm512_set1_pd(256.0);
  const __m512i high = sum[l / 2], low = sum[2 + l / 2];
  __m512d all;
  if (narrow) {
    all = part(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  } else {
    all = _mm512_fmadd_pd(part(high), unit, part(low));
  }
#pragma GCC unroll 2
  for (int p = 2; p < kParts; ++p) all = _mm512_fmadd_pd(all, unit, part(sum[2 * p + l / 2]));
  return all;
}

template <int kBits, bool kBook, int kParts, bool kNarrow>
__attribute__((noinline)) void one_row_of_parts(const PanelTask& task) {
  constexpr int kChains = 2, kSums = 2 * kParts * kChains;  // a product waits for the one before
  PanelStreams<kBits, kBook, kParts> from(task);
  constexpr int kShift = from.kShift;
  const PanelLayout layout = *task.layout;
  const int64_t usual = layout.group_columns / kQuadColumns;
  const int64_t last = (layout.columns - (layout.groups - 1) * layout.group_columns) / kQuadColumns;
  const __m512i table = codebook_table(from.w);
  finish_pending<kShift>(task);
  __m512d total[4];
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) total[l] = _mm512_load_pd(task.total + 8 * l);
  for (int64_t g = task.from, end = task.to; g < end; ++g) {
    const int64_t quads = g + 1 < layout.groups ? usual : last;
    const uint8_t* codes = from.head + layout.head_bytes;
    __m512i sum[kSums];
    from.start(sum);
#pragma GCC unroll 16
    for (int i = 2 * kParts; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
    for (int64_t j = 0; j < quads; ++j) {
      add_quad<kBits, kBook, kParts, kChains>(codes, from.q, table, sum);
      codes += kBits * kLineBytes;
      from.q += kQuadColumns * kParts;
    }
#pragma GCC unroll 16
    for (int i = 2 * kParts; i < kSums; ++i) {
      sum[i % (2 * kParts)] = _mm512_add_epi32(sum[i % (2 * kParts)], sum[i]);
    }
    from.finish(sum);
    __m512d scale[4];
    load_panel_scales<kShift>(from.w, from.head, scale);
    const __m512d step = _mm512_set1_pd(*from.step);
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      total[l] = _mm512_fmadd_pd(join_parts<kParts>(sum, kNarrow, l), _mm512_mul_pd(scale[l], step),
                                 total[l]);
    }
    from.head = codes;
    ++from.offset;
    from.step += kTileRows;
  }
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) _mm512_store_pd(task.total + 8 * l, total[l]);
}

template <int kBits, bool kBook, int kParts>
void few_parts(const PanelTask& task) {
  if (task.narrow) return one_row_of_parts<kBits, kBook, kParts, true>(task);
  one_row_of_parts<kBits, kBook, kParts, false>(task);
}

// Tiles of rows of x in parts, `width` rows of bytes.
template <int kBits, bool kBook>
void panel_parts_of(int64_t width, const PanelTask& task) {
  switch (task.x->parts) {
    case 2:
      switch (width) {
        case 2:
          return few_parts<kBits, kBook, 2>(task);
        case 4:
          return panel_tile<kBits, kBook, 4, 2>(task);
        case 6:
          return panel_tile<kBits, kBook, 6, 2>(task);
        default:
          return panel_tile<kBits, kBook, 8, 2>(task);
      }
    case 3:
      if (width == 3) return few_parts<kBits, kBook, 3>(task);
      return panel_tile<kBits, kBook, 6, 3>(task);
    default:
      if (width == 4) return few_parts<kBits, kBook, 4>(task);
      return panel_tile<kBits, kBook, 8, 4>(task);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
