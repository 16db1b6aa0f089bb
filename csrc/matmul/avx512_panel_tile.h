// Included by avx512.cpp alone: one tile of x against one panel of W.
#pragma once

#include "matmul/avx512_panel_pending.h"

namespace pyrobust::matmul {
namespace {

// Sums of the second half of a panel are 2 to this power times what they stand for; one bit, which
// stands for -1 and 1, has codes 0 and 2 there.
template <int kBits, bool kBook>
constexpr int second_half_shift() {
  return kBits == 1 ? 0 : PanelQuad<kBits, kBook>::kShift;
}

// `sum` at the start of a group: minus the zero times the sum of x, for the lanes of both halves,
// those of the second times 2^kShift. A group of one bit has -1 and 1 for codes: its first half is
// doubled at the end, and starts from 0.
template <int kRows, int kShift, bool kDouble>
__attribute__((always_inline)) inline void start_sums(const uint8_t* zeros,
                                                      const PanelOffsets& offset, __m512i* sum) {
  if (zeros != nullptr) {
    const auto* bytes = reinterpret_cast<const __m128i*>(zeros);
    const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
    const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + 1));
    const __m512i shifted = _mm512_slli_epi32(second, kShift);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(offset.first[r]);
      sum[2 * r] = _mm512_mullo_epi32(first, x);
      sum[2 * r + 1] = _mm512_mullo_epi32(shifted, x);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sum[2 * r] = kDouble ? _mm512_setzero_si512() : _mm512_set1_epi32(offset.first[r]);
    sum[2 * r + 1] = _mm512_set1_epi32(offset.second[r]);
  }
}

// The same of kParts parts of kX rows of which store_sums() joins the two highest: what the highest
// would start from goes to the next.
template <int kX, int kParts, int kShift>
__attribute__((always_inline)) inline void start_joined_sums(const uint8_t* zeros,
                                                             const PanelOffsets& offset,
                                                             __m512i* sum) {
  const auto* bytes = reinterpret_cast<const __m128i*>(zeros);
  const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
  const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + 1));
  const __m512i shifted = _mm512_slli_epi32(second, kShift);
#pragma GCC unroll 8
  for (int r = 0; r < kX; ++r) sum[2 * r] = sum[2 * r + 1] = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int r = kX; r < kX * kParts; ++r) {
    const int32_t higher = r < 2 * kX ? 256 * offset.first[r - kX] : 0;
    const __m512i x = _mm512_set1_epi32(higher + offset.first[r]);
    sum[2 * r] = _mm512_mullo_epi32(first, x);
    sum[2 * r + 1] = _mm512_mullo_epi32(shifted, x);
  }
}

// The sums of a tile to memory. `joins`: 256 times the highest part plus the next in the place of
// the former, none in that of the latter.
template <int kX, int kParts>
__attribute__((always_inline)) inline void store_sums(const __m512i* sum, bool joins,
                                                      int32_t* out) {
  constexpr int kAll = 2 * kX * kParts;
  if constexpr (kParts > 1) {
    if (joins) {
#pragma GCC unroll 8
      for (int i = 0; i < 2 * kX; ++i) {
        const __m512i high = _mm512_slli_epi32(sum[i], 8);
        _mm512_store_si512(out + kLanes * i, _mm512_add_epi32(high, sum[2 * kX + i]));
      }
#pragma GCC unroll 8
      for (int i = 4 * kX; i < kAll; ++i) _mm512_store_si512(out + kLanes * i, sum[i]);
      return;
    }
  }
  (void)joins;
#pragma GCC unroll 16
  for (int i = 0; i < kAll; ++i) _mm512_store_si512(out + kLanes * i, sum[i]);
}

// Codes of 16 columns against kRows rows of bytes: `sum` has kChains times kRows pairs.
template <int kBits, bool kBook, int kRows, int kChains>
__attribute__((always_inline)) inline void add_quad(const uint8_t* codes, const int8_t* q,
                                                    __m512i table, int64_t ahead, __m512i* sum) {
  PanelQuad<kBits, kBook, (kRows > 2 || kBits == 3 || kBits == 8)> quad;
  quad.load(codes);
  prefetch_lines(codes + ahead, kBits * kLineBytes);
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
}

// The streams that a tile of kRows rows of bytes reads, at the beginning of a group.
template <int kBits, bool kBook, int kRows>
struct PanelStreams {
  static constexpr bool kDouble = kBits == 1 && !kBook;  // codes of one bit stand for -1 and 1
  static constexpr int kShift = second_half_shift<kBits, kBook>();

  const PackedMatrix& w;
  const PanelLayout& layout;
  const uint8_t* head;
  const int8_t* q;
  const PanelOffsets* offset;
  const double* step;
  int64_t columns;  // left

  explicit PanelStreams(const PanelTask& task)
      : w(*task.weight),
        layout(*task.layout),
        head(task.panel + task.from * layout.group_bytes),
        q(task.x->tile(task.m) + task.from * layout.group_columns * kRows),
        offset(task.x->offsets(task.m) + task.from),
        step(task.x->steps(task.m) + task.from * kTileRows),
        columns(layout.columns - task.from * layout.group_columns) {}

  int64_t quads() const {  // at least two
    return (columns < layout.group_columns ? columns : layout.group_columns) / kQuadColumns;
  }
  const uint8_t* codes() const { return head + layout.head_bytes; }

  const uint8_t* zeros() const {
    return w.zero == nullptr ? nullptr : head + kPanelRows * layout.scale_bytes;
  }

  __attribute__((always_inline)) inline void start(__m512i* sum) const {
    start_sums<kRows, kShift, kDouble>(zeros(), *offset, sum);
  }

  // Sums of one bit, of codes 0 and 1 in the first half and 0 and 2 in the second, as of -1 and 1.
  __attribute__((always_inline)) inline void finish(__m512i* sum) const {
    if constexpr (!kDouble) return;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i start = _mm512_set1_epi32(offset->first[r]);
      sum[2 * r] = _mm512_add_epi32(_mm512_add_epi32(sum[2 * r], sum[2 * r]), start);
    }
  }

  __attribute__((always_inline)) inline void next() {
    head += layout.group_bytes;
    q += layout.group_columns * kRows;
    columns -= layout.group_columns;
    ++offset;
    step += kTileRows;
  }
};

// One tile of x. Up to four rows of bytes take two sums each, as a product waits for the one
// before.
template <int kBits, bool kBook, int kRows, int kParts>
__attribute__((noinline)) void panel_tile(const PanelTask& task) {
  constexpr int kChains = kRows <= 4 ? 2 : 1, kSums = 2 * kRows * kChains;
  PanelStreams<kBits, kBook, kRows> from(task);
  constexpr int kShift = from.kShift, kX = kRows / kParts;
  PanelPending& pending = *task.pending;
  const bool joins = kParts > 1 && task.narrow;
  const __m512i table = codebook_table(from.w);
  const int64_t ahead = panel_ahead();
  for (int64_t g = task.from; g < task.to; ++g) {
    const int64_t quads = from.quads(), rows_a_quad = quads >= kTileRows ? 1 : quads >= 4 ? 2 : 4;
    const uint8_t* codes = from.codes();
    const int8_t* q = from.q;
    __m512i sum[kSums];
    __m512d scale[4];
    if (joins && from.w.zero != nullptr) {
      start_joined_sums<kX, kParts, kShift>(from.zeros(), *from.offset, sum);
    } else {
      from.start(sum);
    }
#pragma GCC unroll 16
    for (int i = 2 * kRows; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
    if (pending.rows > 0) load_panel_scales<kShift>(from.w, pending.head, scale);
    for (int64_t j = 0, row = 0; j < quads; ++j) {
      add_quad<kBits, kBook, kRows, kChains>(codes, q, table, ahead, sum);
      codes += kBits * kLineBytes;
      q += kQuadColumns * kRows;
      if (row < pending.rows) {
        const int64_t stop = row + rows_a_quad < pending.rows ? row + rows_a_quad : pending.rows;
        add_pending<kParts>(task, scale, row, stop);
        row = stop;
      }
    }
#pragma GCC unroll 16
    for (int i = 2 * kRows; i < kSums; ++i) {
      sum[i % (2 * kRows)] = _mm512_add_epi32(sum[i % (2 * kRows)], sum[i]);
    }
    from.finish(sum);
    store_sums<kX, kParts>(sum, joins, pending.sums);
    pending.head = from.head;
    pending.step = from.step;
    pending.total = task.total;
    pending.rows = kX;
    from.next();
  }
}

template <int kBits, bool kBook>
void panel_tile_of(int64_t width, const PanelTask& task) {
  for_width(width, [&](auto rows) { panel_tile<kBits, kBook, decltype(rows)::kNumber, 1>(task); });
}

}  // namespace
}  // namespace pyrobust::matmul
