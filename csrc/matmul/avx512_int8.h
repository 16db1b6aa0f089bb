// Included by avx512.cpp alone: the product with activations rounded to 8 bits, for groups of whole
// blocks, on the dot-product instruction of AVX-512 VNNI (unsigned codes times signed x).
//
// Up to four rows of x: avx512_few.h. More: 32 rows of W are unpacked into a panel whose register
// holds 4 columns of 16 rows, so that sums need no lanes added; x is broadcast, 8 rows at a time:
//
//   panel   block 0, columns 0..3: rows 0..15, rows 16..31; columns 4..7: ...     64 bytes each
//
// Both give the integer sums and the double epilogue of matmul.h, hence the same bits.
#pragma once

#include "matmul/avx512_few.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kWidth = kWideTiles * kLanes;

// Four columns of 16 rows each, v transposed, to places `from` .. `from` + 15 of tile t's panel.
inline void store_panel(__m512i* v, int count, uint8_t* panel, int64_t t) {
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    _mm512_storeu_si512(panel + (j * kWideTiles + t) * kBlock, v[j]);
  }
}

template <int kBits, bool kBook>
inline void unpack_block(const WideScratch& s, __m512i table, int64_t b, int64_t t,
                         uint8_t* panel) {
  __m512i v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    v[i] = wide_values<kBits, kBook>(
        s.rows[t * 4 + i / kTile].block(i % kTile, b, 8 * width_of(kBits)), table);
    if constexpr (kBits == 1 && !kBook) v[i] = _mm512_add_epi8(v[i], v[i]);
  }
  transpose_16(v);
  store_panel(v, kLanes, panel, t);
}

// Two blocks of 4 bits: of either register the lower eight dwords belong to the first block.
template <bool kBook>
inline void unpack_pair(const WideScratch& s, __m512i table, int64_t b, int64_t t, uint8_t* panel) {
  constexpr int64_t kHalf = 8 * kWideTiles * kBlock;
  __m512i low[kLanes], high[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const IntegerPair pair =
        nibble_pair<kBook>(s.rows[t * 4 + i / kTile].row[i % kTile] + b * 32, table);
    low[i] = pair.low;
    high[i] = pair.high;
  }
  transpose_16(low);
  store_panel(low, 8, panel, t);
  store_panel(low + 8, 8, panel + 2 * kHalf, t);
  transpose_16(high);
  store_panel(high, 8, panel + kHalf, t);
  store_panel(high + 8, 8, panel + 3 * kHalf, t);
}

// Blocks [from, to) of 32 rows of W to the panel.
template <int kBits, bool kBook>
void unpack_wide(const WideScratch& s, __m512i table, int64_t from, int64_t to) {
  constexpr int64_t kPitch = kLanes * kWideTiles * kBlock;
  for (int64_t t = 0; t < kWideTiles; ++t) {
    int64_t b = from;
    if constexpr (kBits == 4) {
      for (; b + 2 <= to && b + 2 <= s.rows->whole; b += 2) {
        unpack_pair<kBook>(s, table, b, t, s.panel + (b - from) * kPitch);
      }
    }
    for (; b < to; ++b) unpack_block<kBits, kBook>(s, table, b, t, s.panel + (b - from) * kPitch);
  }
}

// kRows rows of each part of one tile of x times `steps` times four columns of the panel.
template <int kRows, int kParts>
inline void panel_sums(const uint8_t* panel, const int8_t* q, int64_t steps, int32_t* sums) {
  constexpr int kAll = kRows * kParts;
  __m512i sum[kAll][kWideTiles];
#pragma GCC unroll 8
  for (int i = 0; i < kAll; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
  for (int64_t j = 0; j < steps; ++j, panel += kWideTiles * kBlock, q += 4 * kTileRows) {
    const __m512i left = _mm512_loadu_si512(panel);
    const __m512i right = _mm512_loadu_si512(panel + kBlock);
#pragma GCC unroll 8
    for (int i = 0; i < kAll; ++i) {
      int32_t four;
      __builtin_memcpy(&four, q + 4 * (i / kRows * (kTileRows / kParts) + i % kRows), sizeof(four));
      const __m512i value = _mm512_set1_epi32(four);
      add_dots(sum[i][0], left, value);
      add_dots(sum[i][1], right, value);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kAll; ++i) {
    _mm512_store_si512(sums + i * kWidth, sum[i][0]);
    _mm512_store_si512(sums + i * kWidth + kLanes, sum[i][1]);
  }
}

// Scale and zero of a group, in registers.
struct GroupLanes {
  __m512d scale[2 * kWideTiles];
  __m512i zero[kWideTiles];

  GroupLanes(const WideScratch& s, int64_t g) {
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kWideTiles; ++i) {
      scale[i] = _mm512_cvtps_pd(_mm256_loadu_ps(s.scale + g * kWidth + 8 * i));
    }
#pragma GCC unroll 2
    for (int t = 0; t < kWideTiles; ++t) {
      zero[t] = _mm512_loadu_si512(s.zero + g * kWidth + t * kLanes);
    }
  }
};

inline __m512i less_zeros(const int32_t* sums, __m512i zero, int32_t q_sum) {
  return _mm512_sub_epi32(_mm512_load_si512(sums),
                          _mm512_mullo_epi32(zero, _mm512_set1_epi32(q_sum)));
}

inline void add_scaled(__m512d sums, __m512d scale, double* total) {
  _mm512_store_pd(total, _mm512_fmadd_pd(sums, scale, _mm512_load_pd(total)));
}

inline __m512d low_doubles(__m512i v) { return _mm512_cvtepi32_pd(_mm512_castsi512_si256(v)); }
inline __m512d high_doubles(__m512i v) {
  return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v, 1));
}

// total += scale * sums, of sixteen lanes.
__attribute__((always_inline)) inline void add_lanes(__m512i sums, const __m512d* scale,
                                                     double* total) {
  add_scaled(low_doubles(sums), scale[0], total);
  add_scaled(high_doubles(sums), scale[1], total + 8);
}

// total += scale step (256 high + low) of parts[0] and parts[1], and so on for lower ones. kNarrow:
// is_narrow().
template <int kParts, bool kNarrow>
__attribute__((always_inline)) inline void add_lanes_of_parts(const __m512i* parts, __m512d step,
                                                              const __m512d* scale, double* total) {
  const __m512d unit = _mm512_set1_pd(256.0);
  __m512d first, second;
  if constexpr (kNarrow) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(parts[0], 8), parts[1]);
    first = low_doubles(both);
    second = high_doubles(both);
  } else {
    first = _mm512_fmadd_pd(low_doubles(parts[0]), unit, low_doubles(parts[1]));
    second = _mm512_fmadd_pd(high_doubles(parts[0]), unit, high_doubles(parts[1]));
  }
#pragma GCC unroll 2
  for (int p = 2; p < kParts; ++p) {
    first = _mm512_fmadd_pd(first, unit, low_doubles(parts[p]));
    second = _mm512_fmadd_pd(second, unit, high_doubles(parts[p]));
  }
  add_scaled(_mm512_mul_pd(first, step), scale[0], total);
  add_scaled(_mm512_mul_pd(second, step), scale[1], total + 8);
}

// total += scale * (sums - zero q_sum) for `count` rows of x from m on; the products are exact.
inline void scale_rows(const WideRows& x, const int32_t* sums, int64_t count, int64_t groups,
                       int64_t g, int64_t m, const WideScratch& s) {
  const GroupLanes lanes(s, g);
  const int32_t* q_sum = x.q_sum + m * groups + g;
  double* total = s.total + m * kWidth;
  for (int64_t i = 0; i < count; ++i, q_sum += groups, total += kWidth, sums += kWidth) {
#pragma GCC unroll 2
    for (int t = 0; t < kWideTiles; ++t) {
      const __m512i exact = less_zeros(sums + t * kLanes, lanes.zero[t], *q_sum);
      add_lanes(exact, lanes.scale + 2 * t, total + t * kLanes);
    }
  }
}

// The same of parts, as add_parts(); `sums` has `count` rows of the highest parts, then the next.
template <int kParts, bool kNarrow>
inline void scale_parts(const WideRows& x, const int32_t* sums, int64_t count, int64_t groups,
                        int64_t g, int64_t m, const WideScratch& s) {
  const GroupLanes lanes(s, g);
  const int32_t* q_sum = x.q_sum + kParts * m * groups + g;
  const double* step = x.step + m * groups + g;
  double* total = s.total + m * kWidth;
  for (int64_t i = 0; i < count; ++i, q_sum += kParts * groups, step += groups) {
    const __m512d own = _mm512_set1_pd(*step);
#pragma GCC unroll 2
    for (int t = 0; t < kWideTiles; ++t) {
      const int64_t at = i * kWidth + t * kLanes;
      __m512i parts[kParts];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kParts; ++p) {
        parts[p] = less_zeros(sums + p * count * kWidth + at, lanes.zero[t], q_sum[p * groups]);
      }
      add_lanes_of_parts<kParts, kNarrow>(parts, own, lanes.scale + 2 * t, total + at);
    }
  }
}

// kRows rows of x from row m on, a multiple of a tile's, times the panel of blocks [from, to), onto
// their totals.
template <int kRows, int kParts>
void panel_wide(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t from, int64_t to,
                const WideScratch& s) {
  const int64_t groups = groups_of(w), per_group = group_blocks(w);
  const bool narrow = is_narrow(w);
  alignas(64) int32_t sums[kRows * kParts * kWidth];
  int64_t g = from / per_group;
  for (int64_t b = from; b < to; b += per_group, ++g) {
    const int64_t stop = to - b < per_group ? to : b + per_group;
    panel_sums<kRows, kParts>(s.panel + (b - from) * kLanes * kWideTiles * kBlock,
                              x.tile(m) + b * kBlock * kTileRows, (stop - b) * kLanes, sums);
    if constexpr (kParts == 1) {
      scale_rows(x, sums, kRows, groups, g, m, s);
    } else if (narrow) {
      scale_parts<kParts, true>(x, sums, kRows, groups, g, m, s);
    } else {
      scale_parts<kParts, false>(x, sums, kRows, groups, g, m, s);
    }
  }
}

using PanelProduct = void (*)(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t from,
                              int64_t to, const WideScratch& s);

// By rows of x, from 1 on.
constexpr PanelProduct kPanelProducts[kTileRows] = {
    panel_wide<1, 1>, panel_wide<2, 1>, panel_wide<3, 1>, panel_wide<4, 1>,
    panel_wide<5, 1>, panel_wide<6, 1>, panel_wide<7, 1>, panel_wide<8, 1>};
constexpr PanelProduct kPanelParts[kTileRows / 2] = {panel_wide<1, 2>, panel_wide<2, 2>,
                                                     panel_wide<3, 2>, panel_wide<4, 2>};
constexpr PanelProduct kPanelThreeParts[kTileRows / 3] = {panel_wide<1, 3>, panel_wide<2, 3>};
constexpr PanelProduct kPanelFourParts[kTileRows / 4] = {panel_wide<1, 4>, panel_wide<2, 4>};

void panel_rows_of_x(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t from, int64_t to,
                     const WideScratch& s) {
  const int64_t left = x.rows - m, count = left < x.x_rows() ? left : x.x_rows();
  const PanelProduct* const of_parts[] = {kPanelProducts, kPanelParts, kPanelThreeParts,
                                          kPanelFourParts};
  of_parts[x.parts - 1][count - 1](w, x, m, from, to, s);
}

// To nearest even; a NaN stays one: bfloat16_from_float().
inline __m256i bfloat16_of(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, quiet));
}

inline void store_floats(void* data, FloatType type, int64_t at, __m512 value) {
  if (type == FloatType::kFloat32) {
    _mm512_storeu_ps(static_cast<float*>(data) + at, value);
    return;
  }
  // The sign and the bits of a NaN are those of float16_from_float().
  const __m512i one_nan =
      _mm512_or_si512(_mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(INT32_MIN)),
                      _mm512_set1_epi32(0x7fc00000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512 clean =
      _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(value), nan, one_nan));
  const __m256i halves = type == FloatType::kFloat16
                             ? _mm512_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT)
                             : bfloat16_of(value);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + at), halves);
}

// 16 results of row m from row n of W on, as store_result() would without a remainder.
void store_16(const Output& out, int64_t m, int64_t n, const double* total, double step) {
  __m256 half[2];
  for (int i = 0; i < 16; i += 8) {
    __m512d value = _mm512_loadu_pd(total + i);
    if (out.row_scale != nullptr) {
      value = _mm512_mul_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n + i)));
    }
    value = _mm512_mul_pd(value, _mm512_set1_pd(step));
    if (out.bias != nullptr) {
      value = _mm512_add_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n + i)));
    }
    half[i / 8] = _mm512_cvtpd_ps(value);
  }
  store_floats(out.data, out.type, (out.row + m) * out.stride + n - out.first,
               _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1));
}

template <int kBits, bool kBook>
void multiply_panels(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                     int64_t end, const Output& out, const WideScratch& s) {
  const int64_t blocks = blocks_of(w), chunk = wide_chunk(w), rows = block.rows;
  const __m512i table = codebook_table(w);
  const bool plain = out.remainder == nullptr;
  for (int64_t first = begin; first < end; first += kWidth) {
    load_wide_codes(w, first, kWidth, s);
    for (int64_t t = 0; t < kWideTiles; ++t) {
      load_lanes<kLanes>(w, first + t * kLanes, kWidth, t * kLanes, first == begin, s);
    }
    __builtin_memset(s.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += chunk) {
      const int64_t to = blocks - from < chunk ? blocks : from + chunk;
      unpack_wide<kBits, kBook>(s, table, from, to);
      for (int64_t m = 0; m < rows; m += x.x_rows()) panel_rows_of_x(w, x, m, from, to, s);
    }
    const int64_t count = end - first < kWidth ? end - first : kWidth;
    for (int64_t m = 0; m < rows; ++m) {
      const double* total = s.total + m * kWidth;
      const double step = x.parts > 1 ? 1.0 : block.step[m];
      int64_t i = 0;
      for (; plain && i + kLanes <= count; i += kLanes) {
        store_16(out, m, first + i, total + i, step);
      }
      for (; i < count; ++i) store_result(out, m, first + i, total[i], step);
    }
  }
}

template <int kBits, bool kBook>
void multiply_few_bytes(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                        int64_t end, const Output& out, const WideScratch& s) {
  if (x.parts == 2) {
    if (x.rows == 1) return multiply_few_rows<kBits, kBook, 2, 2>(w, x, block, begin, end, out, s);
    return multiply_few_rows<kBits, kBook, 4, 2>(w, x, block, begin, end, out, s);
  }
  switch (x.rows) {
    case 1:
      return multiply_few_rows<kBits, kBook, 1>(w, x, block, begin, end, out, s);
    case 2:
      return multiply_few_rows<kBits, kBook, 2>(w, x, block, begin, end, out, s);
    case 3:
      return multiply_few_rows<kBits, kBook, 3>(w, x, block, begin, end, out, s);
    default:
      return multiply_few_rows<kBits, kBook, kFewRows>(w, x, block, begin, end, out, s);
  }
}

template <int kBits, bool kBook>
void multiply_wide(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* memory) {
  const WideRows x(const_cast<void*>(block.data), w, block.rows, mode);
  const WideScratch s(memory, w, block.rows);
  if (x.tiled()) return multiply_panels<kBits, kBook>(w, x, block, begin, end, out, s);
  if constexpr (kBits == 2 && !kBook) {
    if (x.has_trits())
      return multiply_few_bytes<kFiveToAByte, false>(w, x, block, begin, end, out, s);
  }
  multiply_few_bytes<kBits, kBook>(w, x, block, begin, end, out, s);
}

}  // namespace
}  // namespace pyrobust::matmul
