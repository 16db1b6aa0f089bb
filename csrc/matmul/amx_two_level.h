// Included by amx.cpp alone: two-level scales on the tile instructions. Scale times code is a byte,
// so that codes are multiplied when they are unpacked and groups have no end: tiles of sums are
// loaded from totals in int32 and stored once per panel of 512 columns. Zeros are taken off first:
//
//   T = sum over k of q (scale code)  -  sum over groups of (scale zero) * (sum of q in the group)
//
// T of up to kMostIntegerColumns columns fits in int32; partial sums may wrap around. Longer rows
// and larger scales take amx_int8.h: the same integers in double.
#pragma once

#include "matmul/amx_int8.h"

namespace pyrobust::matmul {
namespace {

// Formats whose scale times code may fit in a byte.
bool may_fold(const PackedMatrix& w) {
  return w.row_scale != nullptr && w.codebook == nullptr && w.levels > 2 && w.levels < 256 &&
         w.cols <= kMostIntegerColumns;
}

// Whether it does in the 32 rows of W that are loaded.
bool rows_fold(const PackedMatrix& w, const TileScratch& s) {
  float most = 0.0f;
  for (int64_t i = 0; i < kWidth * groups_of(w); ++i) most = s.scale[i] > most ? s.scale[i] : most;
  return most * static_cast<float>(w.levels - 1) <= 255.0f;
}

Unpack unpack_folded_of(const PackedMatrix& w) {
  switch (stored_bits(w)) {
    case 2:
      return unpack_tiles<2, false, true>;
    case 3:
      return unpack_tiles<3, false, true>;
    default:
      return unpack_tiles<4, false, true>;
  }
}

// totals (rows of x, 32) = minus the sum over groups of scale zero (sum of x).
void start_totals(const PackedMatrix& w, const TiledX& x, int64_t rows, const TileScratch& s,
                  int32_t* totals) {
  const int64_t groups = groups_of(w);
  for (int64_t m = 0; m < rows; ++m) {
    __m512i sum[kPairs] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t g = 0; g < groups; ++g) {
      const __m512i all = _mm512_set1_epi32(x.q_sum[m * groups + g]);
#pragma GCC unroll 2
      for (int64_t t = 0; t < kPairs; ++t) {
        const int64_t at = g * kWidth + t * kWRows;
        const __m512i scale = _mm512_cvtps_epi32(_mm512_load_ps(s.scale + at));
        const __m512i product = _mm512_mullo_epi32(scale, _mm512_load_si512(s.zero + at));
        sum[t] = _mm512_sub_epi32(sum[t], _mm512_mullo_epi32(product, all));
      }
    }
#pragma GCC unroll 2
    for (int64_t t = 0; t < kPairs; ++t) {
      _mm512_store_si512(totals + m * kWidth + t * kWRows, sum[t]);
    }
  }
}

// Totals of the 32 rows of W that are loaded.
void multiply_folded_rows(const PackedMatrix& w, const TileSteps& steps, const ColumnOrder& order,
                          const TiledX& x, int64_t rows, const TileScratch& s, int32_t* totals) {
  const Unpack unpack = unpack_folded_of(w);
  const int64_t blocks = blocks_of(w);
  start_totals(w, x, rows, s, totals);
  const int64_t chunk = steps.chunk < kChunkBlocks ? steps.chunk : kChunkBlocks;
  for (int64_t from = 0; from < blocks; from += chunk) {
    const int64_t to = blocks - from < chunk ? blocks : from + chunk;
    const int64_t to_block = kBlock / steps.columns, before = from * to_block;
    const int64_t end = to * to_block < steps.count ? to * to_block : steps.count;
    unpack(w, order, from, to, s);
    for (int64_t m = 0; m < rows; m += kPairs * kXRows) {
      const int8_t* left = x.q + m / kXRows * x.pitch + from * kTileBytes;
      const auto add = rows - m > kXRows ? sum_steps<2> : sum_steps<1>;
      add(steps, 0, end - before, left, x.pitch, s.panel, true, totals + m * kWidth);
    }
  }
}

void multiply_tiled(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                    const Output& out, void* memory) {
  const TiledX x(const_cast<void*>(block.data), w, block.rows);
  const TileScratch s(memory, w, block.rows);
  const TileSteps steps(w);
  const ColumnOrder order(stored_bits(w));
  const Unpack unpack = unpack_of(w);
  const int64_t blocks = blocks_of(w), rows = block.rows;
  tile::configure(tile_config(steps));
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t count = end - first < kWidth ? end - first : kWidth;
    load_rows_of_w(w, first, s);
    if (may_fold(w) && rows_fold(w, s)) {
      auto* totals = reinterpret_cast<int32_t*>(s.total);  // 16 rows and more: they fit
      multiply_folded_rows(w, steps, order, x, rows, s, totals);
      store_rows(out, block, first, count, totals);
      continue;
    }
    __builtin_memset(s.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += steps.chunk) {
      const int64_t to = blocks - from < steps.chunk ? blocks : from + steps.chunk;
      unpack(w, order, from, to, s);
      for (int64_t m = 0; m < rows; m += kPairs * kXRows) {
        if (rows - m > kXRows) {
          const int64_t count = rows - m < kPairs * kXRows ? rows - m : kPairs * kXRows;
          multiply_chunk<2>(w, steps, x, m, count, from, to, s);
        } else {
          multiply_chunk<1>(w, steps, x, m, rows - m, from, to, s);
        }
      }
    }
    store_rows(out, block, first, count, s.total);
  }
  tile::release();
}

}  // namespace
}  // namespace pyrobust::matmul
