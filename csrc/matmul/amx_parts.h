// Included by amx.cpp alone: float activations in 8-bit parts (avx512_parts.h) on the tile
// instructions. A tile holds one part of 16 rows of x; the tiles of all parts meet the same panel
// of W, and their sums of a group meet in double as avx512_int8.h has it, hence the same bits:
//
//   x   rows 0..15: part 0, block by block | part 1 | ...     rows 16..31: ...       1 KiB each
//
// Two parts are two products of 64 columns where tiles of bfloat16 (tdpbf16ps, at the same rate)
// are two of 32 columns each. Those would need W unpacked to twice the bytes, and their float sums
// another result than few rows of x have, which no tile serves.
#pragma once

#include "matmul/amx_two_level.h"
#include "matmul/avx512_parts.h"

namespace pyrobust::matmul {
namespace {

struct TiledParts {
  int8_t* q;
  double* step;    // (rows, groups)
  int32_t* q_sum;  // (rows, parts, groups)
  int64_t pitch;   // bytes of a part of 16 rows
  int64_t groups;
  int parts;
  int64_t used;

  TiledParts(void* data, const PackedMatrix& w, int64_t rows, Mode mode)
      : pitch(blocks_of(w) * kTileBytes), groups(groups_of(w)), parts(parts_of(mode)) {
    Arena arena{static_cast<char*>(data)};
    q = arena.take<int8_t>(ceil_div(rows, kXRows) * parts * pitch);
    step = arena.take<double>(rows * groups);
    q_sum = arena.take<int32_t>(rows * parts * groups);
    used = arena.used;
  }

  int8_t* tiles(int64_t m) const { return q + m / kXRows * parts * pitch; }  // of row m
  int8_t* block(int64_t m, int part, int64_t b) const {
    return tiles(m) + part * pitch + b * kTileBytes + m % kXRows * kBlock;
  }
};

// 64 columns in plain order to that of a row of a tile.
inline void store_tile_columns(int bits, __m512i places, __m512i columns, int8_t* out) {
  int8_t ordered[kBlock];
  store_ordered(bits, columns, ordered);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(places, _mm512_loadu_si512(ordered)));
}

template <int kParts>
void prepare_tiled_row(const PackedMatrix& w, const void* x, FloatType type, int64_t m,
                       __m512i places, const TiledParts& out) {
  const int64_t blocks = blocks_of(w), per_group = group_blocks(w);
  const int bits = stored_bits(w);
  for (int64_t g = 0, b = 0; g < out.groups; ++g) {
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    const int64_t end = stop * kBlock < w.cols ? stop * kBlock : w.cols;
    const double step = power_of_two(step_of(x, type, b * kBlock, end, largest_of<kParts>()));
    const double inverse = step > 0.0 ? 1.0 / step : 0.0;
    __m512i sum[kParts];
    for (int p = 0; p < kParts; ++p) sum[p] = _mm512_setzero_si512();
    for (; b < stop; ++b) {
      __m512i part[kParts];
      parts_64<kParts>(x, type, b * kBlock, w.cols, inverse, part);
      for (int p = 0; p < kParts; ++p) {
        sum[p] = _mm512_dpbusd_epi32(sum[p], _mm512_set1_epi8(1), part[p]);
        store_tile_columns(bits, places, part[p], out.block(m, p, b));
      }
    }
    out.step[m * out.groups + g] = step;
    for (int p = 0; p < kParts; ++p) {
      out.q_sum[(m * kParts + p) * out.groups + g] = _mm512_reduce_add_epi32(sum[p]);
    }
  }
}

template <int kParts>
void prepare_tiled_parts(const PackedMatrix& w, const Activations& x, int64_t first, int64_t rows,
                         RowRange part, const TiledParts& out, double* step) {
  const ColumnOrder order(stored_bits(w));
  int32_t from[kWRows];
  for (int j = 0; j < kWRows; ++j) from[order.place[j]] = j;
  const __m512i places = _mm512_loadu_si512(from);
  const int64_t row_bytes = w.cols * float_type_bytes(x.type);
  for (int64_t m = part.begin; m < part.end; ++m) {
    const auto* row = static_cast<const char*>(x.data) + (first + m) * row_bytes;
    prepare_tiled_row<kParts>(w, row, x.type, m, places, out);
    step[m] = 1.0;  // steps are in the totals
  }
  for (int64_t m = rows; part.end == rows && m % kXRows != 0; ++m) {
    for (int p = 0; p < kParts; ++p) {
      for (int64_t b = 0; b < blocks_of(w); ++b) __builtin_memset(out.block(m, p, b), 0, kBlock);
    }
  }
}

struct PartsScratch : TileScratch {
  static constexpr int64_t kPartSums = 2 * kSums;  // of four tiles of x
  int32_t* part_sums;                              // two buffers
  int64_t all_used;

  PartsScratch(void* memory, const PackedMatrix& w, int64_t rows_of_x)
      : TileScratch(memory, w, rows_of_x) {
    Arena arena{static_cast<char*>(memory), used};
    part_sums = arena.take<int32_t>(2 * kPartSums);
    all_used = arena.used;
  }
};

// total += scale step (256^(kParts - 1) part 0 + ...) for rows [m, m + count) of x.
template <int kParts>
void scale_tiled_parts(const PartsScratch& s, const TiledParts& x, const int32_t* sums, int64_t g,
                       int64_t m, int64_t count) {
  const __m512d unit = _mm512_set1_pd(256.0);
  for (int64_t i = m; i < m + count; ++i, sums += kWidth) {
    const __m512d step = _mm512_set1_pd(x.step[i * x.groups + g]);
    for (int64_t at = 0; at < kWidth; at += 8) {
      const float* scale = s.scale + g * kWidth + at;
      const auto* zero = reinterpret_cast<const __m256i*>(s.zero + g * kWidth + at);
      __m512d all = _mm512_setzero_pd();
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) {
        const __m256i q_sum = _mm256_set1_epi32(x.q_sum[(i * kParts + p) * x.groups + g]);
        const auto* part = reinterpret_cast<const __m256i*>(sums + p * kXRows * kWidth + at);
        const __m256i exact = _mm256_sub_epi32(_mm256_load_si256(part),
                                               _mm256_mullo_epi32(_mm256_load_si256(zero), q_sum));
        all = _mm512_fmadd_pd(all, unit, _mm512_cvtepi32_pd(exact));
      }
      double* total = s.total + i * kWidth + at;
      _mm512_store_pd(
          total, _mm512_fmadd_pd(_mm512_mul_pd(all, step), _mm512_cvtps_pd(_mm256_load_ps(scale)),
                                 _mm512_load_pd(total)));
    }
  }
}

// 16 rows of x from row m on, or the `count` that are left, times the panel of blocks [from, to).
template <int kParts>
void multiply_parts_chunk(const TileSteps& steps, const TiledParts& x, int64_t m, int64_t count,
                          int64_t from, int64_t to, const PartsScratch& s) {
  const int64_t end = to < steps.count ? to : steps.count, first = from / steps.to_group;
  const int8_t* left = x.tiles(m) + from * kTileBytes;
  int64_t g = first;
  for (int64_t at = from; at < end; at += steps.to_group, ++g) {
    const int64_t begin = at - from;
    const int64_t stop = (end - at < steps.to_group ? end : at + steps.to_group) - from;
    int32_t* sums = s.part_sums + g % 2 * PartsScratch::kPartSums;
    sum_steps<2>(steps, begin, stop, left, x.pitch, s.panel, false, sums);
    if constexpr (kParts > 2) {
      sum_steps<kParts - 2>(steps, begin, stop, left + 2 * x.pitch, x.pitch, s.panel, false,
                            sums + kSums);
    }
    // The group before, whose stores have had time to finish.
    if (g > first) {
      const int32_t* before = s.part_sums + (g - 1) % 2 * PartsScratch::kPartSums;
      scale_tiled_parts<kParts>(s, x, before, g - 1, m, count);
    }
  }
  const int32_t* last = s.part_sums + (g - 1) % 2 * PartsScratch::kPartSums;
  scale_tiled_parts<kParts>(s, x, last, g - 1, m, count);
}

template <int kParts>
void multiply_tiled_parts(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                          int64_t end, const Output& out, void* memory) {
  const TiledParts x(const_cast<void*>(block.data), w, block.rows, mode);
  const PartsScratch s(memory, w, block.rows);
  const TileSteps steps(w);  // of 64 columns: groups are whole blocks
  const ColumnOrder order(stored_bits(w));
  const Unpack unpack = unpack_of(w);
  const int64_t blocks = blocks_of(w), rows = block.rows;
  tile::configure(tile_config(steps));
  for (int64_t first = begin; first < end; first += kWidth) {
    load_rows_of_w(w, first, s);
    __builtin_memset(s.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += steps.chunk) {
      const int64_t to = blocks - from < steps.chunk ? blocks : from + steps.chunk;
      unpack(w, order, from, to, s);
      for (int64_t m = 0; m < rows; m += kXRows) {
        const int64_t count = rows - m < kXRows ? rows - m : kXRows;
        multiply_parts_chunk<kParts>(steps, x, m, count, from, to, s);
      }
    }
    store_rows(out, block, first, end - first < kWidth ? end - first : kWidth, s.total);
  }
  tile::release();
}

}  // namespace
}  // namespace pyrobust::matmul
