// Internal: the panel order, a second copy of a weight that the kernels of some instruction sets
// make of the canonical layout (avx512_panels.h). 32 rows of W are one stream, group after group:
//
//   panel 0 (rows 0..31)     group 0: scales, zeros, codes | group 1: ... |      panel 1: ...
//
//   scales   32, of the weight's type (bytes where it has row scales)
//   zeros    32 bytes, where it has zeros; both together fill whole 64 bytes
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

// Whether groups are no whole 32 columns. In the panel order each then has columns of zeros behind,
// up to whole 32, and so has x. Shorter groups would take more than twice the memory; of longer
// ones two would be too many to decode at once.
inline bool pads_groups(const PackedMatrix& w) {
  return w.group_dim == 1 && w.group_size < w.cols && w.group_size % kHalfBlock != 0 &&
         w.group_size >= 16 && w.group_size <= kSpan / 2;
}

// Columns of a group, and of all, in the panel order.
inline int64_t panel_group(const PackedMatrix& w) {
  return pads_groups(w) ? ceil_div(w.group_size, kHalfBlock) * kHalfBlock : w.group_size;
}
inline int64_t panel_columns(const PackedMatrix& w) {
  return pads_groups(w) ? scale_cols(w) * panel_group(w) : w.cols;
}
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
// two.
inline int64_t step_blocks(const PackedMatrix& w) {
  if (w.group_size >= w.cols) return ceil_div(w.cols, kLineBytes);
  return (has_half_blocks(w) ? 2 : 1) * panel_group(w) / kLineBytes;
}

// For groups along a row, of whole 32 columns or padded, or whole rows; and along the rows of W
// (group_dim 0), where a panel is one group without scales and zeros.
struct PanelLayout {
  int bits;
  int64_t scale_bytes;    // of one scale
  int64_t groups;         // of a row
  int64_t group_columns;  // of all groups but the last
  int64_t columns;        // of a row, a multiple of 64, or of 32 where groups are
  int64_t head_bytes;     // scales and zeros of a group
  int64_t group_bytes;    // of all groups but the last
  int64_t panel_bytes;
  int64_t panels;

  explicit PanelLayout(const PackedMatrix& w)
      : bits(w.levels == kTernaryLevels ? 2 : code_bits(w.levels)),
        scale_bytes(w.row_scale != nullptr ? 1 : float_type_bytes(w.scale_type)),
        groups(w.group_dim == 1 ? scale_cols(w) : 1),
        panels(ceil_div(w.rows, kPanelRows)) {
    const int64_t unit = has_half_blocks(w) ? kHalfBlock : kLineBytes;
    columns = ceil_div(panel_columns(w), unit) * unit;
    group_columns = w.group_dim == 1 && w.group_size < w.cols ? panel_group(w) : columns;
    const int64_t heads =
        w.group_dim == 1 ? kPanelRows * (scale_bytes + (w.zero != nullptr ? 1 : 0)) : 0;
    head_bytes = ceil_div(heads, kLineBytes) * kLineBytes;
    group_bytes = head_bytes + code_bytes(group_columns);
    panel_bytes = groups * head_bytes + code_bytes(columns);
  }

  int64_t code_bytes(int64_t count) const { return count / kQuadColumns * bits * kLineBytes; }
  int64_t bytes() const { return panels * panel_bytes; }
};

}  // namespace
}  // namespace pyrobust::matmul
