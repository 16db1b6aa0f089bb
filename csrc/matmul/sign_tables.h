// Internal: one bit by table look-ups. The 32 sums that five 8-bit activations have, each with a
// sign of its own, are a table, and five weights of a row of W are the index of their sum. One
// look- up of 32 words serves 32 rows of W, 160 products.
//
//   word     16 columns of a row of W, a quad of the panel order (panels.h), column word_column(b)
//            in bit b: three indices, bits 0..4, 5..9 and 10..14
//   run      up to 16 quads of a group: their words, then one with bit 15 of each, that of the last
//            quad in bit 0; it holds an index for each five quads
//   table    entry i of five activations: the sum of 2 q_j over the ones of i, j counting from bit
//   0
//
// Sums of a run start from minus the sum of its activations, so that ones stand for 1 and zeros for
// -1. They fit 16 bits: at most 256 * 128; what passes that on the way wraps around and comes back.
#pragma once

#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kTableColumns = 5;
constexpr int64_t kTableWords = 32;
constexpr int64_t kQuadTables = 3;  // whole ones of a quad
constexpr int64_t kRunQuads = 16;

constexpr int word_column(int bit) { return 4 * ((bit & 7) >> 1) + (bit >> 3) + 2 * (bit & 1); }

constexpr int16_t table_factor(int entry, int j) { return (entry >> j & 1) != 0 ? 2 : 0; }

// Of `columns` columns of a group, whole quads, or of a run of `quads` quads.
constexpr int64_t run_tables(int64_t quads) {
  return kQuadTables * quads + (quads + kTableColumns - 1) / kTableColumns;
}
inline int64_t group_runs(int64_t columns) { return ceil_div(columns, kRunQuads * kQuadColumns); }
inline int64_t group_words(int64_t columns) { return columns / kQuadColumns + group_runs(columns); }
inline int64_t group_tables(int64_t columns) {
  const int64_t quads = columns / kQuadColumns;
  return quads / kRunQuads * run_tables(kRunQuads) + run_tables(quads % kRunQuads);
}

inline int64_t group_quads(const PanelLayout& layout, int64_t g) {
  return layout.columns_of(g) / kQuadColumns;
}
// Of the next run, where so many quads of a group are left.
constexpr int64_t run_quads(int64_t left) { return left < kRunQuads ? left : kRunQuads; }

}  // namespace
}  // namespace pyrobust::matmul
