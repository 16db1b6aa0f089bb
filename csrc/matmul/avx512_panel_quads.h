// Included by avx512_panels.h: the product with a weight in panel order whose groups have up to 16
// columns, one to four of them in a quad (panels.h). What ends a group outweighs its products here,
// so that totals stay in registers. Codes are unpacked once, some quads at a time, to bytes that
// all rows of x meet:
//
//   bytes   a0 b0 a1 b1 a2 b2 a3 b3 of a quad, 64 each; a: rows 0..15 of the panel, b: rows 16..31
//
// In 8 bits the sums of a group and the order of groups are those of avx512_int8.h.
#pragma once

#include "matmul/avx512_make_panels.h"
#include "matmul/avx512_panel_results.h"
#include "matmul/avx512_panel_tile.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kQuadsAtOnce = 32;  // 16 KiB of bytes: they stay in the first cache
constexpr int64_t kQuadBytes = 8 * kLineBytes;

// Totals; the last tile has up to two rows more than x.
int64_t double_totals_bytes(int64_t rows) {
  return round_up(rows, kTileRows) * kPanelRows * static_cast<int64_t>(sizeof(double));
}

struct QuadScratch {
  double* total;   // (rows of x, 32)
  uint8_t* bytes;  // of some quads
  int64_t used;

  QuadScratch(void* memory, int64_t rows) {
    Arena arena{static_cast<char*>(memory)};
    total = reinterpret_cast<double*>(arena.take<char>(double_totals_bytes(rows)));
    bytes = arena.take<uint8_t>(kQuadsAtOnce * kQuadBytes);
    used = arena.used;
  }
};

// Codes of `quads` quads, the first at `codes`; codes of one bit as 0 and 2.
template <int kBits, bool kBook>
void unpack_quads(const uint8_t* codes, int64_t pitch, int64_t quads, __m512i table, uint8_t* out) {
  const int64_t ahead = panel_ahead();
  for (int64_t j = 0; j < quads; ++j, codes += pitch) {
    PanelQuad<kBits, kBook, true> quad;
    quad.load(codes);
    prefetch_lines(codes + ahead, pitch);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s, out += 2 * kLineBytes) {
      __m512i a, b;
      quad.step(s, table, &a, &b);
      if constexpr (kBits == 1 && !kBook) {
        a = _mm512_add_epi8(a, a);
      } else {
        b = _mm512_srli_epi16(b, PanelQuad<kBits, kBook>::kShift);
      }
      _mm512_store_si512(out, a);
      _mm512_store_si512(out + kLineBytes, b);
    }
  }
}

// A tile of x against groups [from, to) of a panel.
struct QuadTask {
  const PackedMatrix* weight;
  const PanelLayout* layout;
  const uint8_t* head;   // of the first group's quad
  const uint8_t* bytes;  // of that quad
  const int8_t* q;
  const PanelOffsets* offset;
  const double* step;
  int64_t from, to;
  double* total;
};

// Parts of row i put together, of eight rows of W: l counts through both halves. The first two fit
// in 32 bits: 16 * 255 * 2^15 < 2^31.
template <int kOut, int kParts>
__attribute__((always_inline)) inline __m512d quad_parts(const __m512i* sum, int i, int l) {
  const auto eight = [l](__m512i v) __attribute__((always_inline)) {
    return _mm512_cvtepi32_pd(l % 2 == 0 ? _mm512_castsi512_si256(v)
                                         : _mm512_extracti64x4_epi64(v, 1));
  };
  const int half = l / 2;
  if constexpr (kParts == 1) return eight(sum[2 * i + half]);
  const __m512i high = _mm512_slli_epi32(sum[2 * i + half], 8);
  __m512d all = eight(_mm512_add_epi32(high, sum[2 * (kOut + i) + half]));
#pragma GCC unroll 2
  for (int p = 2; p < kParts; ++p) {
    all = _mm512_fmadd_pd(all, _mm512_set1_pd(256.0), eight(sum[2 * (p * kOut + i) + half]));
  }
  return all;
}

template <int kRows, int kParts>
__attribute__((noinline)) void quad_tile(const QuadTask& task) {
  constexpr int kOut = kRows / kParts;
  const PackedMatrix& w = *task.weight;
  const PanelLayout& layout = *task.layout;
  const int64_t steps = 4 / layout.head_groups, scale_bytes = kPanelRows * layout.scale_bytes;
  const uint8_t *head = task.head, *bytes = task.bytes;
  const int8_t* q = task.q;
  const PanelOffsets* offset = task.offset;
  const double* step = task.step;
  __m512d total[4 * kOut];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kOut; ++i) total[i] = _mm512_load_pd(task.total + 8 * i);
  for (int64_t g = task.from, own = 0; g < task.to; ++g) {
    const uint8_t* zeros = head + layout.head_groups * scale_bytes + own * kPanelRows;
    __m512i sum[2 * kRows];
    start_sums<kRows, 0, false>(w.zero == nullptr ? nullptr : zeros, *offset, sum);
    for (int64_t s = 0; s < steps; ++s, bytes += 2 * kLineBytes, q += 4 * kRows) {
      const __m512i a = _mm512_load_si512(bytes), b = _mm512_load_si512(bytes + kLineBytes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, q + 4 * r, sizeof(four));
        const __m512i x = _mm512_set1_epi32(four);
        add_dots(sum[2 * r], a, x);
        add_dots(sum[2 * r + 1], b, x);
      }
    }
    __m512d scale[4];
    load_panel_scales<0>(w, head + own * scale_bytes, scale);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const __m512d factor =
            kParts == 1 ? scale[l] : _mm512_mul_pd(scale[l], _mm512_set1_pd(step[i]));
        total[4 * i + l] =
            _mm512_fmadd_pd(quad_parts<kOut, kParts>(sum, i, l), factor, total[4 * i + l]);
      }
    }
    ++offset;
    step += kTileRows;
    if (++own == layout.head_groups) {
      own = 0;
      head += layout.group_bytes;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kOut; ++i) _mm512_store_pd(task.total + 8 * i, total[i]);
}

void quad_tile_of(int64_t width, int parts, const QuadTask& task) {
  switch (8 * parts + width) {
    case 8 + 1:
      return quad_tile<1, 1>(task);
    case 8 + 2:
      return quad_tile<2, 1>(task);
    case 8 + 3:
      return quad_tile<3, 1>(task);
    case 8 + 4:
      return quad_tile<4, 1>(task);
    case 16 + 2:
      return quad_tile<2, 2>(task);
    case 16 + 4:
      return quad_tile<4, 2>(task);
    case 24 + 3:
      return quad_tile<3, 3>(task);
    default:
      return quad_tile<4, 4>(task);
  }
}

// Rows [rows.begin, rows.end) of W. Panels that nobody has made are made behind the scratch.
template <int kBits, bool kBook>
void multiply_quads(const PackedMatrix& w, Mode mode, const Block& block, RowRange rows,
                    const Output& out, void* scratch) {
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, mode);
  const QuadScratch s(scratch, block.rows);
  const __m512i table = codebook_table(w);
  for (int64_t p = rows.begin / kPanelRows; p * kPanelRows < rows.end; ++p) {
    const uint8_t* panel = panel_of(w, layout, p, static_cast<char*>(scratch) + s.used);
    __builtin_memset(s.total, 0, static_cast<size_t>(double_totals_bytes(x.rows)));
    for (int64_t quad = 0; quad < layout.groups; quad += kQuadsAtOnce) {
      const int64_t some =
          layout.groups - quad < kQuadsAtOnce ? layout.groups - quad : kQuadsAtOnce;
      const int64_t from = quad * layout.head_groups, to = from + some * layout.head_groups;
      const uint8_t* head = panel + quad * layout.group_bytes;
      unpack_quads<kBits, kBook>(head + layout.head_bytes, layout.group_bytes, some, table,
                                 s.bytes);
      for (int64_t m = 0; m < x.rows; m += x.x_rows()) {
        const int64_t width = x.width(m);
        quad_tile_of(width, x.parts,
                     {&w, &layout, head, s.bytes, x.tile(m) + quad * kQuadColumns * width,
                      x.offsets(m) + from, x.steps(m) + from * kTileRows, from,
                      to < x.groups ? to : x.groups, s.total + m * kPanelRows});
      }
    }
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x.rows, x.parts > 1 ? nullptr : block.step, first,
                     first > rows.begin ? first : rows.begin, stop < rows.end ? stop : rows.end,
                     s.total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
