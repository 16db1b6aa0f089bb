// Included by avx512.cpp alone: rows of x in 8-bit parts against panels of W. One row has a loop of
// its own, as one and two rows of 8 bits have (avx512_panel_few.h): the panels of a thread are one
// stream, totals stay in registers, and as little as can be is done besides products. Where W comes
// from beyond the second cache, the fewer instructions a group has, the further ahead of them the
// processor reads. (4 bits, two parts, Zen 5: 95 cycles a group of 128 columns of 32 rows, 64 of
// them for products, where four sums for each lane, conversions of both parts and more loads took
// 112. With a mask less a step, as 8-bit rows have it, two parts took 93, three and four one more.)
#pragma once

#include "matmul/avx512_panel_few.h"

namespace pyrobust::matmul {
namespace {

// Sums of a group for each part and each half of a panel; steps take turns in two, as a product
// waits for the one before.
template <int kBits, bool kBook, int kParts>
struct PartSums {
  static constexpr int kChains = 2, kAll = 2 * kParts;
  static constexpr bool kDouble = kBits == 1 && !kBook;  // codes of one bit stand for -1 and 1
  static constexpr int kShift = second_half_shift<kBits, kBook>();
  __m512i sum[kChains * kAll];  // part by part: rows 0..15 of W, rows 16..31

  // Minus the zeros times the sums of x; of the two highest parts in the place of the second where
  // those are put together as integers.
  template <bool kNarrow>
  __attribute__((always_inline)) inline void start(const uint8_t* zeros,
                                                   const PanelOffsets& offset) {
    if (kNarrow && zeros != nullptr) {
      start_joined_sums<1, kParts, kShift>(zeros, offset, sum);
    } else {
      start_sums<kParts, kShift, kDouble>(zeros, offset, sum);
    }
#pragma GCC unroll 8
    for (int i = kAll; i < kChains * kAll; ++i) sum[i] = _mm512_setzero_si512();
  }

  // Codes of 16 columns.
  __attribute__((always_inline)) inline void add(const uint8_t* codes, const int8_t* q,
                                                 __m512i table, int64_t ahead) {
    PanelQuad<kBits, kBook> quad;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      quad.load_step(s, codes, ahead);
      __m512i a, b;
      quad.step(s, table, &a, &b);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        int32_t four;
        __builtin_memcpy(&four, q + 4 * (s * kParts + p), sizeof(four));
        const __m512i x = _mm512_set1_epi32(four);
        const int at = s % kChains * kAll + 2 * p;
        add_dots(sum[at], a, x);
        add_dots(sum[at + 1], b, x);
      }
    }
  }

  // The sums of each part and half of the group.
  __attribute__((always_inline)) inline void take(const PanelOffsets& offset, __m512i* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kAll; ++i) out[i] = _mm512_add_epi32(sum[i], sum[kAll + i]);
    if constexpr (!kDouble) return;
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const __m512i first = _mm512_add_epi32(out[2 * p], out[2 * p]);
      out[2 * p] = _mm512_add_epi32(first, _mm512_set1_epi32(offset.first[p]));
    }
  }
};

// Sums of the last group, which are added to the totals amid the products of the next, as
// FewPending are. kNarrow: is_narrow().
template <int kParts, int kShift, bool kNarrow>
struct PartsPending {
  __m512i sum[2 * kParts];
  const uint8_t* head = nullptr;  // of that group, if there is one
  double step;

  __attribute__((always_inline)) inline void add_to(const PackedMatrix& w, __m512d* total) const {
    __m512d scale[4];
    load_panel_scales<0>(w, head, scale);
    // Powers of two, of which scalef takes the exponent: products would use the ports of
    // `vpdpbusd`.
    const __m512d first = _mm512_getexp_pd(_mm512_set1_pd(step));
    const __m512d second = _mm512_sub_pd(first, _mm512_set1_pd(kShift));
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const __m512d all = _mm512_scalef_pd(joined(l), l < 2 ? first : second);
      total[l] = _mm512_fmadd_pd(all, scale[l], total[l]);
    }
  }

 private:
  // Parts put together, of eight rows of W: l counts through both halves.
  __attribute__((always_inline)) inline __m512d joined(int l) const {
    const __m512d unit = _mm512_set1_pd(256.0);
    const __m512i high = sum[l / 2], low = sum[2 + l / 2];
    __m512d all;
    if constexpr (kNarrow) {
      all = eight(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), l);
    } else {
      all = _mm512_fmadd_pd(eight(high, l), unit, eight(low, l));
    }
#pragma GCC unroll 2
    for (int p = 2; p < kParts; ++p) all = _mm512_fmadd_pd(all, unit, eight(sum[2 * p + l / 2], l));
    return all;
  }

  static __attribute__((always_inline)) inline __m512d eight(__m512i v, int l) {
    return _mm512_cvtepi32_pd(l % 2 == 0 ? _mm512_castsi512_si256(v)
                                         : _mm512_extracti64x4_epi64(v, 1));
  }
};

// Rows [rows.begin, rows.end) of W; the parts of one row are all of x.
template <int kBits, bool kBook, int kParts, bool kNarrow>
__attribute__((noinline)) void one_row_panels(const PackedMatrix& w, const PanelRows& x,
                                              RowRange rows, const Output& out) {
  using Sums = PartSums<kBits, kBook, kParts>;
  const PanelLayout layout(w);
  const __m512i table = codebook_table(w);
  const int64_t ahead = panel_ahead();
  const uint8_t* head = w.panels + rows.begin / kPanelRows * layout.panel_bytes;
  for (int64_t n = rows.begin / kPanelRows * kPanelRows; n < rows.end; n += kPanelRows) {
    __m512d total[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) total[l] = _mm512_setzero_pd();
    const int8_t* q = x.q;
    const PanelOffsets* offset = x.offset;
    const double* step = x.step;
    PartsPending<kParts, Sums::kShift, kNarrow> pending;
    int64_t left = layout.columns;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t columns = left < layout.group_columns ? left : layout.group_columns;
      Sums sums;
      prefetch_head(layout, head, ahead);
      sums.template start<kNarrow>(
          w.zero == nullptr ? nullptr : head + kPanelRows * layout.scale_bytes, *offset);
      const uint8_t* codes = head + layout.head_bytes;
      const int8_t* const end = q + columns * kParts;
      if (pending.head != nullptr) {
        const int8_t* const half = q + columns / (2 * kQuadColumns) * kQuadColumns * kParts;
        for (; q < half; q += kQuadColumns * kParts, codes += kBits * kLineBytes) {
          sums.add(codes, q, table, ahead);
        }
        pending.add_to(w, total);
      }
      for (; q < end; q += kQuadColumns * kParts, codes += kBits * kLineBytes) {
        sums.add(codes, q, table, ahead);
      }
      sums.take(*offset, pending.sum);
      pending.head = head;
      pending.step = *step;
      head = codes;
      left -= columns;
      ++offset;
      step += kTileRows;
    }
    if (pending.head != nullptr) pending.add_to(w, total);
    alignas(64) double totals[kPanelRows];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) _mm512_store_pd(totals + 8 * l, total[l]);
    const int64_t stop = n + kPanelRows;
    store_panel_rows(out, 1, nullptr, n, n > rows.begin ? n : rows.begin,
                     stop < rows.end ? stop : rows.end, totals);
  }
}

template <int kBits, bool kBook, int kParts>
void multiply_one_row_of(const PackedMatrix& w, const PanelRows& x, RowRange rows,
                         const Output& out) {
  if (is_narrow(w, second_half_shift<kBits, kBook>())) {
    return one_row_panels<kBits, kBook, kParts, true>(w, x, rows, out);
  }
  one_row_panels<kBits, kBook, kParts, false>(w, x, rows, out);
}

// One row of x in parts.
template <int kBits, bool kBook>
void multiply_one_row(const PackedMatrix& w, Mode mode, const Block& block, RowRange rows,
                      const Output& out) {
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, mode);
  switch (x.parts) {
    case 2:
      return multiply_one_row_of<kBits, kBook, 2>(w, x, rows, out);
    case 3:
      return multiply_one_row_of<kBits, kBook, 3>(w, x, rows, out);
    default:
      return multiply_one_row_of<kBits, kBook, 4>(w, x, rows, out);
  }
}

// Tiles of more rows of x in parts, `width` rows of bytes.
template <int kBits, bool kBook>
void panel_parts_of(int64_t width, const PanelTask& task) {
  switch (task.x->parts) {
    case 2:
      switch (width) {
        case 2:
          return panel_tile<kBits, kBook, 2, 2>(task);
        case 4:
          return panel_tile<kBits, kBook, 4, 2>(task);
        case 6:
          return panel_tile<kBits, kBook, 6, 2>(task);
        default:
          return panel_tile<kBits, kBook, 8, 2>(task);
      }
    case 3:
      if (width == 3) return panel_tile<kBits, kBook, 3, 3>(task);
      return panel_tile<kBits, kBook, 6, 3>(task);
    default:
      if (width == 4) return panel_tile<kBits, kBook, 4, 4>(task);
      return panel_tile<kBits, kBook, 8, 4>(task);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
