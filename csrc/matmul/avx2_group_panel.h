// Included by avx2_paths.h alone: many rows of x rounded to 8 bits, groups along the rows that are
// no whole blocks of 64 columns. The panel of avx2_int8_panel.h, with columns in plain order; each
// group begins with a step of its own, and codes behind its end, those of the next group, meet the
// zeros that x has there (avx2_groups.h).
#pragma once

#include "matmul/avx2_groups.h"
#include "matmul/avx2_int8_panel.h"

namespace pyrobust::matmul {
namespace {

// Steps of `columns` columns, at most a group: of four columns of bytes or two of words.
inline int64_t steps_of_group(const PackedMatrix& w, int64_t columns) {
  return round_up(columns, kGroupStep) / (takes_words(w) ? 2 : 4);
}

// Eight rows of codes in plain order, whose steps lie from `out` on. Writes up to seven steps more.
inline void unpack_panel_groups(const PackedMatrix& w, const uint8_t* rows, uint8_t* out) {
  const int64_t columns = takes_words(w) ? 16 : 32;   // of eight steps
  const bool joins = w.group_size % kGroupStep == 0;  // no columns between groups
  const int64_t group = joins ? w.cols : w.group_size;
  for (int64_t from = 0; from < w.cols; from += group, out += 64 * steps_of_group(w, group)) {
    const int64_t end = w.cols - from < group ? w.cols : from + group;
    uint8_t* to = out;
    for (int64_t k = from; k < end; k += columns, to += 8 * 64) {
      __m256i row[kLaneRows];
      for (int64_t n = 0; n < kLaneRows; ++n) {
        const uint8_t* codes = rows + n * plain_row_bytes(w) + k;
        row[n] = takes_words(w) ? _mm256_cvtepu8_epi16(load_128(codes)) : load_256(codes);
      }
      store_steps(row, to);
    }
  }
}

template <int kBits>
void multiply_group_panels(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                           const Output& out, const Scratch& scratch) {
  const GroupRows x(const_cast<void*>(block.data), w, block.rows);
  const StepRows rows{x.q, x.q_sum, x.row_bytes};
  const PanelRun run{&scratch, groups_of(w), steps_of_group(w, w.group_size), x.row_bytes / 4, 0,
                     0};
  for (int64_t first = begin; first < end; first += kPanelWidth) {
    begin_panel(w, first, block.rows, scratch);
    for (int64_t v = 0; v < kLaneHalves; ++v) {
      for (int64_t i = 0; i < kLaneRows; ++i) {
        const int64_t n = first + v * kLaneRows + i;
        plain_row(w, n < w.rows ? n : w.rows - 1, scratch.expanded + i * plain_row_bytes(w));
      }
      unpack_panel_groups(w, scratch.expanded, scratch.bytes + 32 * v);
    }
    add_panel_rows<kBits>(run, rows, block.rows);
    store_panel(out, block, first, end, scratch.total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
