// Included by avx512_panels.h: a weight into panel order (panels.h), a panel at a time.
#pragma once

#include "matmul/avx512_decode.h"
#include "matmul/avx512_rows.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

// Scales and zeros of group g of `count` rows from `first` on.
void write_panel_head(const PackedMatrix& w, const PanelLayout& layout, int64_t first,
                      int64_t count, int64_t g, uint8_t* head) {
  __builtin_memset(head, 0, static_cast<size_t>(layout.head_bytes));
  const auto* scale = static_cast<const uint8_t*>(w.scale);
  const auto size = static_cast<size_t>(layout.scale_bytes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * layout.groups + g;
    __builtin_memcpy(head + i * layout.scale_bytes, scale + at * layout.scale_bytes, size);
    if (w.zero != nullptr) head[kPanelRows * layout.scale_bytes + i] = w.zero[at];
  }
}

// The two registers of a step, a below b.
inline __m512i join(__m512i a, __m512i b, int bits) {
  return _mm512_or_si512(a, _mm512_slli_epi16(b, static_cast<unsigned>(bits)));
}

// The codes of a quad: v[s] of rows 0..15 and w[s] of rows 16..31 hold those of step s, one a byte.
inline void write_quad(int bits, const __m512i* v, const __m512i* w, uint8_t* out) {
  const auto put = [&](int i, __m512i value) { _mm512_storeu_si512(out + kLineBytes * i, value); };
  if (bits == 8) {
    for (int s = 0; s < 4; ++s) {
      put(2 * s, v[s]);
      put(2 * s + 1, w[s]);
    }
    return;
  }
  __m512i both[4];
  for (int s = 0; s < 4; ++s) both[s] = join(v[s], w[s], bits);
  switch (bits) {
    case 4:
      for (int s = 0; s < 4; ++s) put(s, both[s]);
      return;
    case 3:
      for (int s = 0; s < 3; ++s) {
        const __m512i two = _mm512_and_si512(
            _mm512_srli_epi16(both[3], static_cast<unsigned>(2 * s)), _mm512_set1_epi8(3));
        put(s, join(both[s], two, 6));
      }
      return;
    case 2:
      put(0, join(both[0], both[1], 4));
      put(1, join(both[2], both[3], 4));
      return;
    default:
      put(0, join(join(both[0], both[1], 2), join(both[2], both[3], 2), 4));
  }
}

// Where column k, the first of a quad, of a panel's codes lies.
inline uint8_t* quad_at(const PanelLayout& layout, uint8_t* panel, int64_t k) {
  const int64_t g = k / layout.group_columns;
  return panel + g * layout.group_bytes + layout.head_bytes +
         layout.code_bytes(k - g * layout.group_columns);
}

// 64 columns from k on; rows of `codes` are `pitch` bytes apart.
void write_panel_block(const PanelLayout& layout, const uint8_t* codes, int64_t pitch, int64_t k,
                       uint8_t* panel) {
  __m512i half[2][kPanelRows / 2];
  for (int t = 0; t < 2; ++t) {
    for (int i = 0; i < kPanelRows / 2; ++i) {
      half[t][i] = _mm512_loadu_si512(codes + (t * kPanelRows / 2 + i) * pitch);
    }
    transpose_16(half[t]);
  }
  for (int64_t j = 0; j < 4 && k + kQuadColumns * j < layout.columns; ++j) {
    write_quad(layout.bits, half[0] + 4 * j, half[1] + 4 * j,
               quad_at(layout, panel, k + kQuadColumns * j));
  }
}

// Panel p to `panel`.
void write_panel(const PackedMatrix& w, const PanelLayout& layout, int64_t p, uint8_t* panel) {
  constexpr int64_t kPitch = kSpan + kSpanSlack;
  alignas(64) uint8_t codes[kPanelRows * kPitch];
  const int64_t first = p * kPanelRows, left = w.rows - first;
  const int64_t count = left < kPanelRows ? left : kPanelRows;
  for (int64_t g = 0; layout.head_bytes > 0 && g < layout.groups; ++g) {
    write_panel_head(w, layout, first, count, g, panel + g * layout.group_bytes);
  }
  if (count < kPanelRows) __builtin_memset(codes, 0, sizeof(codes));
  for (int64_t k = 0; k < w.cols; k += kSpan) {
    const int64_t stop = w.cols - k < kSpan ? w.cols : k + kSpan;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* own = codes + i * kPitch;
      const uint8_t* from = span_codes<Avx512Codes>(w, first + i, k, stop, own);
      if (from != own) __builtin_memcpy(own, from, static_cast<size_t>(stop - k));
      __builtin_memset(own + (stop - k), 0, kSpanSlack);
    }
    for (int64_t at = k; at < stop; at += kLineBytes) {
      write_panel_block(layout, codes + (at - k), kPitch, at, panel);
    }
  }
}

// Panels [begin, end) to `out`, which begins with panel 0.
void write_panels(const PackedMatrix& w, int64_t begin, int64_t end, uint8_t* out) {
  const PanelLayout layout(w);
  for (int64_t p = begin; p < end; ++p) write_panel(w, layout, p, out + p * layout.panel_bytes);
}

// Panel p of a weight; made in `own`, of PanelLayout::panel_bytes, where it has none.
inline const uint8_t* panel_of(const PackedMatrix& w, const PanelLayout& layout, int64_t p,
                               void* own) {
  if (w.panels != nullptr) return w.panels + p * layout.panel_bytes;
  write_panel(w, layout, p, static_cast<uint8_t*>(own));
  return static_cast<const uint8_t*>(own);
}

}  // namespace
}  // namespace pyrobust::matmul
