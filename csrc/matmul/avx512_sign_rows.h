// Included by avx512.cpp alone: rows of x for products by look-ups (sign_tables.h): 8-bit rows in
// the order of the columns of panels, and their tables.
#pragma once

#include "matmul/avx512_panel_rows.h"
#include "matmul/sign_tables.h"

namespace pyrobust::matmul {
namespace {

struct SignRows {
  int8_t* q;  // (rows, stride)
  int64_t stride, used;

  SignRows(void* data, const PackedMatrix& w, int64_t rows) : stride(panel_blocks(w) * kBlock) {
    Arena arena{static_cast<char*>(data)};
    q = arena.take<int8_t>(rows * stride);
    used = arena.used;
  }
};

// Rows `part` of the block [first, first + rows) of x. `scratch` has padded_rows_bytes().
void prepare_sign_rows(const PackedMatrix& w, const Activations& x, int64_t first, int64_t rows,
                       RowRange part, void* prepared, double* step, void* scratch) {
  const SignRows out(prepared, w, rows);
  const TileX all{static_cast<const char*>(x.data), x.type, w.cols};
  for (int64_t m = part.begin; m < part.end; ++m) {
    TileX own{all.row(first + m), x.type, w.cols};
    if (moves_columns(w)) own = padded_rows(w, own, 1, scratch);
    step[m] = step_of(own.data, own.type, 0, own.cols, 127.0);
    const Divisor by(step[m]);
    int8_t* row = out.q + m * out.stride;
    for (int64_t k = 0; k < out.stride; k += kBlock) {
      _mm512_storeu_si512(row + k, step[m] > 0.0 ? quantize_64(own.data, own.type, k, own.cols, by)
                                                 : _mm512_setzero_si512());
    }
  }
}

// For the 32 entries of a table: which two bytes of sixteen a word holds, and table_factor() of
// both; for three pairs of activations, of which the last has one, from a quarter of 16 on.
struct TableConstants {
  alignas(64) uint8_t place[kQuadTables][3][kLineBytes] = {};
  alignas(64) uint8_t factor[3][kLineBytes] = {};
  alignas(16) uint8_t order[kQuadColumns] = {};  // word_column()

  constexpr TableConstants() {
    for (int byte = 0; byte < kLineBytes; ++byte) {
      for (int pair = 0; pair < 3; ++pair) {
        const int j = 2 * pair + byte % 2;  // of the five; the sixth has no say
        for (int t = 0; t < kQuadTables; ++t) {
          place[t][pair][byte] = static_cast<uint8_t>(t * kTableColumns + j);
        }
        factor[pair][byte] =
            static_cast<uint8_t>(j < kTableColumns ? table_factor(byte / 2, j) : 0);
      }
    }
    for (int bit = 0; bit < kQuadColumns; ++bit)
      order[bit] = static_cast<uint8_t>(word_column(bit));
  }
};
constexpr TableConstants kTableConstants;

// Table t of 16 activations in the order of bits, which lie in every quarter of `q`.
__attribute__((always_inline)) inline __m512i sign_table(__m512i q, int t) {
  __m512i part[3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i two = _mm512_shuffle_epi8(q, _mm512_load_si512(kTableConstants.place[t][i]));
    part[i] = _mm512_maddubs_epi16(_mm512_load_si512(kTableConstants.factor[i]), two);
  }
  return _mm512_add_epi16(_mm512_add_epi16(part[0], part[1]), part[2]);
}

// What sums of a run are stored with on top, so that they are not negative.
constexpr int32_t kSumOffset = 1 << 15;

// The tables of a run of a row, `apart` registers from one another. Returns what its sums start
// from.
inline int16_t write_run_tables(const int8_t* q, int64_t quads, int64_t apart, __m512i* out) {
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kTableConstants.order));
  __m128i last = _mm_setzero_si128(), sum = last;  // last: bit 15 of each quad
  for (int64_t i = 0; i < quads; ++i, q += kQuadColumns) {
    const __m128i v = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), order);
    const __m512i all = _mm512_broadcast_i32x4(v);
    sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), v);
    last = _mm_alignr_epi8(last, v, kQuadColumns - 1);
#pragma GCC unroll 3
    for (int t = 0; t < kQuadTables; ++t, out += apart) _mm512_store_si512(out, sign_table(all, t));
  }
  for (int64_t i = 0; i < quads; i += kTableColumns, out += apart) {
    _mm512_store_si512(out, sign_table(_mm512_broadcast_i32x4(last), 0));
    last = _mm_srli_si128(last, kTableColumns);
  }
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return static_cast<int16_t>(kSumOffset - _mm_cvtsi128_si32(sum));
}

// Groups [from, to) of `rows` rows of x from `q` on: tables (tables of these groups, rows), and
// starts (runs, rows).
void write_tables(const PanelLayout& layout, const int8_t* q, int64_t stride, int64_t rows,
                  int64_t from, int64_t to, __m512i* out, int16_t* start) {
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* at = q + r * stride + from * layout.group_columns;
    __m512i* table = out + r;
    int16_t* own = start + r;
    for (int64_t g = from; g < to; ++g) {
      for (int64_t left = group_quads(layout, g); left > 0; left -= kRunQuads) {
        const int64_t quads = run_quads(left);
        *own = write_run_tables(at, quads, rows, table);
        at += quads * kQuadColumns;
        table += run_tables(quads) * rows;
        own += rows;
      }
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
