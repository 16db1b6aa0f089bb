// Included by avx512.cpp alone: tiles of W for the gradient to x where g has 16 bits. With the
// scales of W in it, g becomes fixed-point numbers of 16 bits, one step a row of g, 64 rows and
// group of W; they meet code - zero in 16-bit integer products, two rows of W an instruction, twice
// as many as float products. Sums are exact.
//
// Lanes hold eight columns as in avx512_gradient.h. Where kGroups groups share the 128 columns,
// lane l belongs to group l mod kGroups, so that one load repeats the numbers of g for these
// groups:
//
//   lane     0      1      2      3      4 ...         two groups of 64 columns
//   columns  0..7   64..71 8..15  72..79 16..23
//   g        a0     a1     a0     a1     a0            each two 16-bit numbers: rows 2 p and 2 p +
//   1
#pragma once

#include "matmul/avx512_gradient.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kPairs = kGradientRows / 2;  // of rows of W

// Groups in the tile from `column` on, where it is taken so: 1, 2 or 4; else 0.
int word_tile_groups(const PackedMatrix& w, int64_t column) {
  if (w.group_dim == 0 || w.remainder.offsets != nullptr || column + kGradientColumns > w.cols) {
    return 0;
  }
  const int64_t first = column / w.group_size;
  if ((column + kGradientColumns - 1) / w.group_size == first) return 1;
  return w.group_size == 64 ? 2 : w.group_size == 32 ? 4 : 0;
}

// Of lane l: which eight columns of the tile it holds.
constexpr int eight_of_lane(int groups, int l) {
  return l % groups * (kTileLanes / groups) + l / groups;
}

template <int kGroups>
inline __m512i spread_groups(const void* from) {
  if constexpr (kGroups == 1) {
    int32_t value;
    __builtin_memcpy(&value, from, sizeof(value));
    return _mm512_set1_epi32(value);
  } else if constexpr (kGroups == 2) {
    int64_t value;
    __builtin_memcpy(&value, from, sizeof(value));
    return _mm512_set1_epi64(value);
  } else {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
}

// sum + the products of both words of each lane; an asm statement as add_dots(). By value: gcc 12
// leaves sums in memory that an asm statement changes there.
inline __m512i with_word_dots(__m512i sum, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

template <int kGroups>
struct WordTile {
  alignas(64) float scale[kGroups][kGradientRows];
  alignas(64) int32_t of_pair[kPairs][kGradientColumns];  // two rows of W a lane
};

// Some rows of g for one tile.
constexpr int64_t kWordRows = 32;
template <int kGroups>
struct WordRows {
  float step[kWordRows][kGroups];
  alignas(64) int32_t q[kWordRows][kPairs * kGroups];  // of each pair the groups in turn
};

// --- W ------------------------------------------------------------------------------------------

template <int kGroups>
class WordDecoder {
 public:
  WordDecoder(const PackedMatrix& w, int bits) {
    alignas(64) int16_t entries[32] = {};
    if (bits < 8) {
      const GroupIntegers integers(w);
      for (int i = 0; i < 32; ++i) {
        entries[i] = static_cast<int16_t>(integers.of_code[i & ((1 << bits) - 1)]);
      }
    }
    entries_ = _mm512_load_si512(entries);
    alignas(64) int32_t place[kTileLanes];
    for (int l = 0; l < kTileLanes; ++l) place[l] = eight_of_lane(kGroups, l);
    place_ = _mm512_load_si512(place);
  }

  LaneWords placed(LaneWords words, int bits) const {
    if (kGroups == 1) return words;
    const __m512i low = _mm512_permutexvar_epi32(place_, words.low);
    return {low, bits == 8 ? _mm512_permutexvar_epi32(place_, words.high) : low};
  }

  // Column j of each lane's, of rows a and b: the low and the high word of the lane.
  template <int kBits>
  __m512i values(const LaneWords& a, const LaneWords& b, int j) const {
    const bool upper = kBits == 8 && j >= 4;
    const auto down = static_cast<unsigned>(kBits == 8 ? 8 * (j % 4) : kBits * j);
    const __m512i low = _mm512_srli_epi32(upper ? a.high : a.low, down);
    const __m512i second = upper ? b.high : b.low;
    const __m512i high =
        down < 16 ? _mm512_slli_epi32(second, 16 - down) : _mm512_srli_epi32(second, down - 16);
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
    if constexpr (kBits == 8) return _mm512_and_si512(both, _mm512_set1_epi16(255));
    return _mm512_permutexvar_epi16(both, entries_);
  }

 private:
  __m512i entries_, place_;
};

// Zeros of rows n and m, one a group, as the words of a lane.
template <int kGroups>
inline __m512i zero_words(const PackedMatrix& w, int64_t groups, int64_t first, int64_t n,
                          int64_t m) {
  if (w.zero == nullptr) return _mm512_set1_epi16(static_cast<int16_t>(symmetric_zero(w)));
  uint32_t both[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    both[g] = w.zero[n * groups + first + g] | static_cast<uint32_t>(w.zero[m * groups + first + g])
                                                   << 16;
  }
  return spread_groups<kGroups>(both);
}

template <int kBits, typename Rows, int kGroups>
void write_word_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                     WordTile<kGroups>* tile) {
  const WordDecoder<kGroups> decoder(w, kBits);
  const Rows rows(w, first, count, column);
  const int64_t groups = scale_cols(w), group = column / w.group_size;
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t next = i + 1 < count ? i + 1 : i;  // times a g of 0
    const LaneWords a = decoder.placed(rows.words(i), kBits);
    const LaneWords b = decoder.placed(rows.words(next), kBits);
    const __m512i zero = zero_words<kGroups>(w, groups, group, first + i, first + next);
#pragma GCC unroll 8
    for (int j = 0; j < kTileSteps; ++j) {
      const __m512i value = _mm512_sub_epi16(decoder.template values<kBits>(a, b, j), zero);
      _mm512_store_si512(tile->of_pair[i / 2] + kTileLanes * j, value);
    }
  }
}

template <int kGroups>
void load_word_scales(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                      WordTile<kGroups>* tile) {
  const int64_t groups = scale_cols(w), group = column / w.group_size;
  for (int64_t i = 0; i < count; ++i) {
    __m512 scale = scales_at(w, (first + i) * groups + group, (1 << kGroups) - 1);
    if (w.row_scale != nullptr)
      scale = _mm512_mul_ps(scale, _mm512_set1_ps(w.row_scale[first + i]));
    alignas(64) float of_group[kTileLanes];
    if constexpr (kGroups == 1) {
      _mm_store_ss(tile->scale[0] + i, _mm512_castps512_ps128(scale));
    } else {
      _mm512_store_ps(of_group, scale);
      for (int g = 0; g < kGroups; ++g) tile->scale[g][i] = of_group[g];
    }
  }
}

// --- g ------------------------------------------------------------------------------------------

// The largest lane of v in all lanes.
inline __m512i largest_everywhere(__m512i v) {
  v = _mm512_max_epu32(v, _mm512_shuffle_i64x2(v, v, 0x4e));
  v = _mm512_max_epu32(v, _mm512_shuffle_i64x2(v, v, 0xb1));
  v = _mm512_max_epu32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
  return _mm512_max_epu32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
}

struct WordRow {
  __m512i pairs[2];  // of rows 2 p and 2 p + 1 of W
};

// 64 values, those past `count` as 0, in steps of a power of two of which the largest has at most
// 32512. A row that is not finite has steps of NaN.
inline WordRow fixed_point(const float* g, const float* scale, int64_t count, float* step) {
  __m512 value[4];
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __mmask16 mask = first_lanes(count - kTileLanes * r);
    value[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, g + kTileLanes * r),
                             _mm512_maskz_loadu_ps(mask, scale + kTileLanes * r));
    const __m512i size =
        _mm512_and_si512(_mm512_castps_si512(value[r]), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, size);
  }
  largest = largest_everywhere(largest);
  const __m512i power =
      _mm512_srli_epi32(_mm512_add_epi32(largest, _mm512_set1_epi32(0x20000)), 23);
  const __m512i exponent =
      _mm512_max_epi32(_mm512_sub_epi32(power, _mm512_set1_epi32(14)), _mm512_set1_epi32(1));
  const __m512 inverse = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), exponent), 23));
  const bool finite = _mm_cvtsi128_si32(_mm512_castsi512_si128(largest)) < 0x7f800000;
  *step = finite ? _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)))
                 : __builtin_nanf("");
  __m256i half[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    half[r] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(value[r], inverse)));
  }
  return {{_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1),
           _mm512_inserti64x4(_mm512_castsi256_si512(half[2]), half[3], 1)}};
}

// Lanes 0, 0, 1, 1, ... of a and b in turn.
inline void interleave_32(__m512i a, __m512i b, __m512i* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  out[0] = _mm512_permutex2var_epi32(a, low, b);
  out[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}
inline void interleave_64(__m512i a, __m512i b, __m512i* out) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  out[0] = _mm512_permutex2var_epi64(a, low, b);
  out[1] = _mm512_permutex2var_epi64(a, _mm512_add_epi64(low, _mm512_set1_epi64(4)), b);
}

template <int kGroups>
inline void store_pairs(const WordRow* row, int32_t* q) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h, q += kTileLanes * kGroups) {
    __m512i out[4];
    if constexpr (kGroups == 1) {
      out[0] = row[0].pairs[h];
    } else if constexpr (kGroups == 2) {
      interleave_32(row[0].pairs[h], row[1].pairs[h], out);
    } else {
      __m512i first[2], last[2];
      interleave_32(row[0].pairs[h], row[1].pairs[h], first);
      interleave_32(row[2].pairs[h], row[3].pairs[h], last);
      interleave_64(first[0], last[0], out);
      interleave_64(first[1], last[1], out + 2);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) _mm512_store_si512(q + kTileLanes * g, out[g]);
  }
}

template <int kGroups>
void prepare_words(const WordTile<kGroups>& tile, const float* g, int64_t rows, int64_t count,
                   WordRows<kGroups>* to) {
  for (int64_t m = 0; m < rows; ++m) {
    WordRow row[kGroups];
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) {
      row[i] = fixed_point(g + m * kGradientRows, tile.scale[i], count, to->step[m] + i);
    }
    store_pairs<kGroups>(row, to->q[m]);
  }
}

// --- products -----------------------------------------------------------------------------------

template <int kGroups, int kRows, int kRegisters>
void add_word_rows(const WordTile<kGroups>& tile, const WordRows<kGroups>& g, int64_t m,
                   int64_t pairs, float* totals) {
  for (int k = 0; k < kGradientColumns; k += kRegisters * kTileLanes) {
    __m512i sum[kRows][kRegisters];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r) sum[i][r] = _mm512_setzero_si512();
    }
    for (int64_t p = 0; p < pairs; ++p) {
      __m512i w[kRegisters];
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r) {
        w[r] = _mm512_load_si512(tile.of_pair[p] + k + kTileLanes * r);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i a = spread_groups<kGroups>(g.q[m + i] + p * kGroups);
#pragma GCC unroll 8
        for (int r = 0; r < kRegisters; ++r) sum[i][r] = with_word_dots(sum[i][r], a, w[r]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512 step = _mm512_castsi512_ps(spread_groups<kGroups>(g.step[m + i]));
#pragma GCC unroll 8
      for (int r = 0; r < kRegisters; ++r) {
        float* to = totals + (m + i) * kGradientColumns + k + kTileLanes * r;
        const __m512 value = _mm512_cvtepi32_ps(sum[i][r]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(value, step, _mm512_loadu_ps(to)));
      }
    }
  }
}

template <int kGroups>
void add_word_tile(const WordTile<kGroups>& tile, const WordRows<kGroups>& g, int64_t rows,
                   int64_t pairs, float* totals) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) add_word_rows<kGroups, 8, 2>(tile, g, m, pairs, totals);
  for (; m + 4 <= rows; m += 4) add_word_rows<kGroups, 4, 4>(tile, g, m, pairs, totals);
  for (; m + 2 <= rows; m += 2) add_word_rows<kGroups, 2, 8>(tile, g, m, pairs, totals);
  if (m < rows) add_word_rows<kGroups, 1, 8>(tile, g, m, pairs, totals);
}

template <int kGroups>
void add_gradient_words_of(const float* g, int64_t rows, int64_t count, const void* data,
                           float* totals) {
  const auto& tile = *static_cast<const WordTile<kGroups>*>(data);
  WordRows<kGroups> prepared;
  for (int64_t m = 0; m < rows; m += kWordRows) {
    const int64_t some = rows - m < kWordRows ? rows - m : kWordRows;
    prepare_words<kGroups>(tile, g + m * kGradientRows, some, count, &prepared);
    add_word_tile<kGroups>(tile, prepared, some, ceil_div(count, 2), totals + m * kGradientColumns);
  }
}

// How the codes of a format are read.
template <int kWidth, typename Reader>
struct CodeRows {
  static constexpr int kBits = kWidth;
  using Rows = Reader;
};

template <int kGroups>
void gradient_words_of(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                       void* data) {
  auto* tile = static_cast<WordTile<kGroups>*>(data);
  load_word_scales<kGroups>(w, first, count, column, tile);
  const auto write = [&](auto of) {
    write_word_tile<of.kBits, typename decltype(of)::Rows, kGroups>(w, first, count, column, tile);
  };
  switch (w.levels) {
    case 2:
      write(CodeRows<1, BinaryRows<1>>());
      break;
    case kTernaryLevels:
      write(CodeRows<2, TernaryRows>());
      break;
    case 4:
      write(CodeRows<2, BinaryRows<2>>());
      break;
    case 8:
      write(CodeRows<3, BinaryRows<3>>());
      break;
    case 16:
      write(CodeRows<4, BinaryRows<4>>());
      break;
    default:
      write(CodeRows<8, BinaryRows<8>>());
  }
}

int64_t gradient_words_bytes(const PackedMatrix& w, int64_t column) {
  switch (word_tile_groups(w, column)) {
    case 1:
      return sizeof(WordTile<1>);
    case 2:
      return sizeof(WordTile<2>);
    case 4:
      return sizeof(WordTile<4>);
    default:
      return 0;
  }
}

void gradient_words(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                    void* tile) {
  switch (word_tile_groups(w, column)) {
    case 1:
      return gradient_words_of<1>(w, first, count, column, tile);
    case 2:
      return gradient_words_of<2>(w, first, count, column, tile);
    default:
      return gradient_words_of<4>(w, first, count, column, tile);
  }
}

void add_gradient_words(const PackedMatrix& w, int64_t column, const float* g, int64_t rows,
                        int64_t count, const void* tile, float* totals) {
  switch (word_tile_groups(w, column)) {
    case 1:
      return add_gradient_words_of<1>(g, rows, count, tile, totals);
    case 2:
      return add_gradient_words_of<2>(g, rows, count, tile, totals);
    default:
      return add_gradient_words_of<4>(g, rows, count, tile, totals);
  }
}

void wide_gradient_order(const PackedMatrix& w, int64_t column, bool words, int* order) {
  if (!words && !has_lane_tile(w, column)) return plain_gradient_order(w, column, false, order);
  const int groups = words ? word_tile_groups(w, column) : 1;
  for (int p = 0; p < kGradientColumns; ++p) {
    order[p] = kTileSteps * eight_of_lane(groups, p % kTileLanes) + p / kTileLanes;
  }
}

}  // namespace
}  // namespace pyrobust::matmul
