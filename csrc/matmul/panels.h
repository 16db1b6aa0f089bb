// Internal: the panel order, a second copy of a weight that the kernels of some instruction sets
// make of the canonical layout (avx512_panels.h). 32 rows of W are one stream, group after group:
//
//   panel 0 (rows 0..31)     group 0: scales, zeros, codes | group 1: ... |      panel 1: ...
//
//   scales   32, of the weight's type (bytes where it has row scales)
//   zeros    32 bytes, where it has zeros; both together fill whole 64 bytes. Groups of up to 16
//            columns: 32 scales of each group of a quad, then their zeros, then the quad
//   codes    quads of 16 columns, `bits` times 64 bytes each
//
// A quad has four steps of four columns. At step s, column 4 s + c of row i of the panel is byte
// 4 (i mod 16) + c of a register, of one for rows 0..15 and one for rows 16..31. Their codes, a and
// b, share bytes such that shifts and masks of whole registers bring them out:
//
//   8 bits   registers a0 b0 a1 b1 a2 b2 a3 b3
//   4 bits   registers 0..3: of step s, b in the upper and a in the lower four bits
//   3 bits   registers 0..2: [ 2 bits of step 3 | b of step s | a of step s ]; the 6 bits b a of
//            step 3 lie in the tops of registers 2, 1 and 0
//   2 bits   register r: [ b of step 2 r + 1 | a of 2 r + 1 | b of 2 r | a of 2 r ]
//   1 bit    [ b3 a3 b2 a2 b1 a1 b0 a0 ]
//
// Ternary codes take two bits here. Rows past the last have codes and scales of 0, columns past the
// last, and past a group's last where it is padded, codes of 0. Entries of a codebook, row scales
// and the remainder are not part of it.
#pragma once

#include "matmul/kernels.h"
#include "matmul/weights.h"

namespace pyrobust::matmul {

// Unnamed: code of one instruction set must not be merged into that of another.
namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kQuadColumns = 16;
constexpr int64_t kLineBytes = 64;

constexpr int64_t kHalfBlock = kLineBytes / 2;

// Whether groups have up to 16 columns: a quad then holds one of them, two or four, each filled up
// to 16, 8 or 4 columns, and so many scales and zeros stand before its codes.
inline bool has_quad_groups(const PackedMatrix& w) {
  return w.group_dim == 1 && w.group_size < w.cols && w.group_size <= kQuadColumns;
}

// Whether groups are no whole 32 columns. In the panel order each then has columns of zeros behind,
// up to whole 32 or as above, and so has x.
inline bool pads_groups(const PackedMatrix& w) {
  return w.group_dim == 1 && w.group_size < w.cols && w.group_size % kHalfBlock != 0 &&
         w.group_size <= kMaxIntegerRun;
}

// Columns of a group, and of all, in the panel order.
inline int64_t panel_group(const PackedMatrix& w) {
  if (has_quad_groups(w)) return w.group_size <= 4 ? 4 : w.group_size <= 8 ? 8 : kQuadColumns;
  return pads_groups(w) ? ceil_div(w.group_size, kHalfBlock) * kHalfBlock : w.group_size;
}
inline int64_t panel_columns(const PackedMatrix& w) {
  if (!pads_groups(w)) return w.cols;
  const int64_t unit = has_quad_groups(w) ? panel_group(w) : kHalfBlock;
  const int64_t whole = scale_cols(w) - 1, last = w.cols - whole * w.group_size;
  return whole * panel_group(w) + ceil_div(last, unit) * unit;
}
// Whether columns lie elsewhere there than in W.
inline bool moves_columns(const PackedMatrix& w) { return panel_group(w) != w.group_size; }
inline int64_t panel_blocks(const PackedMatrix& w) {
  return ceil_div(panel_columns(w), kLineBytes);
}

// Whether groups there are whole 32 columns but not whole blocks of 64.
inline bool has_half_blocks(const PackedMatrix& w) {
  return w.group_dim == 1 && w.group_size < w.cols && panel_group(w) % kLineBytes == kHalfBlock &&
         w.group_size <= kMaxIntegerRun;
}

// Whether products read the panel order alone: panels that nobody has made are made on the way, one
// at a time.
inline bool has_panels_alone(const PackedMatrix& w) { return pads_groups(w) || has_half_blocks(w); }

// Blocks of 64 columns of x with one step, where it is rounded to parts: those of a group, or of
// two; or one, of many groups. And how many groups these are.
inline int64_t step_blocks(const PackedMatrix& w) {
  if (w.group_size >= w.cols) return ceil_div(w.cols, kLineBytes);
  if (has_quad_groups(w)) return 1;
  return (has_half_blocks(w) ? 2 : 1) * panel_group(w) / kLineBytes;
}
inline int64_t step_groups(const PackedMatrix& w) {
  if (has_quad_groups(w)) return kLineBytes / panel_group(w);
  return has_half_blocks(w) ? 2 : 1;
}

// For groups along a row, of whole 32 columns or padded, or whole rows; and along the rows of W
// (group_dim 0), where a panel is one group without scales and zeros.
struct PanelLayout {
  int bits;
  int64_t scale_bytes;    // of one scale
  int64_t head_groups;    // of a head: 1, or those of a quad, which is one group below
  int64_t groups;         // of a row
  int64_t group_columns;  // of all groups but the last
  int64_t columns;        // of a row, a multiple of 64, or of 32 or 16 where groups are
  int64_t head_bytes;     // scales and zeros of a group
  int64_t group_bytes;    // of all groups but the last
  int64_t panel_bytes;
  int64_t panels;

  explicit PanelLayout(const PackedMatrix& w)
      : bits(w.levels == kTernaryLevels ? 2 : code_bits(w.levels)),
        scale_bytes(w.row_scale != nullptr ? 1 : float_type_bytes(w.scale_type)),
        head_groups(has_quad_groups(w) ? kQuadColumns / panel_group(w) : 1),
        groups(w.group_dim == 1 ? ceil_div(scale_cols(w), head_groups) : 1),
        panels(ceil_div(w.rows, kPanelRows)) {
    const int64_t unit = has_quad_groups(w)   ? kQuadColumns
                         : has_half_blocks(w) ? kHalfBlock
                                              : kLineBytes;
    columns = ceil_div(panel_columns(w), unit) * unit;
    const bool whole_rows = w.group_dim == 0 || w.group_size >= w.cols;
    group_columns = whole_rows ? columns : head_groups * panel_group(w);
    const int64_t own = scale_bytes + (w.zero != nullptr ? 1 : 0);
    const int64_t heads = w.group_dim == 1 ? head_groups * kPanelRows * own : 0;
    head_bytes = ceil_div(heads, kLineBytes) * kLineBytes;
    group_bytes = head_bytes + code_bytes(group_columns);
    panel_bytes = groups * head_bytes + code_bytes(columns);
  }

  int64_t columns_of(int64_t group) const {
    const int64_t left = columns - group * group_columns;
    return left < group_columns ? left : group_columns;
  }
  int64_t code_bytes(int64_t count) const { return count / kQuadColumns * bits * kLineBytes; }
  int64_t bytes() const { return panels * panel_bytes; }
};

}  // namespace
}  // namespace pyrobust::matmul
