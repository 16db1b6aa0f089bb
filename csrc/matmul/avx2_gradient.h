// Included by avx2.cpp alone: tiles of W for the gradient to x, decoded in registers in the order
// of avx2_decode.h, whose lanes hold eight columns: those of one group. Other tiles are in plain
// order.
#pragma once

#include "matmul/avx2_rows.h"
#include "matmul/avx2_tile.h"
#include "matmul/gradient_tile.h"

namespace pyrobust::matmul {
namespace {

constexpr int kLaneCount = 8;

// Columns ahead that are asked for: the rows of a tile are too far apart for the processor to see
// what comes next.
constexpr int64_t kPrefetched = 4 * kGradientColumns;

bool has_lane_tile(const PackedMatrix& w, int64_t column) {
  const int64_t last = column + kGradientColumns - 1;
  return w.group_dim == 1 && w.codebook == nullptr && w.levels != kTernaryLevels &&
         w.row_scale == nullptr && w.remainder.offsets == nullptr && last < w.cols &&
         (w.group_size % kLaneCount == 0 || column / w.group_size == last / w.group_size);
}

// With a float scale.
inline float one_scale(const PackedMatrix& w, int64_t at) {
  if (w.scale_type != FloatType::kFloat16) return load_float(w.scale, at, w.scale_type);
  return _cvtsh_ss(static_cast<const uint16_t*>(w.scale)[at]);
}

// Scales and zeros of a tile's columns, a lane each in both of its blocks.
class LaneScales {
 public:
  LaneScales(const PackedMatrix& w, int64_t column)
      : w_(w),
        groups_(scale_cols(w)),
        first_(column / w.group_size),
        count_((column + kGradientColumns - 1) / w.group_size - first_ + 1) {
    for (int64_t l = 0; l < 2 * kLaneCount; ++l) {
      place_[l] = static_cast<int32_t>((column + kLaneCount * l) / w.group_size - first_);
    }
  }

  void move_to(int64_t n) {
    const int64_t at = n * groups_ + first_;
    for (int64_t g = 0; g < count_; ++g) {
      scale_[g] = one_scale(w_, at + g);
      zero_[g] = kMagic + static_cast<float>(zero_at(w_, at + g));
    }
  }
  __m256 scale(int64_t block) const { return of_lanes(scale_, block); }
  __m256 zero(int64_t block) const { return of_lanes(zero_, block); }

 private:
  __m256 of_lanes(const float* values, int64_t block) const {
    if (count_ == 1) return _mm256_set1_ps(*values);
    const int32_t* place = place_ + kLaneCount * block;
    const __m256i own = _mm256_sub_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)), _mm256_set1_epi32(*place));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + *place), own);
  }

  const PackedMatrix& w_;
  int64_t groups_, first_, count_;
  int32_t place_[2 * kLaneCount];
  float scale_[3 * kLaneCount] = {}, zero_[3 * kLaneCount] = {};
};

template <int kBits>
void lane_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column, float* tile) {
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  const uint8_t* codes = code_row(w, first) + column * kBits / 8;
  LaneScales scales(w, column);
  for (int64_t i = 0; i < count; ++i, codes += row_bytes) {
    scales.move_to(first + i);
    for (int64_t b = 0; b < kGradientColumns / kBlock; ++b, tile += kBlock) {
      const __m256 scale = scales.scale(b), zero = scales.zero(b);
      const uint8_t* block = codes + b * 8 * kBits;
      __builtin_prefetch(block + kPrefetched * kBits / 8);
      const Words<kBits> words = load_words<kBits>(block);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m256 integer = _mm256_sub_ps(magic_codes<kBits>(words, j), zero);
        _mm256_storeu_ps(tile + kLaneCount * j, _mm256_mul_ps(integer, scale));
      }
    }
  }
}

void lane_gradient_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                        float* tile) {
  if (!has_lane_tile(w, column)) {
    return plain_gradient_tile<Avx2Codes>(w, first, count, column, tile);
  }
  switch (w.levels) {
    case 2:
      return lane_tile<1>(w, first, count, column, tile);
    case 4:
      return lane_tile<2>(w, first, count, column, tile);
    case 8:
      return lane_tile<3>(w, first, count, column, tile);
    case 16:
      return lane_tile<4>(w, first, count, column, tile);
    default:
      return lane_tile<8>(w, first, count, column, tile);
  }
}

void lane_gradient_order(const PackedMatrix& w, int64_t column, bool words, int* order) {
  if (!has_lane_tile(w, column)) return plain_gradient_order(w, column, words, order);
  for (int p = 0; p < kGradientColumns; ++p) {
    const int block = p / kBlock, step = p % kBlock / kLaneCount, lane = p % kLaneCount;
    order[p] = static_cast<int>(kBlock) * block + kLaneCount * lane + step;
  }
}

}  // namespace
}  // namespace pyrobust::matmul
