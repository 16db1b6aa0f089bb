// Included by avx2.cpp and avx512.cpp: the product in float.
//
// Groups of whole blocks (group_size a multiple of 64, or one group): per block of 64 columns eight
// float lanes take eight FMAs of x (code - zero) each, are added as a tree (the relative error is
// at most 11 float roundings), and go into a double total, times the scale. Other groupings decode
// the exact scaled weight first (avx2_plain.h along a row) and use a scale of 1. One or two rows of
// x decode in registers; more rows decode a panel once and reuse it; the sums are the same to the
// bit.
#pragma once

#include "matmul/avx2_tile.h"

namespace pyrobust::matmul {
namespace {

// --- float micro-kernels -------------------------------------------------------------------------

// Adds eight float lanes of four vectors: lanes ((0+1)+(2+3)) + ((4+5)+(6+7)) of each.
inline __m128 lane_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}

// total[m] (four doubles, one per row of the tile) += scale * sum over 64 columns, per block.
// x: block-ordered rows, `stride` floats apart. The sums of one output never depend on kRows.
template <int kBits, int kRows>
inline void fused_blocks(const TileRows& rows, const double* scale, const float* zero,
                         int64_t row_bytes, int64_t groups, int64_t per_group, int64_t blocks,
                         const float* x, int64_t stride, __m256d* total) {
  int64_t group = 0, left = per_group;
  for (int64_t b = 0; b < blocks; ++b, --left) {
    if (left == 0) {
      ++group;
      left = per_group;
    }
    // Four rows of W side by side: one after the other, each chain of eight FMAs would wait for its
    // own latency (4 cycles a step instead of 1.5).
    Words<kBits> words[kTile];
    __m256 subtract[kTile], sum[kRows][kTile];
#pragma GCC unroll 4
    for (int n = 0; n < kTile; ++n) {
      words[n] = load_words<kBits>(rows.block(n, b, 8 * kBits));
      subtract[n] = _mm256_broadcast_ss(zero + n * groups + group);
      // The same block of the next tile: the decoding of four rows outlasts the reorder buffer, so
      // the processor does not reach those loads in time by itself.
      _mm_prefetch(reinterpret_cast<const char*>(rows.row[n] + kTile * row_bytes + b * 8 * kBits),
                   _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
        const __m256 weight = _mm256_sub_ps(magic_codes<kBits>(words[n], j), subtract[n]);
#pragma GCC unroll 2
        for (int m = 0; m < kRows; ++m) {
          const __m256 value = _mm256_loadu_ps(x + m * stride + b * kBlock + j * 8);
          sum[m][n] =
              j == 0 ? _mm256_mul_ps(value, weight) : _mm256_fmadd_ps(value, weight, sum[m][n]);
        }
      }
    }
    const __m256d scales = _mm256_loadu_pd(scale + group * kTile);
    for (int m = 0; m < kRows; ++m) {
      const __m128 sums = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      total[m] = _mm256_fmadd_pd(_mm256_cvtps_pd(sums), scales, total[m]);
    }
  }
}

// The same from a panel of floats: [block][step][row of the tile][lane]. `scale` null: 1.
template <int kRows>
inline void panel_blocks(const float* panel, const double* scale, int64_t first_block,
                         int64_t per_group, int64_t blocks, const float* x, int64_t stride,
                         double* total, int64_t total_stride) {
  __m256d totals[kRows];
  for (int m = 0; m < kRows; ++m) totals[m] = _mm256_loadu_pd(total + m * total_stride);
  for (int64_t b = 0; b < blocks; ++b) {
    __m256 sum[kRows][kTile];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256 value[kRows];
#pragma GCC unroll 3
      for (int m = 0; m < kRows; ++m) {
        value[m] = _mm256_loadu_ps(x + m * stride + b * kBlock + j * 8);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
        const __m256 weight = _mm256_loadu_ps(panel + ((b * 8 + j) * kTile + n) * 8);
#pragma GCC unroll 3
        for (int m = 0; m < kRows; ++m) {
          sum[m][n] = j == 0 ? _mm256_mul_ps(value[m], weight)
                             : _mm256_fmadd_ps(value[m], weight, sum[m][n]);
        }
      }
    }
    const __m256d scales = scale != nullptr
                               ? _mm256_loadu_pd(scale + (first_block + b) / per_group * kTile)
                               : _mm256_set1_pd(1.0);
#pragma GCC unroll 3
    for (int m = 0; m < kRows; ++m) {
      const __m128 sums = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      totals[m] = _mm256_fmadd_pd(_mm256_cvtps_pd(sums), scales, totals[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) _mm256_storeu_pd(total + m * total_stride, totals[m]);
}

void panel_rows(int64_t rows, const float* panel, const double* scale, int64_t first_block,
                int64_t per_group, int64_t blocks, const float* x, int64_t stride, double* total,
                int64_t total_stride) {
  switch (rows) {
    case 1:
      return panel_blocks<1>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
    case 2:
      return panel_blocks<2>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
    default:
      return panel_blocks<3>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
  }
}

// What rows of x meet the panels of several tiles with: their scales (null: 1), one group after
// another, the first of the panels' blocks, blocks to a group, and blocks.
struct FloatPanels {
  const double* scale;
  int64_t scale_stride;  // of a tile
  int64_t first_block;
  int64_t per_group;
  int64_t blocks;
};

// x: `rows` rows from the panels' first column on; totals (rows, kPanelTiles * kTile).
void meet_panels(const FloatPanels& p, int64_t tiles, const float* panel, const float* x,
                 int64_t stride, int64_t rows, double* total) {
  constexpr int64_t kWidth = kPanelTiles * kTile, kPanel = kPanelBlocks * kTile * kBlock;
  for (int64_t m = 0; m < rows; m += 3) {
    for (int64_t t = 0; t < tiles; ++t) {
      panel_rows(rows - m, panel + t * kPanel,
                 p.scale != nullptr ? p.scale + t * p.scale_stride : nullptr, p.first_block,
                 p.per_group, p.blocks, x + m * stride, stride, total + m * kWidth + t * kTile,
                 kWidth);
    }
  }
}

void store_totals(const Output& out, int64_t rows, int64_t first, int64_t count,
                  const double* total) {
  for (int64_t m = 0; m < rows; ++m, total += kPanelTiles * kTile) {
    for (int64_t i = 0; i < count; ++i) store_result(out, m, first + i, total[i], 1.0);
  }
}

// Decodes blocks [from, to) of a tile to a panel: code - zero, or the exact weight.
template <int kBits>
void decode_panel(const TileRows& rows, const float* zero, int64_t groups, int64_t per_group,
                  int64_t from, int64_t to, float* panel) {
  for (int64_t b = from; b < to; ++b) {
    for (int64_t n = 0; n < kTile; ++n) {
      const Words<kBits> words = load_words<kBits>(rows.block(n, b, 8 * kBits));
      const __m256 subtract = _mm256_broadcast_ss(zero + n * groups + b / per_group);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        _mm256_storeu_ps(panel + (((b - from) * 8 + j) * kTile + n) * 8,
                         _mm256_sub_ps(magic_codes<kBits>(words, j), subtract));
      }
    }
  }
}

// `scale` and `zero`: block-ordered columns of each row of the tile.
template <int kBits>
void decode_scaled(const TileRows& rows, const float* const* scale, const float* const* zero,
                   int64_t from, int64_t to, float* panel) {
  for (int64_t b = from; b < to; ++b) {
    for (int64_t n = 0; n < kTile; ++n) {
      const Words<kBits> words = load_words<kBits>(rows.block(n, b, 8 * kBits));
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int64_t at = b * kBlock + j * 8;
        const __m256 code =
            _mm256_sub_ps(magic_codes<kBits>(words, j), _mm256_loadu_ps(zero[n] + at));
        _mm256_storeu_ps(panel + (((b - from) * 8 + j) * kTile + n) * 8,
                         _mm256_mul_ps(code, _mm256_loadu_ps(scale[n] + at)));
      }
    }
  }
}

// --- exact mode ---------------------------------------------------------------------------------

template <int kBits, int kRows>
void multiply_fused(const PackedMatrix& w, const float* x, int64_t stride, int64_t begin,
                    int64_t end, const Output& out, const Scratch& scratch) {
  for (int64_t first = begin; first < end; first += kTile) {
    load_tile(w, first, scratch.expanded, scratch.rows);
    load_group_scales(w, first, scratch.group_scale, scratch.group_zero);
    __m256d total[kRows];
    for (int m = 0; m < kRows; ++m) total[m] = _mm256_setzero_pd();
    fused_blocks<kBits, kRows>(*scratch.rows, scratch.group_scale, scratch.group_zero,
                               packed_row_bytes(w.cols, w.levels), groups_of(w), group_blocks(w),
                               blocks_of(w), x, stride, total);
    for (int m = 0; m < kRows; ++m) {
      double value[kTile];
      _mm256_storeu_pd(value, total[m]);
      for (int64_t i = 0; i < kTile && first + i < end; ++i)
        store_result(out, m, first + i, value[i], 1.0);
    }
  }
}

// Column scales of one tile; rows of W that share a group share the vectors.
void tile_column_scales(const PackedMatrix& w, int64_t first, int64_t tile, int64_t* loaded,
                        const Scratch& scratch, const float** scale, const float** zero) {
  const int64_t columns = blocks_of(w) * kBlock;
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    const int64_t group = w.group_dim == 1 ? n : n / w.group_size;
    const int64_t slot = w.group_dim == 1 ? tile * kTile + i : group % (kPanelTiles * kTile);
    if (loaded[slot] != group) {
      load_column_scales(w, n, scratch.column_scale + slot * columns,
                         scratch.column_zero + slot * columns);
      loaded[slot] = group;
    }
    scale[i] = scratch.column_scale + slot * columns;
    zero[i] = scratch.column_zero + slot * columns;
  }
}

template <int kBits>
void multiply_panel(const PackedMatrix& w, Path path, const float* x, int64_t stride, int64_t rows,
                    int64_t begin, int64_t end, const Output& out, const Scratch& scratch) {
  const int64_t blocks = blocks_of(w), groups = groups_of(w), width = kPanelTiles * kTile;
  const int64_t per_group = path == Path::kBlocks ? group_blocks(w) : 1;
  const float* scale[kPanelTiles][kTile];
  const float* zero[kPanelTiles][kTile];
  int64_t loaded[kPanelTiles * kTile];
  for (int64_t& slot : loaded) slot = -1;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = end - first < width ? end - first : width;
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      load_tile(w, first + t * kTile, scratch.expanded + t * kTile * expanded_row_bytes(w),
                scratch.rows + t);
      if (path == Path::kBlocks) {
        load_group_scales(w, first + t * kTile, scratch.group_scale + t * kTile * groups,
                          scratch.group_zero + t * kTile * groups);
      } else {
        tile_column_scales(w, first + t * kTile, t, loaded, scratch, scale[t], zero[t]);
      }
    }
    __builtin_memset(scratch.total, 0, static_cast<size_t>(rows * width) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += kPanelBlocks) {
      const int64_t to = blocks - from < kPanelBlocks ? blocks : from + kPanelBlocks;
      for (int64_t t = 0; t < tiles; ++t) {
        float* panel = scratch.panel + t * kPanelBlocks * kTile * kBlock;
        if (path == Path::kBlocks) {
          decode_panel<kBits>(scratch.rows[t], scratch.group_zero + t * kTile * groups, groups,
                              per_group, from, to, panel);
        } else {
          decode_scaled<kBits>(scratch.rows[t], scale[t], zero[t], from, to, panel);
        }
      }
      const double* group_scale = path == Path::kBlocks ? scratch.group_scale : nullptr;
      const FloatPanels product{group_scale, kTile * groups, from, per_group, to - from};
      meet_panels(product, tiles, scratch.panel, x + from * kBlock, stride, rows, scratch.total);
    }
    store_totals(out, rows, first, count, scratch.total);
  }
}

template <int kBits>
void multiply_exact(const PackedMatrix& w, Path path, const Block& block, int64_t begin,
                    int64_t end, const Output& out, const Scratch& scratch) {
  const auto* x = static_cast<const float*>(block.data);
  const int64_t stride = blocks_of(w) * kBlock;
  if (path == Path::kBlocks && block.rows == 1) {
    multiply_fused<kBits, 1>(w, x, stride, begin, end, out, scratch);
  } else if (path == Path::kBlocks && block.rows == kFusedRows) {
    multiply_fused<kBits, 2>(w, x, stride, begin, end, out, scratch);
  } else {
    multiply_panel<kBits>(w, path, x, stride, block.rows, begin, end, out, scratch);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
