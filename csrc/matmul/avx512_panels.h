// Included by avx512.cpp alone: the product with a weight in panel order (panels.h), for
// activations in 8 bits or in two parts of 8 bits. A lane is a row of W, so that no lanes are added
// up; x is broadcast four columns at a time against 32 rows of W. One kernel serves any number of
// rows of x, eight rows of bytes at a time: codes are unpacked in registers each time, which 16
// products an unpacked pair of registers hide.
//
// The sums of a group and the order of groups are those of avx512_int8.h, hence the same bits.
#pragma once

#include "matmul/avx512_panel_rows.h"

namespace pyrobust::matmul {
namespace {

// Columns of a panel that all rows of x meet before the next: 16 KiB at 8 bits stay in L1.
constexpr int64_t kPanelColumns = 512;
// Bytes ahead in the stream: past what the prefetcher of the processor does within a page.
constexpr int64_t kPanelAhead = 2048;

// The codes of 16 columns of a panel.
template <int kBits, bool kBook>
struct PanelQuad {
  __m512i raw[kBits];

  __attribute__((always_inline)) inline void load(const uint8_t* at) {
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i) raw[i] = _mm512_loadu_si512(at + kLineBytes * i);
  }

  // The bytes of step s whose lower 2 kBits bits are the codes of both halves of the panel.
  __attribute__((always_inline)) inline __m512i both(int s) const {
    if constexpr (kBits == 4) return raw[s];
    if constexpr (kBits == 2) return s % 2 == 0 ? raw[s / 2] : _mm512_srli_epi16(raw[s / 2], 4);
    if constexpr (kBits == 1) return s == 0 ? raw[0] : _mm512_srli_epi16(raw[0], 2 * s);
    if constexpr (kBits == 3) {
      if (s < 3) return raw[s];
      constexpr int kSelect = 0xe4;  // of the first where the third has ones, else of the second
      const __m512i four =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(raw[0], 6), _mm512_srli_epi16(raw[1], 4),
                                    _mm512_set1_epi8(0x03), kSelect);
      return _mm512_ternarylogic_epi32(four, _mm512_srli_epi16(raw[2], 2), _mm512_set1_epi8(0x0f),
                                       kSelect);
    }
    return raw[0];
  }

  // The codes, or entries of the codebook `table`, of rows 0..15, and of rows 16..31. Those of the
  // latter are 2^kShift times what they stand for.
  static constexpr int kShift = kBook || kBits == 8 ? 0 : kBits;
  __attribute__((always_inline)) inline void step(int s, __m512i table, __m512i* a,
                                                  __m512i* b) const {
    if constexpr (kBits == 8) {
      *a = raw[2 * s];
      *b = raw[2 * s + 1];
      return;
    }
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)), v = both(s);
    *a = _mm512_and_si512(v, mask);
    if constexpr (kBook) {
      *a = _mm512_shuffle_epi8(table, *a);
      *b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, kBits), mask));
    } else {
      *b = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << kBits)));
    }
  }
};

// sums[r * 32 + i] = the sum over `quads` times 16 columns of row i of the panel and row r of a
// tile of kRows rows of bytes. Few rows take several sums each: a product waits for the one before.
template <int kBits, bool kBook, int kRows>
__attribute__((always_inline)) inline void panel_group(const uint8_t* codes, const int8_t* q,
                                                       int64_t quads, __m512i table,
                                                       int32_t* sums) {
  using Quad = PanelQuad<kBits, kBook>;
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  __m512i sum[kChains * kRows * 2];
#pragma GCC unroll 16
  for (int i = 0; i < kChains * kRows * 2; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t j = 0; j < quads; ++j) {
    Quad quad;
    quad.load(codes);
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i) {
      const auto* ahead = reinterpret_cast<const char*>(codes) + kPanelAhead + kLineBytes * i;
      _mm_prefetch(ahead, _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      __m512i a, b;
      quad.step(s, table, &a, &b);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, q + 4 * (s * kRows + r), sizeof(four));
        const __m512i x = _mm512_set1_epi32(four);
        const int at = (s % kChains * kRows + r) * 2;
        add_dots(sum[at], a, x);
        add_dots(sum[at + 1], b, x);
      }
    }
    codes += kBits * kLineBytes;
    q += kQuadColumns * kRows;
  }
  constexpr bool kDouble = kBits == 1 && !kBook;  // one bit stands for -1 and 1
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __m512i a = sum[2 * r], b = sum[2 * r + 1];
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) {
      a = _mm512_add_epi32(a, sum[(c * kRows + r) * 2]);
      b = _mm512_add_epi32(b, sum[(c * kRows + r) * 2 + 1]);
    }
    if constexpr (kDouble) a = _mm512_add_epi32(a, a);
    if constexpr (Quad::kShift > 0 && !kDouble) b = _mm512_srai_epi32(b, Quad::kShift);
    _mm512_store_si512(sums + kPanelRows * r, a);
    _mm512_store_si512(sums + kPanelRows * r + kLanes, b);
  }
}

// What a tile of x meets: a panel, its groups [from, to), and the totals (rows, 32) of the tile.
struct PanelTask {
  const PackedMatrix* weight;
  const PanelLayout* layout;
  const uint8_t* panel;
  const PanelRows* x;
  int64_t m;  // the tile's first row
  int64_t from, to;
  double* total;
};

// Scale and zero of a group, in registers.
struct PanelLanes {
  __m512d scale[4];
  __m512i zero[2];

  PanelLanes(const PackedMatrix& w, const PanelLayout& layout, const uint8_t* head) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      __m512 lanes;
      if (w.row_scale != nullptr) {
        const auto* bytes = reinterpret_cast<const __m128i*>(head + kLanes * t);
        lanes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
      } else {
        lanes = load_floats(head, w.scale_type, kLanes * t, 0xffff);
      }
      scale[2 * t] = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
      scale[2 * t + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1));
      if (w.zero == nullptr) continue;
      const uint8_t* zeros = head + kPanelRows * layout.scale_bytes + kLanes * t;
      zero[t] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    }
  }
};

// sums - zero q_sum; without zeros `q_sum` comes multiplied (PanelRows).
template <bool kZeros>
inline __m512i less_offset(const int32_t* sums, __m512i zero, int32_t q_sum) {
  __m512i offset = _mm512_set1_epi32(q_sum);
  if constexpr (kZeros) offset = _mm512_mullo_epi32(offset, zero);
  return _mm512_sub_epi32(_mm512_load_si512(sums), offset);
}

// total += scale * (sums - zero q_sum) of one row of x; the products are exact.
template <bool kZeros>
__attribute__((always_inline)) inline void scale_panel_sums(const PanelLanes& lanes, int32_t q_sum,
                                                            const int32_t* sums, double* total) {
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    const __m512i exact = less_offset<kZeros>(sums + kLanes * t, lanes.zero[t], q_sum);
    add_lanes(exact, lanes.scale + 2 * t, total + kLanes * t);
  }
}

// Group g of a tile of one row of x, for weights without zeros.
__attribute__((always_inline)) inline void scale_panel_row(const PanelTask& task, int64_t g,
                                                           const uint8_t* head,
                                                           const int32_t* sums) {
  const PanelRows& x = *task.x;
  scale_panel_sums<false>(PanelLanes(*task.weight, *task.layout, head),
                          x.q_sum[task.m * x.groups + g], sums, task.total);
}

template <bool kZeros>
void scale_panel_rows(const PanelTask& task, int64_t g, const uint8_t* head, const int32_t* sums) {
  const PanelLanes lanes(*task.weight, *task.layout, head);
  const PanelRows& x = *task.x;
  const int32_t* q_sum = x.q_sum + task.m * x.groups + g;
  double* total = task.total;
  for (int64_t i = x.rows_at(task.m); i > 0; --i) {
    scale_panel_sums<kZeros>(lanes, *q_sum, sums, total);
    q_sum += x.groups;
    total += kPanelRows;
    sums += kPanelRows;
  }
}

// The same of two parts: total += scale step (256 high + low). kNarrow: is_narrow().
template <bool kZeros, bool kNarrow>
void scale_panel_parts(const PanelTask& task, int64_t g, const uint8_t* head, const int32_t* sums) {
  const PanelLanes lanes(*task.weight, *task.layout, head);
  const PanelRows& x = *task.x;
  const int64_t count = x.rows_at(task.m);
  const int32_t* q_sum = x.q_sum + 2 * task.m * x.groups + g;
  const double* step = x.step + task.m * x.groups + g;
  double* total = task.total;
  for (int64_t i = 0; i < count; ++i) {
    const __m512d own = _mm512_set1_pd(*step);
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const int32_t *upper = sums + i * kPanelRows + kLanes * t,
                    *lower = upper + count * kPanelRows;
      const __m512i high = less_offset<kZeros>(upper, lanes.zero[t], q_sum[0]);
      const __m512i low = less_offset<kZeros>(lower, lanes.zero[t], q_sum[x.groups]);
      add_lanes_of_parts<kNarrow>(high, low, own, lanes.scale + 2 * t, total + kLanes * t);
    }
    q_sum += 2 * x.groups;
    step += x.groups;
    total += kPanelRows;
  }
}

using ScalePanel = void (*)(const PanelTask& task, int64_t g, const uint8_t* head,
                            const int32_t* sums);

ScalePanel panel_scaling(const PackedMatrix& w, int parts) {
  const bool zeros = w.zero != nullptr;
  if (parts == 1) return zeros ? scale_panel_rows<true> : scale_panel_rows<false>;
  if (is_narrow(w)) return zeros ? scale_panel_parts<true, true> : scale_panel_parts<false, true>;
  return zeros ? scale_panel_parts<true, false> : scale_panel_parts<false, false>;
}

// One tile of x, of kRows rows of bytes.
template <int kBits, bool kBook, int kRows>
void panel_tile(const PanelTask& task, ScalePanel scale) {
  const PanelLayout& layout = *task.layout;
  const __m512i table = codebook_table(*task.weight);
  const uint8_t* head = task.panel + task.from * layout.group_bytes;
  const int8_t* q = task.x->tile(task.m) + task.from * layout.group_columns * kRows;
  alignas(64) int32_t sums[kRows * kPanelRows];
  const bool zeros = task.weight->zero != nullptr;
  for (int64_t g = task.from; g < task.to; ++g) {
    const int64_t left = layout.columns - g * layout.group_columns;
    const int64_t columns = left < layout.group_columns ? left : layout.group_columns;
    panel_group<kBits, kBook, kRows>(head + layout.head_bytes, q, columns / kQuadColumns, table,
                                     sums);
    // Without a call, which takes a tenth off one row of x.
    if (kRows == 1 && !zeros) {
      scale_panel_row(task, g, head, sums);
    } else {
      scale(task, g, head, sums);
    }
    head += layout.group_bytes;
    q += layout.group_columns * kRows;
  }
}

template <int kBits, bool kBook>
void panel_tile_of(int64_t width, const PanelTask& task, ScalePanel scale) {
  switch (width) {
    case 1:
      return panel_tile<kBits, kBook, 1>(task, scale);
    case 2:
      return panel_tile<kBits, kBook, 2>(task, scale);
    case 3:
      return panel_tile<kBits, kBook, 3>(task, scale);
    case 4:
      return panel_tile<kBits, kBook, 4>(task, scale);
    case 6:
      return panel_tile<kBits, kBook, 6>(task, scale);
    default:
      return panel_tile<kBits, kBook, 8>(task, scale);
  }
}

// Results of rows [begin, end) of W, within the panel from row `first` on, from their totals.
void store_panel_rows(const Output& out, const PanelRows& x, const double* step, int64_t first,
                      int64_t begin, int64_t end, const double* total) {
  for (int64_t m = 0; m < x.rows; ++m, total += kPanelRows) {
    const double factor = x.parts == 2 ? 1.0 : step[m];
    int64_t n = begin;
    for (; out.remainder == nullptr && n + kLanes <= end; n += kLanes) {
      store_16(out, m, n, total + (n - first), factor);
    }
    for (; n < end; ++n) store_result(out, m, n, total[n - first], factor);
  }
}

template <int kBits, bool kBook>
void multiply_panel_order(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                          int64_t end, const Output& out, void* scratch) {
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, mode);
  const ScalePanel scale = panel_scaling(w, x.parts);
  auto* total = static_cast<double*>(scratch);
  const int64_t some = layout.group_columns > 0 ? kPanelColumns / layout.group_columns : 1;
  const int64_t chunk = x.rows <= x.x_rows() ? layout.groups : some > 0 ? some : 1;
  for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
    __builtin_memset(total, 0, static_cast<size_t>(x.rows * kPanelRows) * sizeof(double));
    PanelTask task{&w, &layout, w.panels + p * layout.panel_bytes, &x, 0, 0, 0, nullptr};
    for (; task.from < layout.groups; task.from = task.to) {
      task.to = layout.groups - task.from < chunk ? layout.groups : task.from + chunk;
      for (task.m = 0; task.m < x.rows; task.m += x.x_rows()) {
        task.total = total + task.m * kPanelRows;
        panel_tile_of<kBits, kBook>(x.width(task.m), task, scale);
      }
    }
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x, block.step, first, first > begin ? first : begin,
                     stop < end ? stop : end, total);
  }
}

int64_t panel_scratch_bytes(int64_t rows) {
  return rows * kPanelRows * static_cast<int64_t>(sizeof(double));
}

}  // namespace
}  // namespace pyrobust::matmul
