// Included by avx512.cpp alone: products of activations in 8 bits with a weight in panel order
// whose group scales are integers (two-level scales). Totals T of rows of up to kMostIntegerColumns
// columns stay in int32 until the end. Partial sums may pass 2^31 and wrap around, which leaves T
// as it is. Longer rows take the double totals of avx512_panels.h, which are the same integers.
//
// Some rows of x: the sums of a group times its integer, in registers, are added to the totals.
// Many, where code times scale fits in a byte (panel_folds()): 512 columns are folded to bytes
// once, with the first tile of x, and for the others groups have no end at all:
//
//   T = sum over k of q (scale code)  -  sum over groups of (scale zero) * (sum of q in the group)
//
// The latter sum is what totals start from: two groups are one `vpdpwssd` of 16-bit words where
// sums of q fit in these.
#pragma once

#include "matmul/avx512_panel_tile.h"

namespace pyrobust::matmul {
namespace {
constexpr int64_t kFoldedColumns = 512;   // 16 KiB of bytes: they stay in the first cache
constexpr int64_t kLeastFoldedRows = 48;  // 32 rows of x take as long either way
constexpr int64_t kPairedColumns = 256;   // 256 * 127 < 2^15

bool takes_integer_totals(const PackedMatrix& w, Mode mode) {
  return mode == Mode::kInt8 && w.row_scale != nullptr && w.cols <= kMostIntegerColumns &&
         !has_quad_groups(w);
}

struct IntegerScratch {
  int32_t* total;   // (rows of x, 32)
  uint8_t* folded;  // 512 columns of a panel, as codes of 8 bits
  int32_t* zeros;   // per two groups: 32 rows of 16-bit pairs; or per group, 32 rows
  int64_t used;

  IntegerScratch(void* memory, const PackedMatrix& w, int64_t rows) {
    Arena arena{static_cast<char*>(memory)};
    total = arena.take<int32_t>(round_up(rows, kTileRows) * kPanelRows);
    folded = arena.take<uint8_t>(kFoldedColumns * kPanelRows);
    zeros = arena.take<int32_t>(groups_of(w) * kPanelRows);
    used = arena.used;
  }
};

// The integer scales of sixteen rows of a group.
inline __m512i integer_scales(const uint8_t* head, int t) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(head + kLanes * t)));
}

// Groups [task.from, task.to) of one tile: total += scale * (sums of the group).
template <int kBits, bool kBook, int kRows>
__attribute__((noinline)) void integer_tile(const PanelTask& task, int32_t* total) {
  constexpr int kChains = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1, kSums = 2 * kRows * kChains;
  PanelStreams<kBits, kBook, kRows> from(task);
  const __m512i table = codebook_table(from.w);
  const int64_t ahead = panel_ahead();
  for (int64_t g = task.from; g < task.to; ++g) {
    const int64_t quads = from.quads();
    const uint8_t* codes = from.codes();
    const int8_t* q = from.q;
    __m512i sum[kSums];
    from.start(sum);
#pragma GCC unroll 16
    for (int i = 2 * kRows; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
    for (int64_t j = 0; j < quads; ++j) {
      add_quad<kBits, kBook, kRows, kChains>(codes, q, table, ahead, sum);
      codes += kBits * kLineBytes;
      q += kQuadColumns * kRows;
    }
#pragma GCC unroll 16
    for (int i = 2 * kRows; i < kSums; ++i) {
      sum[i % (2 * kRows)] = _mm512_add_epi32(sum[i % (2 * kRows)], sum[i]);
    }
    from.finish(sum);
    const __m512i scale[2] = {integer_scales(from.head, 0), integer_scales(from.head, 1)};
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kRows; ++i) {
      const __m512i exact =
          i % 2 == 0 ? sum[i] : _mm512_srai_epi32(sum[i], static_cast<unsigned>(from.kShift));
      int32_t* at = total + kLanes * i;
      _mm512_store_si512(
          at, _mm512_add_epi32(_mm512_load_si512(at), _mm512_mullo_epi32(exact, scale[i % 2])));
    }
    from.next();
  }
}

template <int kBits, bool kBook>
void integer_tile_of(int64_t width, const PanelTask& task, int32_t* total) {
  for_width(width,
            [&](auto rows) { integer_tile<kBits, kBook, decltype(rows)::kNumber>(task, total); });
}

// --- scales folded into codes -------------------------------------------------------------------

// Four columns of kRows rows of x times those of both halves of a panel.
template <int kRows>
__attribute__((always_inline)) inline void add_tile_step(__m512i a, __m512i b, const int8_t* q,
                                                         __m512i* sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t four;
    __builtin_memcpy(&four, q + 4 * r, sizeof(four));
    const __m512i x = _mm512_set1_epi32(four);
    add_dots(sum[2 * r], a, x);
    add_dots(sum[2 * r + 1], b, x);
  }
}

// Whether scale times code fits in a byte, for all groups of a panel.
bool panel_folds(const PackedMatrix& w, const PanelLayout& layout, const uint8_t* panel) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t g = 0; g < layout.groups; ++g) {
    const auto* scales = reinterpret_cast<const __m256i*>(panel + g * layout.group_bytes);
    largest = _mm256_max_epu8(largest, _mm256_loadu_si256(scales));
  }
  alignas(32) uint8_t each[kPanelRows];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), largest);
  int most = 0;
  for (const uint8_t scale : each) most = scale > most ? scale : most;
  return most * (w.levels - 1) <= 255;
}

// Columns [from, to), whole quads, of a panel: scale times code to `out`, as codes of 8 bits. Two
// bytes are one product of 16 bits, in which neither carries over. They meet the first tile of x,
// eight rows, on the way: total += their products.
template <int kBits>
__attribute__((noinline)) void fold_columns(const PanelLayout& layout, const uint8_t* panel,
                                            const int8_t* q, int64_t from, int64_t to, uint8_t* out,
                                            int32_t* total) {
  constexpr int kRows = kTileRows;
  const __m512i twice = _mm512_set1_epi32(0x10001);
  const int64_t ahead = panel_ahead();
  __m512i sum[2 * kRows];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) sum[i] = _mm512_load_si512(total + kLanes * i);
  for (int64_t k = from; k < to;) {
    const int64_t g = k / layout.group_columns, begin = g * layout.group_columns;
    const int64_t end = begin + layout.group_columns < to ? begin + layout.group_columns : to;
    const uint8_t* head = panel + g * layout.group_bytes;
    const uint8_t* codes = head + layout.head_bytes + layout.code_bytes(k - begin);
    const __m512i first = _mm512_mullo_epi32(integer_scales(head, 0), twice);
    const __m512i second = _mm512_mullo_epi32(integer_scales(head, 1), twice);
    for (; k < end; k += kQuadColumns, codes += kBits * kLineBytes) {
      PanelQuad<kBits, false, true> quad;
      quad.load(codes);
      prefetch_lines(codes + ahead, kBits * kLineBytes);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s, out += 2 * kLineBytes, q += 4 * kRows) {
        __m512i a, b;
        quad.step(s, first, &a, &b);
        a = _mm512_mullo_epi16(a, first);
        b = _mm512_mullo_epi16(_mm512_srli_epi16(b, PanelQuad<kBits, false>::kShift), second);
        _mm512_store_si512(out, a);
        _mm512_store_si512(out + kLineBytes, b);
        add_tile_step<kRows>(a, b, q, sum);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) _mm512_store_si512(total + kLanes * i, sum[i]);
}

// Scale times zero of every group; of two groups as 16-bit words where `paired`.
void load_zero_products(const PackedMatrix& w, const PanelLayout& layout, const uint8_t* panel,
                        bool paired, int32_t* out) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const uint8_t* head = panel + g * layout.group_bytes;
    int32_t* at = out + (paired ? g / 2 : g) * kPanelRows;
    for (int t = 0; t < 2; ++t) {
      __m512i zero = _mm512_set1_epi32(symmetric_zero(w));
      if (w.zero != nullptr) zero = integer_scales(head + kPanelRows * layout.scale_bytes, t);
      __m512i product = _mm512_mullo_epi32(zero, integer_scales(head, t));
      if (paired && g % 2 == 1) {
        product =
            _mm512_or_si512(_mm512_slli_epi32(product, 16), _mm512_load_si512(at + kLanes * t));
      }
      _mm512_store_si512(at + kLanes * t, product);
    }
  }
}

// Minus the sums of x of a group, for the tile's rows: its offsets hold them times this.
int offset_shift(const PackedMatrix& w) {
  return w.zero != nullptr ? 0 : __builtin_ctz(static_cast<unsigned>(symmetric_zero(w)));
}

// sum += two products of 16-bit words; an asm statement as add_dots() is.
inline void add_pairs(__m512i& sum, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// total = minus the sum over groups of scale zero (sum of x).
template <int kRows, bool kPaired>
__attribute__((noinline)) void start_totals(const PanelOffsets* offset, int64_t groups, int shift,
                                            const int32_t* zeros, int32_t* total) {
  __m512i sum[2 * kRows];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) sum[i] = _mm512_setzero_si512();
  const auto sums_of = [&](int64_t g) {
    const auto* from = reinterpret_cast<const __m256i*>(offset[g].first);
    return _mm256_srai_epi32(_mm256_load_si256(from), shift);
  };
  const __m256i low = _mm256_set1_epi32(0xffff);
  for (int64_t g = 0; g < groups; g += kPaired ? 2 : 1, zeros += kPanelRows) {
    __m256i own = sums_of(g);
    if constexpr (kPaired) {
      own = _mm256_and_si256(own, low);
      if (g + 1 < groups) own = _mm256_or_si256(own, _mm256_slli_epi32(sums_of(g + 1), 16));
    }
    const __m512i x = _mm512_castsi256_si512(own);
    const __m512i a = _mm512_load_si512(zeros), b = _mm512_load_si512(zeros + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i all = _mm512_permutexvar_epi32(_mm512_set1_epi32(r), x);
      if constexpr (kPaired) {
        add_pairs(sum[2 * r], a, all);
        add_pairs(sum[2 * r + 1], b, all);
      } else {
        sum[2 * r] = _mm512_add_epi32(sum[2 * r], _mm512_mullo_epi32(a, all));
        sum[2 * r + 1] = _mm512_add_epi32(sum[2 * r + 1], _mm512_mullo_epi32(b, all));
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) _mm512_store_si512(total + kLanes * i, sum[i]);
}

// total += `quads` quads of folded bytes times a tile of x.
template <int kRows>
__attribute__((noinline)) void folded_tile(const uint8_t* codes, const int8_t* q, int64_t quads,
                                           int32_t* total) {
  __m512i sum[2 * kRows];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) sum[i] = _mm512_load_si512(total + kLanes * i);
  for (int64_t j = 0; j < 4 * quads; ++j, codes += 2 * kLineBytes, q += 4 * kRows) {
    add_tile_step<kRows>(_mm512_load_si512(codes), _mm512_load_si512(codes + kLineBytes), q, sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) _mm512_store_si512(total + kLanes * i, sum[i]);
}

template <int kBits>
void multiply_folded(PanelTask task, const IntegerScratch& s) {
  const PackedMatrix& w = *task.weight;
  const PanelLayout& layout = *task.layout;
  const PanelRows& x = *task.x;
  const bool paired = layout.group_columns <= kPairedColumns;
  load_zero_products(w, layout, task.panel, paired, s.zeros);
  for (task.m = 0; task.m < x.rows; task.m += x.x_rows()) {
    for_width(x.width(task.m), [&](auto rows) {
      constexpr int kRows = decltype(rows)::kNumber;
      const auto start = paired ? start_totals<kRows, true> : start_totals<kRows, false>;
      start(x.offsets(task.m), layout.groups, offset_shift(w), s.zeros,
            s.total + task.m * kPanelRows);
    });
  }
  for (int64_t k = 0; k < layout.columns; k += kFoldedColumns) {
    const int64_t to = layout.columns - k < kFoldedColumns ? layout.columns : k + kFoldedColumns;
    fold_columns<kBits>(layout, task.panel, x.tile(0) + k * kTileRows, k, to, s.folded, s.total);
    for (task.m = kTileRows; task.m < x.rows; task.m += kTileRows) {
      for_width(x.width(task.m), [&](auto rows) {
        constexpr int kRows = decltype(rows)::kNumber;
        folded_tile<kRows>(s.folded, x.tile(task.m) + k * kRows, (to - k) / kQuadColumns,
                           s.total + task.m * kPanelRows);
      });
    }
  }
}

// Totals of one panel.
template <int kBits, bool kBook>
void multiply_integer_panel(PanelTask task, const IntegerScratch& s) {
  const PanelRows& x = *task.x;
  if constexpr (!kBook && kBits > 1 && kBits < 8) {
    if (x.rows >= kLeastFoldedRows && panel_folds(*task.weight, *task.layout, task.panel)) {
      return multiply_folded<kBits>(task, s);
    }
  }
  __builtin_memset(s.total, 0, static_cast<size_t>(round_up(x.rows, kTileRows) * kPanelRows * 4));
  const int64_t some =
      task.layout->group_columns > 0 ? kFoldedColumns / task.layout->group_columns : 1;
  const int64_t chunk = x.rows <= kTileRows ? task.layout->groups : some > 0 ? some : 1;
  for (; task.from < task.layout->groups; task.from = task.to) {
    task.to = task.layout->groups - task.from < chunk ? task.layout->groups : task.from + chunk;
    for (task.m = 0; task.m < x.rows; task.m += x.x_rows()) {
      integer_tile_of<kBits, kBook>(x.width(task.m), task, s.total + task.m * kPanelRows);
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
