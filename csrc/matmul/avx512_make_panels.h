// Included by avx512_panels.h: a weight into panel order (panels.h), a panel at a time.
#pragma once

#include "matmul/avx512_decode.h"
#include "matmul/avx512_rows.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

// Scales and zeros of all groups of `count` rows from `first` on. Of a constant size, as calls of
// memcpy took a third of the time of a panel.
template <typename Scale>
void write_panel_heads(const PackedMatrix& w, const PanelLayout& layout, int64_t first,
                       int64_t count, uint8_t* panel) {
  const int64_t groups = scale_cols(w), some = layout.head_groups;
  const auto* scale = static_cast<const Scale*>(w.scale) + first * groups;
  const uint8_t* zero = w.zero != nullptr ? w.zero + first * groups : nullptr;
  for (int64_t g = 0; g < groups; g += some, panel += layout.group_bytes) {
    const int64_t own = groups - g < some ? groups - g : some;
    if (count < kPanelRows || own < some) {
      __builtin_memset(panel, 0, static_cast<size_t>(layout.head_bytes));
    }
    auto* scales = reinterpret_cast<Scale*>(panel);
    uint8_t* zeros = panel + some * kPanelRows * layout.scale_bytes;
    int64_t written = zeros - panel;
    for (int64_t j = 0; j < own; ++j, scales += kPanelRows) {
      for (int64_t i = 0; i < count; ++i) scales[i] = scale[i * groups + g + j];
    }
    for (int64_t j = 0; zero != nullptr && j < own; ++j, zeros += kPanelRows) {
      for (int64_t i = 0; i < count; ++i) zeros[i] = zero[i * groups + g + j];
    }
    if (zero != nullptr) written += some * kPanelRows;
    __builtin_memset(panel + written, 0, static_cast<size_t>(layout.head_bytes - written));
  }
}

void write_heads(const PackedMatrix& w, const PanelLayout& layout, int64_t first, int64_t count,
                 uint8_t* panel) {
  if (layout.head_bytes == 0) return;
  switch (layout.scale_bytes) {
    case 1:
      return write_panel_heads<uint8_t>(w, layout, first, count, panel);
    case 2:
      return write_panel_heads<uint16_t>(w, layout, first, count, panel);
    default:
      return write_panel_heads<float>(w, layout, first, count, panel);
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

// 32 rows of 64 codes of 4 bits, `pitch` bytes apart, without expanding them: rows i and i + 16
// share a register, so that one transposition brings eight columns of both to the same lanes.
inline void write_nibbles(const PanelLayout& layout, const uint8_t* codes, int64_t pitch, int64_t k,
                          uint8_t* panel) {
  const auto row = [&](int64_t n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + n * pitch));
  };
  __m512i v[kPanelRows / 2];
#pragma GCC unroll 16
  for (int i = 0; i < kPanelRows / 2; ++i) {
    v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(i + kPanelRows / 2), 1);
  }
  transpose_16(v);
  const __m512i low = _mm512_set1_epi8(15);
  constexpr int kChoose = 0xca;  // of the second where the first has ones, else of the third
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {  // two steps
    const __m512i a = v[j], b = v[8 + j];
    const __m512i even = _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi32(b, 4), kChoose);
    const __m512i odd = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(a, 4), b, kChoose);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(even, odd));
    const __m512 last = _mm512_castsi512_ps(_mm512_unpackhi_epi8(even, odd));
    uint8_t* out = quad_at(layout, panel, k + kQuadColumns * (j / 2)) + 2 * kLineBytes * (j % 2);
    _mm512_storeu_ps(out, _mm512_shuffle_ps(first, last, 0x88));
    _mm512_storeu_ps(out + kLineBytes, _mm512_shuffle_ps(first, last, 0xdd));
  }
}

constexpr int64_t kPanelPitch = kSpan + kSpanSlack;

// The codes of columns [begin, end), at most kSpan, of row n to `own`, with zeros behind those of
// W: a last group of fewer than 16 is filled up.
inline void write_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, uint8_t* own) {
  end = end < w.cols ? end : w.cols;
  const uint8_t* from = span_codes<Avx512Codes>(w, n, begin, end, own);
  if (from != own) __builtin_memcpy(own, from, static_cast<size_t>(end - begin));
  __builtin_memset(own + (end - begin), 0, kSpanSlack);
}

// Up to 16 bytes, with zeros up to 16 behind them; more bytes alone.
inline void copy_codes(const uint8_t* from, int64_t count, uint8_t* to) {
  if (count > kQuadColumns) return void(__builtin_memcpy(to, from, static_cast<size_t>(count)));
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_loadu_epi8(mask, from));
}

// The same of what columns [begin, end) of a panel hold, where groups are filled up.
inline void write_padded_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                              uint8_t* own) {
  constexpr int64_t kWholeBytes = 40;  // columns, after which codes of every width begin a byte
  alignas(64) uint8_t plain[kPanelPitch + kWholeBytes];
  const int64_t group = panel_group(w), size = w.group_size;
  int64_t g = begin / group, in = begin % group;  // of the next column
  const int64_t first = g * size + (in < size ? in : size);
  const int64_t wanted = first + (end - begin), last = wanted < w.cols ? wanted : w.cols;
  const int64_t from = first / kWholeBytes * kWholeBytes;
  __builtin_memset(own, 0, static_cast<size_t>(kPanelPitch));
  if (first >= last) return;
  const uint8_t* codes = span_codes<Avx512Codes>(w, n, from, last, plain);
  for (int64_t k = begin; k < end; ++g, in = 0) {
    const int64_t at = g * size + in, stop = at - in + size < w.cols ? at - in + size : w.cols;
    const int64_t left = end - k < group - in ? end - k : group - in;
    const int64_t count = stop - at < left ? stop - at : left;
    if (count > 0) copy_codes(codes + (at - from), count, own + (k - begin));
    k += left;
  }
}

// The same of 8 bits.
inline void write_bytes(const PanelLayout& layout, const uint8_t* codes, int64_t pitch, int64_t k,
                        uint8_t* panel) {
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {  // rows of a, rows of b
    __m512i v[kPanelRows / 2];
#pragma GCC unroll 16
    for (int i = 0; i < kPanelRows / 2; ++i) {
      v[i] = _mm512_loadu_si512(codes + (t * kPanelRows / 2 + i) * pitch);
    }
    transpose_16(v);
#pragma GCC unroll 16
    for (int s = 0; s < kPanelRows / 2; ++s) {
      uint8_t* out = quad_at(layout, panel, k + kQuadColumns * (s / 4));
      _mm512_storeu_si512(out + kLineBytes * (2 * (s % 4) + t), v[s]);
    }
  }
}

// Columns [0, result) of a whole panel from rows of W as they lie: whole blocks of 4 and 8 bits.
// Stores past the caches gained nothing into fresh memory.
int64_t write_blocks(const PackedMatrix& w, const PanelLayout& layout, int64_t first,
                     uint8_t* panel) {
  if ((w.levels != 16 && w.levels != 256) || moves_columns(w)) return 0;
  const int64_t pitch = packed_row_bytes(w.cols, w.levels);
  const uint8_t* codes = code_row(w, first);
  int64_t k = 0;
  for (; k + kLineBytes <= w.cols; k += kLineBytes) {
    if (w.levels == 16) {
      write_nibbles(layout, codes + k / 2, pitch, k, panel);
    } else {
      write_bytes(layout, codes + k, pitch, k, panel);
    }
  }
  return k;
}

// Panel p to `panel`.
void write_panel(const PackedMatrix& w, const PanelLayout& layout, int64_t p, uint8_t* panel) {
  alignas(64) uint8_t codes[kPanelRows * kPanelPitch];
  const int64_t first = p * kPanelRows, left = w.rows - first;
  const int64_t count = left < kPanelRows ? left : kPanelRows;
  write_heads(w, layout, first, count, panel);
  if (count < kPanelRows) __builtin_memset(codes, 0, sizeof(codes));
  const bool padded = moves_columns(w);
  const int64_t columns = panel_columns(w);
  int64_t k = count == kPanelRows ? write_blocks(w, layout, first, panel) : 0;
  for (; k < columns; k += kSpan) {
    const int64_t stop = columns - k < kSpan ? columns : k + kSpan;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* own = codes + i * kPanelPitch;
      padded ? write_padded_span(w, first + i, k, stop, own)
             : write_span(w, first + i, k, stop, own);
    }
    for (int64_t at = k; at < stop; at += kLineBytes) {
      write_panel_block(layout, codes + (at - k), kPanelPitch, at, panel);
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
