// Included by avx512.cpp alone: a weight in panel order (panels.h) against one or two rows of x in
// 8 bits. The panels of a thread are one stream; totals stay in registers.
#pragma once

#include "matmul/avx512_panel_results.h"
#include "matmul/avx512_panel_tile.h"

namespace pyrobust::matmul {
namespace {

// Sums of a group for each lane. A product waits for the one before, so that steps take turns in
// several sums. `a` is of rows 0..15; `b` is of rows 16..31, or of both at once: (a + 2^kBits b) x.
template <int kBits, bool kBook, int kRows>
struct FewSums {
  using Quad = PanelQuad<kBits, kBook>;
  static constexpr bool kDouble = kBits == 1 && !kBook;  // codes of one bit stand for -1 and 1
  static constexpr int kShift = second_half_shift<kBits, kBook>();
  __m512i a[4][kRows], b[4][kRows];

  // Minus the zeros times the sums of x.
  __attribute__((always_inline)) inline void start(const uint8_t* zeros,
                                                   const PanelOffsets& offset) {
    __m512i first[2 * kRows];
    start_sums<kRows, kShift, kDouble>(zeros, offset, first);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        a[c][r] = c == 0 ? first[2 * r] : _mm512_setzero_si512();
        b[c][r] = c == 0 ? first[2 * r + 1] : _mm512_setzero_si512();
        if (c == 0 && Quad::kJoined) b[c][r] = _mm512_add_epi32(b[c][r], a[c][r]);
      }
    }
  }

  // Codes of 16 columns.
  __attribute__((always_inline)) inline void add(const uint8_t* codes, const int8_t* q,
                                                 __m512i table, int64_t ahead) {
    Quad quad;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      quad.load_step(s, codes, ahead);
      __m512i first, second;
      if constexpr (Quad::kJoined) {
        quad.joined(s, &first, &second);
      } else {
        quad.step(s, table, &first, &second);
      }
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, q + 4 * (s * kRows + r), sizeof(four));
        const __m512i x = _mm512_set1_epi32(four);
        add_dots(b[s][r], second, x);
        add_dots(a[s][r], first, x);
      }
    }
  }

  // The sums of row r of the group, of rows 0..15 of W and of rows 16..31.
  __attribute__((always_inline)) inline void take(int r, const PanelOffsets& offset,
                                                  __m512i* out) const {
    __m512i first = total_of(a, r), second = total_of(b, r);
    if constexpr (Quad::kJoined) second = _mm512_sub_epi32(second, first);
    if constexpr (kDouble) {
      first = _mm512_add_epi32(_mm512_add_epi32(first, first), _mm512_set1_epi32(offset.first[r]));
    }
    out[0] = first;
    out[1] = _mm512_srai_epi32(second, static_cast<unsigned>(kShift));
  }

 private:
  // Codes of some steps lie in upper bits of their bytes, which leaves zeros below.
  static __attribute__((always_inline)) inline __m512i total_of(const __m512i (&v)[4][kRows],
                                                                int r) {
    if constexpr (Quad::kJoined && kBits == 1) {
      __m512i step[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        step[c] = _mm512_srai_epi32(v[c][r], static_cast<unsigned>(Quad::unit(c)));
      }
      return _mm512_add_epi32(_mm512_add_epi32(step[0], step[1]),
                              _mm512_add_epi32(step[2], step[3]));
    }
    const __m512i even = _mm512_add_epi32(v[0][r], v[2][r]);
    __m512i odd = _mm512_add_epi32(v[1][r], v[3][r]);
    if constexpr (Quad::kJoined) odd = _mm512_srai_epi32(odd, static_cast<unsigned>(Quad::unit(1)));
    return _mm512_add_epi32(even, odd);
  }
};

// Sums of the last group. They are added to the totals amid the products of the next: at once, they
// would wait for the last products, and those behind them would find no place in the processor's
// queues (4 bits, Zen 4, from the second cache, cycles a group of 128 columns: one row 87 and 81,
// two rows 158 and 147, of which products are 64 and 128).
template <int kRows>
struct FewPending {
  __m512i sum[2 * kRows];
  const uint8_t* head = nullptr;  // of that group, if there is one

  __attribute__((always_inline)) inline void add_to(const PackedMatrix& w, __m512d* total) const {
    __m512d scale[4];
    load_panel_scales<0>(w, head, scale);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const __m512i own = sum[2 * r + l / 2];
        const __m256i eight = l % 2 == 0 ? _mm512_castsi512_si256(own)  //
                                         : _mm512_extracti64x4_epi64(own, 1);
        total[4 * r + l] = _mm512_fmadd_pd(_mm512_cvtepi32_pd(eight), scale[l], total[4 * r + l]);
      }
    }
  }
};

// Rows [rows.begin, rows.end) of W; kRows rows of bytes are all of x.
template <int kBits, bool kBook, int kRows>
__attribute__((noinline)) void few_rows_panels(const PackedMatrix& w, const PanelRows& x,
                                               const double* step, RowRange rows,
                                               const Output& out) {
  constexpr int kTotals = 4 * kRows;
  const PanelLayout layout(w);
  const __m512i table = codebook_table(w);
  const int64_t ahead = panel_ahead();
  const uint8_t* head = w.panels + rows.begin / kPanelRows * layout.panel_bytes;
  for (int64_t n = rows.begin / kPanelRows * kPanelRows; n < rows.end; n += kPanelRows) {
    __m512d total[kTotals];
#pragma GCC unroll 8
    for (int i = 0; i < kTotals; ++i) total[i] = _mm512_setzero_pd();
    const int8_t* q = x.q;
    const PanelOffsets* offset = x.offset;
    FewPending<kRows> pending;
    int64_t left = layout.columns;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t columns = left < layout.group_columns ? left : layout.group_columns;
      FewSums<kBits, kBook, kRows> sums;
      prefetch_head(layout, head, ahead);
      sums.start(w.zero == nullptr ? nullptr : head + kPanelRows * layout.scale_bytes, *offset);
      const uint8_t* codes = head + layout.head_bytes;
      const int8_t* const end = q + columns * kRows;
      if (pending.head != nullptr) {
        const int8_t* const half = q + columns / (2 * kQuadColumns) * kQuadColumns * kRows;
        for (; q < half; q += kQuadColumns * kRows, codes += kBits * kLineBytes) {
          sums.add(codes, q, table, ahead);
        }
        pending.add_to(w, total);
      }
      for (; q < end; q += kQuadColumns * kRows, codes += kBits * kLineBytes) {
        sums.add(codes, q, table, ahead);
      }
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) sums.take(r, *offset, pending.sum + 2 * r);
      pending.head = head;
      head = codes;
      left -= columns;
      ++offset;
    }
    if (pending.head != nullptr) pending.add_to(w, total);
    alignas(64) double totals[8 * kTotals];
#pragma GCC unroll 8
    for (int i = 0; i < kTotals; ++i) _mm512_store_pd(totals + 8 * i, total[i]);
    const int64_t stop = n + kPanelRows;
    store_panel_rows(out, x.rows, step, n, n > rows.begin ? n : rows.begin,
                     stop < rows.end ? stop : rows.end, totals);
  }
}

template <int kBits, bool kBook>
void multiply_few_rows(const PackedMatrix& w, const Block& block, RowRange rows,
                       const Output& out) {
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, Mode::kInt8);
  if (x.rows == 1) return few_rows_panels<kBits, kBook, 1>(w, x, block.step, rows, out);
  few_rows_panels<kBits, kBook, 2>(w, x, block.step, rows, out);
}

}  // namespace
}  // namespace pyrobust::matmul
