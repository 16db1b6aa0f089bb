// Included by avx512.cpp alone: the product with a weight in panel order (panels.h), for
// activations in 8 bits or in two to four parts of 8 bits. A lane is a row of W, so that no lanes
// are added up; x is broadcast four columns at a time against 32 rows of W. One kernel serves any
// number of rows of x, eight rows of bytes at a time: codes are unpacked in registers each time,
// which 16 products an unpacked pair of registers hide.
//
// The sums of a group and the order of groups are those of avx512_int8.h, hence the same bits.
#pragma once

#include "matmul/avx512_make_panels.h"
#include "matmul/avx512_panel_few.h"
#include "matmul/avx512_panel_integer.h"
#include "matmul/avx512_panel_parts.h"
#include "matmul/avx512_panel_quads.h"

namespace pyrobust::matmul {
namespace {

// Bytes of a panel that all rows of x meet before the next. They come from the second cache, ahead
// of the products: as little as stays in the first cache would be left sooner, and each tile of x
// begins and ends with what no product hides.
constexpr int64_t kPanelBytes = 384 << 10;

// Bytes of totals, behind which a panel may be made.
int64_t totals_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (has_quad_groups(w)) return QuadScratch(nullptr, rows).used;
  if (takes_integer_totals(w, mode)) return IntegerScratch(nullptr, w, rows).used;
  return double_totals_bytes(rows);
}

int64_t panel_scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  return totals_bytes(w, mode, rows) + (w.panels == nullptr ? PanelLayout(w).panel_bytes : 0);
}

// With totals in int32.
template <int kBits, bool kBook>
void multiply_integer_order(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                            const Output& out, void* scratch) {
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, Mode::kInt8);
  const IntegerScratch s(scratch, w, block.rows);
  auto* own = static_cast<char*>(scratch) + s.used;
  for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
    const PanelTask task{&w, &layout, panel_of(w, layout, p, own), &x, nullptr, false, 0, 0,
                         0,  nullptr};
    multiply_integer_panel<kBits, kBook>(task, s);
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x.rows, block.step, first, first > begin ? first : begin,
                     stop < end ? stop : end, s.total);
  }
}

template <int kBits, bool kBook>
void multiply_panel_order(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                          int64_t end, const Output& out, void* scratch) {
  if (streams_panels(w, block.rows, parts_of(mode))) {
    if (mode == Mode::kInt8) return multiply_few_rows<kBits, kBook>(w, block, {begin, end}, out);
    return multiply_one_row<kBits, kBook>(w, mode, block, {begin, end}, out);
  }
  if (has_quad_groups(w)) {
    return multiply_quads<kBits, kBook>(w, mode, block, {begin, end}, out, scratch);
  }
  if (takes_integer_totals(w, mode)) {
    return multiply_integer_order<kBits, kBook>(w, block, begin, end, out, scratch);
  }
  constexpr int kShift = second_half_shift<kBits, kBook>();
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, mode);
  PanelPending pending;
  const bool narrow = is_narrow(w, kShift);
  auto* total = static_cast<double*>(scratch);
  auto* own = static_cast<char*>(scratch) + double_totals_bytes(x.rows);
  const int64_t some = kPanelBytes / layout.group_bytes;
  const int64_t chunk = x.rows <= x.x_rows() ? layout.groups : some > 0 ? some : 1;
  for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
    __builtin_memset(total, 0, static_cast<size_t>(double_totals_bytes(x.rows)));
    PanelTask task{&w, &layout, panel_of(w, layout, p, own), &x, &pending, narrow, 0, 0,
                   0,  nullptr};
    for (; task.from < layout.groups; task.from = task.to) {
      task.to = layout.groups - task.from < chunk ? layout.groups : task.from + chunk;
      for (task.m = 0; task.m < x.rows; task.m += x.x_rows()) {
        task.total = total + task.m * kPanelRows;
        if (x.parts > 1) {
          panel_parts_of<kBits, kBook>(x.width(task.m), task);
        } else {
          panel_tile_of<kBits, kBook>(x.width(task.m), task);
        }
      }
    }
    finish_pending<kShift>(task);
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x.rows, x.parts > 1 ? nullptr : block.step, first,
                     first > begin ? first : begin, stop < end ? stop : end, total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
