// Included by avx512.cpp alone: rows of x as the panel kernels want them, in tiles of eight rows of
// bytes. Four columns of row 0, four of row 1, ... follow one another, so that a tile is one
// stream:
//
//   tile   columns 0..3 of row 0 | of row 1 | ... of the tile's last row | columns 4..7 of row 0 |
//   ...
//
// A row in 16, 24 or 32 bits has two to four rows of bytes: the uppermost ones of a tile's rows
// come first. The last tile has fewer rows, and one or two of zeros where no kernel takes its
// number.
#pragma once

#include "matmul/avx512_int8.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

// What codes of the second half of a panel are multiplied by: 2 to the power of this. The sums fit:
// |q (code - zero)| of 65536 columns is at most 65536 * 128 * 15, and 16 times that is below 2^31.
int second_shift(const PackedMatrix& w) {
  const int bits = stored_bits(w);
  return w.codebook != nullptr || bits == 8 || bits == 1 ? 0 : bits;
}

// Minus the sums of a group of a tile's rows of bytes, times the zero where that is one for all;
// for the first and the second half of a panel, times 2^second_shift().
struct alignas(64) PanelOffsets {
  int32_t first[kTileRows];
  int32_t second[kTileRows];
};

// Rows of bytes in a tile where groups have up to 16 columns: totals of more would not stay in
// registers from one group to the next.
constexpr int64_t kQuadTileRows = 4;

struct PanelRows {
  int8_t* q;
  double* step;          // (tiles, groups, 8), where there are parts
  PanelOffsets* offset;  // (tiles, groups)
  int64_t stride, rows, groups;
  int64_t tile_rows;  // of bytes
  int parts;
  int64_t used;

  PanelRows(void* data, const PackedMatrix& w, int64_t count, Mode mode)
      : stride(panel_blocks(w) * kBlock),
        rows(count),
        groups(groups_of(w)),
        tile_rows(has_quad_groups(w) ? kQuadTileRows : kTileRows),
        parts(parts_of(mode)) {
    Arena arena{static_cast<char*>(data)};
    q = arena.take<int8_t>(round_up(rows, x_rows()) * parts * stride);
    const int64_t tiles = round_up(rows, x_rows()) / x_rows();
    step = arena.take<double>(parts > 1 ? tiles * groups * kTileRows : 0);
    offset = arena.take<PanelOffsets>(tiles * groups);
    used = arena.used;
  }

  int64_t x_rows() const { return tile_rows / parts; }  // rows of x in a tile
  int64_t rows_at(int64_t m) const {                    // in the tile from row m on
    return rows - m < x_rows() ? rows - m : x_rows();
  }
  int64_t width(int64_t m) const {  // rows of bytes of that tile
    const int64_t all = rows_at(m) * parts;
    return all == 5 || all == 7 ? all + 1 : all;
  }
  int8_t* tile(int64_t m) const { return q + m * parts * stride; }
  PanelOffsets* offsets(int64_t m) const { return offset + m / x_rows() * groups; }
  double* steps(int64_t m) const { return step + m / x_rows() * groups * kTileRows; }
};

// Whether x has few enough rows that all panels of a thread are read as one stream
// (avx512_panel_few.h, avx512_panel_parts.h). No head has several groups there.
inline bool streams_panels(const PackedMatrix& w, int64_t rows, int parts) {
  const bool shares = has_quad_groups(w) && panel_group(w) < kQuadColumns;
  return w.panels != nullptr && !shares && rows <= (parts == 1 ? 2 : 1);
}

// body(Rows<n>()) for n rows of bytes of a tile, one of the widths of PanelRows.
template <int kRows>
struct Rows {
  static constexpr int kNumber = kRows;
};

template <typename Body>
void for_width(int64_t width, const Body& body) {
  switch (width) {
    case 1:
      return body(Rows<1>());
    case 2:
      return body(Rows<2>());
    case 3:
      return body(Rows<3>());
    case 4:
      return body(Rows<4>());
    case 6:
      return body(Rows<6>());
    default:
      return body(Rows<8>());
  }
}

// Step 4 l + c (its four columns) of four rows, side by side, to lane l of out[c].
inline void columns_of_four(const __m512i* row, __m512i* out) {
  const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]);
  const __m512i b = _mm512_unpacklo_epi32(row[2], row[3]);
  const __m512i c = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i d = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi64(a, b);
  out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d);
  out[3] = _mm512_unpackhi_epi64(c, d);
}

template <int kLane>
inline void store_lane(__m512i v, __mmask8 part, int8_t* out) {
  _mm_mask_storeu_epi32(out, part, _mm512_extracti32x4_epi32(v, kLane));
}

// 16 steps of four columns of `width` rows, side by side.
inline void store_tile_block(const __m512i (&row)[kTileRows], int64_t width, int8_t* out) {
  if (width == 1) {
    _mm512_storeu_si512(out, row[0]);
    return;
  }
  if (width == 2) {
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i next = _mm512_add_epi32(from, _mm512_set1_epi32(8));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(row[0], from, row[1]));
    _mm512_storeu_si512(out + kBlock, _mm512_permutex2var_epi32(row[0], next, row[1]));
    return;
  }
  __m512i lower[4], upper[4];
  columns_of_four(row, lower);
  if (width > 4) columns_of_four(row + 4, upper);
  const auto part = static_cast<__mmask8>((1 << width) - 1);
#pragma GCC unroll 4
  for (int64_t c = 0; c < 4; ++c) {
    int8_t* at = out + 4 * c * width;
    const int64_t next = 16 * width;  // bytes of four steps
    if (width <= 4) {
      store_lane<0>(lower[c], part, at);
      store_lane<1>(lower[c], part, at + next);
      store_lane<2>(lower[c], part, at + 2 * next);
      store_lane<3>(lower[c], part, at + 3 * next);
      continue;
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i a = _mm512_permutex2var_epi64(lower[c], first, upper[c]);
    const __m512i b = _mm512_permutex2var_epi64(lower[c], second, upper[c]);
    _mm256_mask_storeu_epi32(at, part, _mm512_castsi512_si256(a));
    _mm256_mask_storeu_epi32(at + next, part, _mm512_extracti64x4_epi64(a, 1));
    _mm256_mask_storeu_epi32(at + 2 * next, part, _mm512_castsi512_si256(b));
    _mm256_mask_storeu_epi32(at + 3 * next, part, _mm512_extracti64x4_epi64(b, 1));
  }
}

inline __m512i sum_bytes(__m512i sum, __m512i q) {
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), q);
}

// `sum`: lanes of the sums of a group, for each row of bytes.
inline void write_offsets(const PackedMatrix& w, const __m512i* sum, PanelOffsets* out) {
  const int32_t zero = w.zero == nullptr ? symmetric_zero(w) : 1;
  const int shift = second_shift(w);
  for (int64_t i = 0; i < kTileRows; ++i) {
    out->first[i] = -zero * _mm512_reduce_add_epi32(sum[i]);
    out->second[i] = out->first[i] * (1 << shift);
  }
}

// Blocks [begin, end) of group g of the tile from row m on: convert(i, b, v) gives 64 columns of
// its row i, each part apart by the tile's rows.
template <typename Convert>
void prepare_panel_group(const PackedMatrix& w, int64_t m, int64_t g, int64_t begin, int64_t end,
                         const PanelRows& out, const Convert& convert) {
  const int64_t count = out.rows_at(m), width = out.width(m);
  __m512i v[kTileRows], sum[kTileRows];
  for (int i = 0; i < kTileRows; ++i) v[i] = sum[i] = _mm512_setzero_si512();
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t i = 0; i < count; ++i) convert(i, b, v + i);
    for (int64_t i = 0; i < count * out.parts; ++i) sum[i] = sum_bytes(sum[i], v[i]);
    store_tile_block(v, width, out.tile(m) + b * kBlock * width);
  }
  write_offsets(w, sum, out.offsets(m) + g);
}

// The same of the groups g and g + 1, if there is one, where they meet within a block.
template <typename Convert>
void prepare_half_groups(const PackedMatrix& w, int64_t m, int64_t g, int64_t begin, int64_t end,
                         const PanelRows& out, const Convert& convert) {
  constexpr int64_t kHalf = kBlock / 2;
  const int64_t count = out.rows_at(m), width = out.width(m);
  const __m512i ones[2] = {_mm512_maskz_set1_epi8((uint64_t{1} << kHalf) - 1, 1),
                           _mm512_maskz_set1_epi8(~uint64_t{0} << kHalf, 1)};
  __m512i v[kTileRows], sum[2][kTileRows];
  for (int i = 0; i < kTileRows; ++i) v[i] = sum[0][i] = sum[1][i] = _mm512_setzero_si512();
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t i = 0; i < count; ++i) convert(i, b, v + i);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t own = ((b - begin) * kBlock + half * kHalf) / panel_group(w);
      for (int64_t i = 0; i < count * out.parts; ++i) {
        sum[own][i] = _mm512_dpbusd_epi32(sum[own][i], ones[half], v[i]);
      }
    }
    store_tile_block(v, width, out.tile(m) + b * kBlock * width);
  }
  write_offsets(w, sum[0], out.offsets(m) + g);
  if (g + 1 < out.groups) write_offsets(w, sum[1], out.offsets(m) + g + 1);
}

// The same of the groups from g on that lie in one block, each within a quad.
template <typename Convert>
void prepare_quad_groups(const PackedMatrix& w, int64_t m, int64_t g, int64_t block,
                         const PanelRows& out, const Convert& convert) {
  const int64_t count = out.rows_at(m), width = out.width(m), lanes = panel_group(w) / 4;
  const int32_t zero = w.zero == nullptr ? symmetric_zero(w) : 1;
  const int shift = streams_panels(w, out.rows, out.parts) ? second_shift(w) : 0;
  __m512i v[kTileRows];
  for (int i = 0; i < kTileRows; ++i) v[i] = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; ++i) convert(i, block, v + i);
  for (int64_t i = 0; i < count * out.parts; ++i) {
    alignas(64) int32_t sum[kLanes];  // of four columns
    _mm512_store_si512(sum, sum_bytes(_mm512_setzero_si512(), v[i]));
    PanelOffsets* offset = out.offsets(m) + g;
    for (int64_t l = 0; l < kLanes && g + l / lanes < out.groups; l += lanes, ++offset) {
      int32_t all = 0;
      for (int64_t j = 0; j < lanes; ++j) all += sum[l + j];
      offset->first[i] = -zero * all;
      offset->second[i] = offset->first[i] * (1 << shift);
    }
  }
  store_tile_block(v, width, out.tile(m) + block * kBlock * width);
}

// All groups of a tile, those with one step of x at a time: body(g, begin, end) for their first and
// their blocks.
template <typename Body>
void for_step_groups(const PackedMatrix& w, int64_t groups, const Body& body) {
  const int64_t blocks = panel_blocks(w), some = step_blocks(w);
  for (int64_t g = 0, b = 0; g < groups; g += step_groups(w), b += some) {
    body(g, b, blocks - b < some ? blocks : b + some);
  }
}

template <typename Convert>
void prepare_step_groups(const PackedMatrix& w, int64_t m, int64_t g, int64_t begin, int64_t end,
                         const PanelRows& out, const Convert& convert) {
  if (has_quad_groups(w)) return prepare_quad_groups(w, m, g, begin, out, convert);
  if (has_half_blocks(w)) return prepare_half_groups(w, m, g, begin, end, out, convert);
  prepare_panel_group(w, m, g, begin, end, out, convert);
}

// Rows of x in the order of the columns of panels.
struct TileX {
  const char* data;
  FloatType type;
  int64_t cols;

  const char* row(int64_t i) const { return data + i * cols * float_type_bytes(type); }
};

// `count` rows with zeros behind each group, written to `memory`.
TileX padded_rows(const PackedMatrix& w, const TileX& x, int64_t count, void* memory) {
  const int64_t size = float_type_bytes(x.type), group = w.group_size * size;
  const TileX out{static_cast<const char*>(memory), x.type, panel_columns(w)};
  __builtin_memset(memory, 0, static_cast<size_t>(count * out.cols * size));
  for (int64_t i = 0; i < count; ++i) {
    auto* to = static_cast<char*>(memory) + i * out.cols * size;
    for (int64_t at = 0; at < x.cols * size; at += group, to += panel_group(w) * size) {
      const int64_t left = x.cols * size - at;
      __builtin_memcpy(to, x.row(i) + at, static_cast<size_t>(left < group ? left : group));
    }
  }
  return out;
}

int64_t padded_rows_bytes(const PackedMatrix& w) {
  return moves_columns(w) ? kTileRows * panel_columns(w) * static_cast<int64_t>(sizeof(float)) : 0;
}

// The rows [m, m + rows_at(m)) of the block, which `x` holds.
void prepare_panel_int8(const PackedMatrix& w, const TileX& x, int64_t m, const PanelRows& out,
                        double* step) {
  Divisor by[kTileRows];
  for (int64_t i = 0; i < out.rows_at(m); ++i) {
    step[i] = step_of(x.row(i), x.type, 0, x.cols, 127.0);
    by[i] = Divisor(step[i]);
  }
  const auto convert = [&](int64_t i, int64_t b, __m512i* v) {
    *v = step[i] > 0.0 ? quantize_64(x.row(i), x.type, b * kBlock, x.cols, by[i])
                       : _mm512_setzero_si512();
  };
  for_step_groups(w, out.groups, [&](int64_t g, int64_t begin, int64_t end) {
    prepare_step_groups(w, m, g, begin, end, out, convert);
  });
}

template <int kParts>
void prepare_panel_parts(const PackedMatrix& w, const TileX& x, int64_t m, const PanelRows& out) {
  const int64_t count = out.rows_at(m);
  for_step_groups(w, out.groups, [&](int64_t g, int64_t begin, int64_t stop) {
    const int64_t end = stop * kBlock < x.cols ? stop * kBlock : x.cols;
    double inverse[kTileRows];
    for (int64_t i = 0; i < count; ++i) {
      const double step =
          power_of_two(step_of(x.row(i), x.type, begin * kBlock, end, largest_of<kParts>()));
      for (int64_t own = g; own < g + step_groups(w) && own < out.groups; ++own) {
        out.steps(m)[own * kTileRows + i] = step;
      }
      inverse[i] = step > 0.0 ? 1.0 / step : 0.0;
    }
    const auto convert = [&](int64_t i, int64_t block, __m512i* v) {
      __m512i part[kParts];
      parts_64<kParts>(x.row(i), x.type, block * kBlock, x.cols, inverse[i], part);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) v[p * count] = part[p];
    };
    prepare_step_groups(w, m, g, begin, stop, out, convert);
  });
}

// Rows `part` of the block [first, first + rows) of x; `part` begins with a tile. `scratch` has
// padded_rows_bytes().
void prepare_panel_rows(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first,
                        int64_t rows, RowRange part, void* prepared, double* step, void* scratch) {
  const PanelRows out(prepared, w, rows, mode);
  const TileX all{static_cast<const char*>(x.data), x.type, w.cols};
  for (int64_t m = part.begin; m < part.end; m += out.x_rows()) {
    TileX own{all.row(first + m), x.type, w.cols};
    if (moves_columns(w)) own = padded_rows(w, own, out.rows_at(m), scratch);
    switch (mode) {
      case Mode::kTwoParts:
        prepare_panel_parts<2>(w, own, m, out);
        break;
      case Mode::kThreeParts:
        prepare_panel_parts<3>(w, own, m, out);
        break;
      case Mode::kFourParts:
        prepare_panel_parts<4>(w, own, m, out);
        break;
      default:
        prepare_panel_int8(w, own, m, out, step + m);
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
