// Included by amx_two_level.h alone: the product with activations rounded to 8 bits and many rows
// of x, on the tile instructions of AMX (signed x times unsigned codes).
//
// Per 32 rows of W and 512 columns, codes are unpacked to a panel of tiles once and meet all rows
// of x, 32 at a time: two tiles of x times two of W, four tiles of int32 sums. At the end of a
// group those go to memory, and while the next group is multiplied they are scaled onto the double
// totals. The integer sums and the epilogue are those of matmul.h, hence the same bits as
// elsewhere.
#pragma once

#include "matmul/amx_layout.h"
#include "matmul/amx_tile.h"

namespace pyrobust::matmul {
namespace {

// The tiles: sums of x's tile i and W's tile t in 2 i + t, then two of x, then two of W.
constexpr int kLeft = 4, kRight = 6;
constexpr int64_t kSums = kPairs * kXRows * kWidth;

tile::Config tile_config(const TileSteps& steps) {
  tile::Config config;
  for (int i = 0; i < kLeft; ++i) config.set(i, kXRows, kWRows * 4);
  for (int i = 0; i < kPairs; ++i) {
    config.set(kLeft + i, kXRows, steps.columns);
    config.set(kRight + i, steps.columns / 4, kWRows * 4);
  }
  return config;
}

struct TileScratch {
  uint8_t* expanded;
  TileRows* rows;  // of four rows of W each
  float* scale;    // per group, one for each row of W
  int32_t* zero;
  uint8_t* panel;
  int32_t* sums;  // two buffers of (32 rows of x, 32 rows of W)
  double* total;  // (rows of x, 32)
  int64_t used;

  TileScratch(void* memory, const PackedMatrix& w, int64_t rows_of_x) {
    Arena arena{static_cast<char*>(memory)};
    expanded = arena.take<uint8_t>(kWidth * expanded_row_bytes(w));
    rows = arena.take<TileRows>(kWidth / kTile);
    scale = arena.take<float>(kWidth * groups_of(w));
    zero = arena.take<int32_t>(kWidth * groups_of(w));
    panel = arena.take<uint8_t>(TileSteps(w).chunk * kPairs * kTileBytes);
    sums = arena.take<int32_t>(2 * kSums);
    total = arena.take<double>(rows_of_x * kWidth);
    used = arena.used;
  }
};

// --- W to panels --------------------------------------------------------------------------------

// Codes, scales and zeros of 32 rows of W from `first` on; past the end the last row repeats.
void load_rows_of_w(const PackedMatrix& w, int64_t first, const TileScratch& s) {
  constexpr int64_t kSome = 64;
  PackedMatrix codes = w;  // entries of a codebook are looked up in registers
  codes.codebook = nullptr;
  for (int64_t t = 0; t < kWidth / kTile; ++t) {
    load_tile(codes, first + t * kTile, s.expanded + t * kTile * expanded_row_bytes(w), s.rows + t);
  }
  const int64_t groups = groups_of(w);
  float row[kSome];
  for (int64_t i = 0; i < kWidth; ++i) {
    const int64_t from = scale_row(w, first + i < w.rows ? first + i : w.rows - 1);
    for (int64_t g = 0; g < groups; g += kSome) {
      const int64_t count = groups - g < kSome ? groups - g : kSome;
      load_scales(w, from + g, count, row);
      for (int64_t j = 0; j < count; ++j) {
        s.scale[(g + j) * kWidth + i] = row[j];
        s.zero[(g + j) * kWidth + i] = zero_at(w, from + g + j);
      }
    }
  }
}

__m512i entries_of(const PackedMatrix& w) {
  uint8_t entries[16] = {};
  if (w.codebook != nullptr) {
    __builtin_memcpy(entries, w.codebook, static_cast<size_t>(w.levels));
  }
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}

// The integer scales of 16 rows of W in both words of their lanes, for the halves of block b, whose
// `steps` may be of different groups.
void load_integer_scales(const TileSteps& steps, int64_t b, int64_t t, const TileScratch& s,
                         __m512i* scale) {
  for (int64_t half = 0; half < 2; ++half) {
    int64_t step = (2 * b + half) * (kBlock / 2) / steps.columns;
    if (step >= steps.count) step = steps.count - 1;  // codes past the last column are 0
    const float* from = s.scale + step / steps.to_group * kWidth + t * kWRows;
    scale[half] =
        _mm512_mullo_epi32(_mm512_cvtps_epi32(_mm512_load_ps(from)), _mm512_set1_epi32(0x10001));
  }
}

// Blocks [from, to) to the panel, times the code's multiplier; kFold: times the integer scale of
// their group, where products fit in bytes: those of two bytes are one product of 16 bits.
template <int kBits, bool kBook, bool kFold = false>
void unpack_tiles(const PackedMatrix& w, const ColumnOrder& order, int64_t from, int64_t to,
                  const TileScratch& s) {
  const __m512i table = entries_of(w);
  const TileSteps steps(w);
  __m512i scale[2];
  for (int64_t b = from; b < to; ++b) {
    for (int64_t t = 0; t < kPairs; ++t) {
      __m512i v[kWRows];
#pragma GCC unroll 16
      for (int i = 0; i < kWRows; ++i) {
        const TileRows& rows = s.rows[t * 4 + i / kTile];
        v[i] = wide_bytes<kBits>(rows.block(i % kTile, b, 8 * kBits));
        if constexpr (kBook) v[i] = _mm512_shuffle_epi8(table, v[i]);
        if constexpr (kBits == 1 && !kBook) v[i] = _mm512_add_epi8(v[i], v[i]);
      }
      transpose_16(v);
      if constexpr (kFold) {
        load_integer_scales(steps, b, t, s, scale);
        for (int j = 0; j < 16; ++j) v[j] = _mm512_mullo_epi16(v[j], scale[order.place[j] / 8]);
      }
      uint8_t* tile = s.panel + ((b - from) * kPairs + t) * kTileBytes;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) _mm512_store_si512(tile + order.place[j] * kBlock, v[j]);
    }
  }
}

using Unpack = void (*)(const PackedMatrix& w, const ColumnOrder& order, int64_t from, int64_t to,
                        const TileScratch& s);

template <int kBits>
Unpack unpack_of_width(const PackedMatrix& w) {
  return w.codebook != nullptr ? unpack_tiles<kBits, true> : unpack_tiles<kBits, false>;
}

Unpack unpack_of(const PackedMatrix& w) {
  switch (stored_bits(w)) {
    case 1:
      return unpack_of_width<1>(w);
    case 2:
      return unpack_of_width<2>(w);
    case 3:
      return unpack_of_width<3>(w);
    case 4:
      return unpack_of_width<4>(w);
    default:
      return unpack_tiles<8, false>;
  }
}

// --- products -----------------------------------------------------------------------------------

constexpr int64_t kSumsPitch = kWidth * sizeof(int32_t);

template <int kTile>
void start_sums(const int32_t* from, bool onto) {
  if (onto) {
    tile::load<kTile>(from, kSumsPitch);
  } else {
    tile::zero<kTile>();
  }
}

// sums = kTiles tiles of x, `pitch` bytes apart, times the panel, over steps [from, to); `onto`:
// added to what they are.
template <int kTiles>
void sum_steps(const TileSteps& steps, int64_t from, int64_t to, const int8_t* x, int64_t pitch,
               const uint8_t* panel, bool onto, int32_t* sums) {
  start_sums<0>(sums, onto);
  start_sums<1>(sums + kWRows, onto);
  if constexpr (kTiles == 2) {
    start_sums<2>(sums + kXRows * kWidth, onto);
    start_sums<3>(sums + kXRows * kWidth + kWRows, onto);
  }
  for (int64_t step = from; step < to; ++step) {
    const int8_t* left = x + steps.offset_in_x(step);
    const uint8_t* right = panel + steps.offset_in_panel(step);
    tile::load<kRight>(right, kBlock);
    tile::load<kLeft>(left, kBlock);
    tile::load<kRight + 1>(right + kTileBytes, kBlock);
    tile::multiply_signed_unsigned<0, kLeft, kRight>();
    tile::multiply_signed_unsigned<1, kLeft, kRight + 1>();
    if constexpr (kTiles == 2) {
      tile::load<kLeft + 1>(left + pitch, kBlock);
      tile::multiply_signed_unsigned<2, kLeft + 1, kRight>();
      tile::multiply_signed_unsigned<3, kLeft + 1, kRight + 1>();
    }
  }
  tile::store<0>(sums, kSumsPitch);
  tile::store<1>(sums + kWRows, kSumsPitch);
  if constexpr (kTiles == 2) {
    tile::store<2>(sums + kXRows * kWidth, kSumsPitch);
    tile::store<3>(sums + kXRows * kWidth + kWRows, kSumsPitch);
  }
}

// total += scale * (sums - zero q_sum) for rows [m, m + count) of x; the products are exact.
void scale_sums(const TileScratch& s, const TiledX& x, const int32_t* sums, int64_t groups,
                int64_t g, int64_t m, int64_t count) {
  __m512d scale[kWidth / 8];
  __m512i zero[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kWidth / 8; ++i) {
    scale[i] = _mm512_cvtps_pd(_mm256_load_ps(s.scale + g * kWidth + 8 * i));
  }
#pragma GCC unroll 2
  for (int t = 0; t < kPairs; ++t) {
    zero[t] = _mm512_load_si512(s.zero + g * kWidth + t * kWRows);
  }
  for (int64_t i = 0; i < count; ++i) {
    const __m512i all = _mm512_set1_epi32(x.q_sum[(m + i) * groups + g]);
    double* total = s.total + (m + i) * kWidth;
#pragma GCC unroll 2
    for (int t = 0; t < kPairs; ++t) {
      const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums + i * kWidth + t * kWRows),
                                             _mm512_mullo_epi32(zero[t], all));
      const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(exact));
      const __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, 1));
      double* at = total + t * kWRows;
      _mm512_store_pd(at, _mm512_fmadd_pd(low, scale[2 * t], _mm512_load_pd(at)));
      _mm512_store_pd(at + 8, _mm512_fmadd_pd(high, scale[2 * t + 1], _mm512_load_pd(at + 8)));
    }
  }
}

// Rows [m, m + count) of x, in kTiles tiles, times the panel of blocks [from, to), onto totals.
template <int kTiles>
void multiply_chunk(const PackedMatrix& w, const TileSteps& steps, const TiledX& x, int64_t m,
                    int64_t count, int64_t from, int64_t to, const TileScratch& s) {
  const int64_t groups = groups_of(w), to_block = kBlock / steps.columns;
  const int64_t begin = from * to_block;
  const int64_t end = to * to_block < steps.count ? to * to_block : steps.count;
  const int8_t* left = x.q + m / kXRows * x.pitch + from * kTileBytes;
  const int64_t first = begin / steps.to_group;
  int64_t g = first;
  for (int64_t at = begin; at < end; at += steps.to_group, ++g) {
    const int64_t stop = end - at < steps.to_group ? end : at + steps.to_group;
    int32_t* sums = s.sums + g % 2 * kSums;
    sum_steps<kTiles>(steps, at - begin, stop - begin, left, x.pitch, s.panel, false, sums);
    // The group before, whose stores have had time to finish.
    if (g > first) scale_sums(s, x, s.sums + (g - 1) % 2 * kSums, groups, g - 1, m, count);
  }
  scale_sums(s, x, s.sums + (g - 1) % 2 * kSums, groups, g - 1, m, count);
}

// --- results ------------------------------------------------------------------------------------

inline __m512d eight_totals(const double* total) { return _mm512_load_pd(total); }
inline __m512d eight_totals(const int32_t* total) {
  return _mm512_cvtepi32_pd(_mm256_load_si256(reinterpret_cast<const __m256i*>(total)));
}

// Eight results of row m from row n of W on, as store_result() would; floats without a remainder.
template <typename Total>
void store_8(const Output& out, int64_t m, int64_t n, const Total* total, double step) {
  __m512d value = eight_totals(total);
  if (out.row_scale != nullptr) {
    value = _mm512_mul_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n)));
  }
  value = _mm512_mul_pd(value, _mm512_set1_pd(step));
  if (out.bias != nullptr) {
    value = _mm512_add_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n)));
  }
  auto* y = static_cast<float*>(out.data) + (out.row + m) * out.stride + n - out.first;
  _mm256_storeu_ps(y, _mm512_cvtpd_ps(value));
}

template <typename Total>
void store_rows(const Output& out, const Block& block, int64_t first, int64_t count,
                const Total* total) {
  const bool plain = out.type == FloatType::kFloat32 && out.remainder == nullptr;
  for (int64_t m = 0; m < block.rows; ++m, total += kWidth) {
    int64_t i = 0;
    for (; plain && i + 8 <= count; i += 8) store_8(out, m, first + i, total + i, block.step[m]);
    for (; i < count; ++i) store_result(out, m, first + i, total[i], block.step[m]);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
