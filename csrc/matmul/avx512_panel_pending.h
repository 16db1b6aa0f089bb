// Included by avx512.cpp alone: the sums of groups onto the totals of a tile, in double. They wait
// in memory until the products of the next group run.
#pragma once

#include "matmul/avx512_panel_quad.h"
#include "matmul/avx512_panel_rows.h"

namespace pyrobust::matmul {
namespace {

// The sums of the last group, of one tile. They are added to the totals while the products of the
// next group run, a row at a time: 32 loads, products and stores in a row would hold those up.
struct PanelPending {
  alignas(64) int32_t sums[kTileRows * kPanelRows];
  int64_t rows = 0;  // of x
  const uint8_t* head;
  const double* step;
  double* total;
};

// What a tile of x meets: a panel, its groups [from, to), and the totals (rows, 32) of the tile.
struct PanelTask {
  const PackedMatrix* weight;
  const PanelLayout* layout;
  const uint8_t* panel;
  const PanelRows* x;
  PanelPending* pending;
  bool narrow;  // is_narrow(), for parts
  int64_t m;    // the tile's first row
  int64_t from, to;
  double* total;
};

inline __m256i eight_sums(const int32_t* sums) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
}

// total += scale * sums of row i of x; the products are exact.
__attribute__((always_inline)) inline void add_pending_row(const PanelPending& pending,
                                                           const __m512d* scale, int64_t i) {
  const int32_t* sums = pending.sums + kPanelRows * i;
  double* total = pending.total + kPanelRows * i;
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    add_scaled(_mm512_cvtepi32_pd(eight_sums(sums + 8 * l)), scale[l], total + 8 * l);
  }
}

// The same of parts: total += scale step (256 high + low), and so on for lower ones; step is a
// power of two, of which scalef takes the exponent: products would use the ports of `vpdpbusd`, 16
// cycles a group of 128 columns. `narrow`: is_narrow() with room for kShift more bits; the two
// highest parts are one integer then, in the place of the first.
template <int kParts>
__attribute__((always_inline)) inline void add_pending_parts(const PanelPending& pending,
                                                             bool narrow, const __m512d* scale,
                                                             int64_t i) {
  const int32_t *high = pending.sums + kPanelRows * i, *low = high + kPanelRows * pending.rows;
  double* total = pending.total + kPanelRows * i;
  const __m512d exponent = _mm512_getexp_pd(_mm512_set1_pd(pending.step[i]));
  const __m512d unit = _mm512_set1_pd(256.0);
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    __m512d sum = _mm512_cvtepi32_pd(eight_sums(high + 8 * l));
    if (!narrow) sum = _mm512_fmadd_pd(sum, unit, _mm512_cvtepi32_pd(eight_sums(low + 8 * l)));
#pragma GCC unroll 2
    for (int p = 2; p < kParts; ++p) {
      const __m256i next = eight_sums(high + p * kPanelRows * pending.rows + 8 * l);
      sum = _mm512_fmadd_pd(sum, unit, _mm512_cvtepi32_pd(next));
    }
    add_scaled(_mm512_scalef_pd(sum, exponent), scale[l], total + 8 * l);
  }
}

// Rows [from, to) of what is pending.
template <int kParts>
__attribute__((always_inline)) inline void add_pending(const PanelTask& task, const __m512d* scale,
                                                       int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    if constexpr (kParts == 1) {
      add_pending_row(*task.pending, scale, i);
    } else {
      add_pending_parts<kParts>(*task.pending, task.narrow, scale, i);
    }
  }
}

// Adds what the last tile has left.
template <int kShift>
__attribute__((noinline)) void finish_pending(const PanelTask& task) {
  if (task.pending->rows == 0) return;
  __m512d scale[4];
  load_panel_scales<kShift>(*task.weight, task.pending->head, scale);
  const int64_t rows = task.pending->rows;
  switch (task.x->parts) {
    case 1:
      add_pending<1>(task, scale, 0, rows);
      break;
    case 2:
      add_pending<2>(task, scale, 0, rows);
      break;
    case 3:
      add_pending<3>(task, scale, 0, rows);
      break;
    default:
      add_pending<4>(task, scale, 0, rows);
  }
  task.pending->rows = 0;
}

}  // namespace
}  // namespace pyrobust::matmul
