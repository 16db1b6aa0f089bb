// Included by avx512.cpp alone: tiles of W for the gradient to x, decoded in registers. 128 codes
// of b bits fill 16 b bytes, so that lane i of a register holds columns 8 i .. 8 i + 7 and field j
// of all lanes is one register of floats:
//
//   lane        0                  1                  ...  15
//   columns     0 1 2 3 4 5 6 7    8 9 10 ...              ... 127
//   step j = 0  0                  8                       120      one register of the tile
//   step j = 1  1                  9                       121      shift right by b
//
// Up to four bits, a field names an entry of a register by itself: a permutation looks at the
// lowest four bits of a lane, and entries repeat for the bits of the next field. Where all 128
// columns have one scale the entries are weights; else integers, which a register of scales for
// each step multiplies.
#pragma once

#include "matmul/avx512_lanes.h"
#include "matmul/avx512_rows.h"
#include "matmul/gradient_sums.h"
#include "matmul/gradient_tile.h"

namespace pyrobust::matmul {
namespace {

constexpr int kTileLanes = 16, kTileSteps = 8;
static_assert(kTileLanes * kTileSteps == kGradientColumns);

// Columns ahead that are asked for: the rows of a tile are too far apart for the processor to see
// what comes next.
constexpr int64_t kPrefetched = 4 * kGradientColumns;

// Whether the tile from `column` on is decoded so: it is whole, and the scales of its columns fit a
// register.
bool has_lane_tile(const PackedMatrix& w, int64_t column) {
  if (column + kGradientColumns > w.cols) return false;
  return w.group_dim == 0 ||
         (column + kGradientColumns - 1) / w.group_size - column / w.group_size < kTileLanes;
}

struct LaneWords {
  __m512i low, high;  // high: columns 8 i + 4 .. 8 i + 7 at 8 bits, else unused
};

template <int kBits>
inline LaneWords lane_words(const uint8_t* codes) {
  if constexpr (kBits == 1) {
    const __m512i low = _mm512_cvtepu8_epi32(load_128(codes));
    return {low, low};
  } else if constexpr (kBits == 2) {
    const __m512i low =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return {low, low};
  } else if constexpr (kBits == 3) {  // four times 12 bytes to 16 bytes, three bytes to a lane
    const __m512i quarters = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0),
        _mm512_maskz_loadu_epi32(0x0fff, codes));
    const __m512i low =
        _mm512_shuffle_epi8(quarters, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                          0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
    return {low, low};
  } else if constexpr (kBits == 4) {
    const __m512i low = _mm512_loadu_si512(codes);
    return {low, low};
  } else {
    const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)};
  }
}

// The same of ternary rows, whose bytes become two bits a code first, all rows of a tile before
// they are read: a load that takes several stores waits for them.
class TernaryRows {
 public:
  TernaryRows(const PackedMatrix& w, int64_t first, int64_t count, int64_t column)
      : shift_(static_cast<unsigned>(2 * (column % kTritsPerByte))) {
    const int64_t byte = column / kTritsPerByte;
    const int64_t left = packed_row_bytes(w.cols, w.levels) - byte;
    const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* codes = code_row(w, first + i) + byte;
      __builtin_prefetch(codes + kPrefetched / kTritsPerByte);
      wide_two_bits(_mm256_maskz_loadu_epi8(there, codes), rows_ + kPitch * i);
    }
  }

  // The code of the first column begins up to eight bits behind that of its byte.
  LaneWords words(int64_t i) const {
    const auto at = [&](int64_t byte) {
      const auto* from = reinterpret_cast<const __m256i*>(rows_ + kPitch * i + byte);
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
    };
    const __m512i both = _mm512_or_si512(at(0), _mm512_slli_epi32(at(2), 16));
    const __m512i low = _mm512_srli_epi32(both, shift_);
    return {low, low};
  }

 private:
  static constexpr int64_t kPitch = 64;

  alignas(64) uint8_t rows_[kGradientRows * kPitch];
  unsigned shift_;
};

template <int kBits>
class BinaryRows {
 public:
  BinaryRows(const PackedMatrix& w, int64_t first, int64_t, int64_t column)
      : codes_(code_row(w, first) + column * kBits / 8),
        pitch_(packed_row_bytes(w.cols, w.levels)) {}

  LaneWords words(int64_t i) const {
    const uint8_t* codes = codes_ + i * pitch_;
    __builtin_prefetch(codes + kPrefetched * kBits / 8);
    return lane_words<kBits>(codes);
  }

 private:
  const uint8_t* codes_;
  int64_t pitch_;
};

template <int kBits>
inline __m512 step_values(const LaneWords& words, int j, __m512 entries) {
  if constexpr (kBits == 8) {
    const __m512i half = j < 4 ? words.low : words.high;
    const __m512i field = _mm512_srli_epi32(half, static_cast<unsigned>(8 * (j % 4)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(field, _mm512_set1_epi32(255)));
  } else {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words.low, static_cast<unsigned>(kBits * j)),
                                 entries);
  }
}

// What codes of up to four bits stand for before zero and scale.
inline __m512 lane_entries(const PackedMatrix& w, int bits) {
  if (bits == 8) return _mm512_setzero_ps();
  const GroupIntegers integers(w);
  alignas(64) float entries[16];
  for (int i = 0; i < 16; ++i) {
    entries[i] = static_cast<float>(integers.of_code[i & ((1 << bits) - 1)]);
  }
  return _mm512_load_ps(entries);
}

inline __m512 floats_of_bytes(const uint8_t* from, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from)));
}

// Scales (or the integers of two levels) and zeros from place `at` on, those of `mask`.
inline __m512 scales_at(const PackedMatrix& w, int64_t at, __mmask16 mask) {
  if (w.row_scale == nullptr) return load_floats(w.scale, w.scale_type, at, mask);
  return floats_of_bytes(static_cast<const uint8_t*>(w.scale) + at, mask);
}
inline __m512 zeros_at(const PackedMatrix& w, int64_t at, __mmask16 mask) {
  if (w.zero == nullptr) return _mm512_set1_ps(static_cast<float>(symmetric_zero(w)));
  return floats_of_bytes(w.zero + at, mask);
}

// The scales and zeros of a tile's columns: move_to() a row, then those of a step. This one is for
// groups along the row: of a step's lanes, place() says which of the row's groups they belong to.
class GroupScales {
 public:
  GroupScales(const PackedMatrix& w, int64_t column)
      : w_(w), groups_(scale_cols(w)), first_(column / w.group_size) {
    int64_t left = w.group_size - column % w.group_size;  // without a division a column
    int32_t group = 0;
    for (int k = 0; k < kGradientColumns; ++k, --left) {
      if (left == 0) {
        ++group;
        left = w.group_size;
      }
      place_[k % kTileSteps][k / kTileSteps] = group;
    }
    last_ = group;
    repeat_ = w.group_size % kTileSteps == 0 || last_ == 0;
  }

  bool one() const { return last_ == 0; }  // of them for all columns
  bool repeat() const { return repeat_; }  // those of step 0 are those of every step

  void move_to(int64_t n) {
    const int64_t at = n * groups_ + first_;
    scale_ = scales_at(w_, at, first_lanes(last_ + 1));
    zero_ = zeros_at(w_, at, first_lanes(last_ + 1));
    if (w_.row_scale != nullptr) scale_ = _mm512_mul_ps(scale_, _mm512_set1_ps(w_.row_scale[n]));
  }
  __m512 scale(int j) const { return _mm512_permutexvar_ps(place(j), scale_); }
  __m512 zero(int j) const { return _mm512_permutexvar_ps(place(j), zero_); }

 private:
  __m512i place(int j) const { return _mm512_load_si512(place_[j]); }

  const PackedMatrix& w_;
  int64_t groups_, first_;
  alignas(64) int32_t place_[kTileSteps][kTileLanes];
  int last_;  // group of the last column
  bool repeat_;
  __m512 scale_, zero_;
};

// Groups along the columns: a scale a column, for all rows of a group.
class ColumnScales {
 public:
  ColumnScales(const PackedMatrix& w, int64_t column) : w_(w), column_(column) {}

  bool one() const { return false; }
  bool repeat() const { return false; }

  void move_to(int64_t n) {
    const int64_t group = n / w_.group_size;
    if (group != group_) {
      group_ = group;
      load(group * w_.cols + column_);
    }
    row_scale_ = _mm512_set1_ps(w_.row_scale != nullptr ? w_.row_scale[n] : 1.0f);
  }
  __m512 scale(int j) const { return _mm512_mul_ps(_mm512_load_ps(scale_[j]), row_scale_); }
  __m512 zero(int j) const { return _mm512_load_ps(zero_[j]); }

 private:
  void load(int64_t at) {
    alignas(64) float scale[kGradientColumns], zero[kGradientColumns];
    for (int k = 0; k < kGradientColumns; k += kTileLanes) {
      _mm512_store_ps(scale + k, scales_at(w_, at + k, 0xffff));
      _mm512_store_ps(zero + k, zeros_at(w_, at + k, 0xffff));
    }
    for (int k = 0; k < kGradientColumns; ++k) {
      scale_[k % kTileSteps][k / kTileSteps] = scale[k];
      zero_[k % kTileSteps][k / kTileSteps] = zero[k];
    }
  }

  const PackedMatrix& w_;
  int64_t column_, group_ = -1;
  alignas(64) float scale_[kTileSteps][kTileLanes], zero_[kTileSteps][kTileLanes];
  __m512 row_scale_;
};

template <int kBits, typename Rows, typename Scales>
void lane_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column, float* tile) {
  const __m512 entries = lane_entries(w, kBits);
  const Rows rows(w, first, count, column);
  Scales scales(w, column);
  for (int64_t i = 0; i < count; ++i, tile += kGradientColumns) {
    const LaneWords words = rows.words(i);
    scales.move_to(first + i);
    const auto put = [&](int j, __m512 value) { _mm512_store_ps(tile + kTileLanes * j, value); };
    const auto weight = [](__m512 value, __m512 scale, __m512 zero) {
      return _mm512_mul_ps(_mm512_sub_ps(value, zero), scale);
    };
    if (!scales.repeat()) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileSteps; ++j) {
        put(j, weight(step_values<kBits>(words, j, entries), scales.scale(j), scales.zero(j)));
      }
      continue;
    }
    const __m512 scale = scales.scale(0), zero = scales.zero(0);
    if (kBits <= 4 && scales.one()) {
      const __m512 weights = weight(entries, scale, zero);
#pragma GCC unroll 8
      for (int j = 0; j < kTileSteps; ++j) put(j, step_values<kBits>(words, j, weights));
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kTileSteps; ++j) {
        put(j, weight(step_values<kBits>(words, j, entries), scale, zero));
      }
    }
  }
}

template <int kBits, typename Rows>
void lane_tile_of(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                  float* tile) {
  if (w.group_dim == 0) return lane_tile<kBits, Rows, ColumnScales>(w, first, count, column, tile);
  lane_tile<kBits, Rows, GroupScales>(w, first, count, column, tile);
}

void add_remainder_to_lanes(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                            float* tile) {
  for (int64_t i = 0; i < count; ++i, tile += kGradientColumns) {
    for_remainder(w, first + i, column, column + kGradientColumns, [&](int64_t k, float value) {
      tile[k % kTileSteps * kTileLanes + k / kTileSteps] += value;
    });
  }
}

void wide_gradient_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                        float* tile) {
  if (!has_lane_tile(w, column)) {
    return plain_gradient_tile<Avx512Codes>(w, first, count, column, tile);
  }
  switch (w.levels) {
    case 2:
      lane_tile_of<1, BinaryRows<1>>(w, first, count, column, tile);
      break;
    case kTernaryLevels:
      lane_tile_of<2, TernaryRows>(w, first, count, column, tile);
      break;
    case 4:
      lane_tile_of<2, BinaryRows<2>>(w, first, count, column, tile);
      break;
    case 8:
      lane_tile_of<3, BinaryRows<3>>(w, first, count, column, tile);
      break;
    case 16:
      lane_tile_of<4, BinaryRows<4>>(w, first, count, column, tile);
      break;
    default:
      lane_tile_of<8, BinaryRows<8>>(w, first, count, column, tile);
  }
  if (w.remainder.offsets != nullptr) add_remainder_to_lanes(w, first, count, column, tile);
}

}  // namespace
}  // namespace pyrobust::matmul
