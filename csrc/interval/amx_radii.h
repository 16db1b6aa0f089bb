// Included by amx.cpp alone: sums of |W| times radii on the tile instructions of AMX, both rounded
// up to bfloat16. A tile of |W| holds 16 rows and 32 terms, one of radii as many terms and 16
// inputs, a word for each pair of terms; "Coarse radii" in interval.h bounds what the sums lose.
#pragma once

#include "interval/avx512_pairs.h"
#include "matmul/amx_tile.h"

namespace pyrobust {
namespace interval {
namespace {

namespace tile = matmul::tile;

static_assert(kCoarseRows == tile::kMaxRows && 4 * kCoarsePairs == tile::kMaxRowBytes,
              "a tile is full");

constexpr int64_t kTileInputs = 16;
constexpr int64_t kTilesOfChain = kCoarseChain / (2 * kCoarsePairs);

// The tiles: sums of |W|'s tile i and the inputs' tile g in 2 i + g, then two of |W|, then two of
// inputs.
constexpr int kSizes = 4, kRadii = 6;

inline void configure_tiles() {
  tile::Config config;
  for (int i = 0; i < tile::kCount; ++i) config.set(i, tile::kMaxRows, tile::kMaxRowBytes);
  tile::configure(config);
}

// Up to 48 rows of W against two groups of 16 inputs, or one.
struct RadiusSums {
  const uint32_t* sizes;     // (rows, size_stride) words
  int64_t size_stride;       // `taps` parts of `pairs` words each
  const uint32_t* radii[2];  // the groups' first words
  int64_t groups;
  int64_t plane;          // words from one pair of terms of a part to the next
  const int64_t* places;  // (taps) words from radii to a part's first pair
  int64_t taps;
  int64_t pairs;  // of a part: whole tiles
  int64_t rows;
  float* sums;  // (coarse_rows(rows), sum_stride)
  int64_t sum_stride;
};

template <int kTiles, int kGroups>
void multiply_tiles(const RadiusSums& work, const uint32_t* sizes, int64_t tap, int64_t pair) {
  const int64_t from = work.places[tap] + pair * work.plane, pitch = work.plane * 4;
  const uint32_t* left = sizes + tap * work.pairs + pair;
  tile::load<kRadii>(work.radii[0] + from, pitch);
  tile::load<kSizes>(left, work.size_stride * 4);
  tile::multiply_bfloat16<0, kSizes, kRadii>();
  if constexpr (kGroups == 2) {
    tile::load<kRadii + 1>(work.radii[1] + from, pitch);
    tile::multiply_bfloat16<1, kSizes, kRadii + 1>();
  }
  if constexpr (kTiles == 2) {
    tile::load<kSizes + 1>(left + kCoarseRows * work.size_stride, work.size_stride * 4);
    tile::multiply_bfloat16<2, kSizes + 1, kRadii>();
    if constexpr (kGroups == 2) tile::multiply_bfloat16<3, kSizes + 1, kRadii + 1>();
  }
}

template <int kTiles, int kGroups>
void clear_sums() {
  tile::zero<0>();
  if constexpr (kGroups == 2) tile::zero<1>();
  if constexpr (kTiles == 2) tile::zero<2>();
  if constexpr (kTiles == 2 && kGroups == 2) tile::zero<3>();
}

template <int kTiles, int kGroups>
void store_sums(float* sums, int64_t stride) {
  const int64_t pitch = stride * int64_t{sizeof(float)};
  tile::store<0>(sums, pitch);
  if constexpr (kGroups == 2) tile::store<1>(sums + kTileInputs, pitch);
  float* below = sums + kCoarseRows * stride;
  if constexpr (kTiles == 2) tile::store<2>(below, pitch);
  if constexpr (kTiles == 2 && kGroups == 2) tile::store<3>(below + kTileInputs, pitch);
}

// kTiles tiles of |W| from row `row` on, a chain of products at a time.
template <int kTiles, int kGroups>
void sum_radii_of_rows(const RadiusSums& work, int64_t row) {
  constexpr int64_t kRows = kTiles * kCoarseRows, kPitch = 2 * kTileInputs;
  const uint32_t* sizes = work.sizes + row * work.size_stride;
  const int64_t of_tap = work.pairs / kCoarsePairs, all = work.taps * of_tap;
  float* sums = work.sums + row * work.sum_stride;
  alignas(64) float chain[kRows * kPitch];
  for (int64_t first = 0; first < all; first += kTilesOfChain) {
    const int64_t last = all < first + kTilesOfChain ? all : first + kTilesOfChain;
    clear_sums<kTiles, kGroups>();
    int64_t tap = first / of_tap, pair = first % of_tap * kCoarsePairs;
    for (int64_t step = first; step < last; ++step) {
      multiply_tiles<kTiles, kGroups>(work, sizes, tap, pair);
      pair += kCoarsePairs;
      if (pair == work.pairs) ++tap, pair = 0;
    }
    if (first == 0) {
      store_sums<kTiles, kGroups>(sums, work.sum_stride);
      continue;
    }
    store_sums<kTiles, kGroups>(chain, kPitch);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t g = 0; g < kGroups; ++g) {
        float* to = sums + i * work.sum_stride + g * kTileInputs;
        const __m512 more = _mm512_load_ps(chain + i * kPitch + g * kTileInputs);
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
      }
    }
  }
}

template <int kGroups>
void sum_radii_of_groups(const RadiusSums& work) {
  for (int64_t row = 0; row < work.rows; row += 2 * kCoarseRows) {
    if (work.rows - row > kCoarseRows) {
      sum_radii_of_rows<2, kGroups>(work, row);
    } else {
      sum_radii_of_rows<1, kGroups>(work, row);
    }
  }
}

void sum_radii(const RadiusSums& work) {
  if (work.groups == 2) {
    sum_radii_of_groups<2>(work);
  } else {
    sum_radii_of_groups<1>(work);
  }
}

// sums = factor part, or plus that, of rows and groups of `work`.
void add_scaled(const RadiusSums& work, const float* part, const RunFactors& factors, bool fresh) {
  for (int64_t i = 0; i < work.rows; ++i) {
    const __m512 factor = _mm512_set1_ps(factors.values[i * factors.stride]);
    for (int64_t g = 0; g < work.groups; ++g) {
      float* to = work.sums + i * work.sum_stride + g * kTileInputs;
      const __m512 more = _mm512_load_ps(part + i * 2 * kTileInputs + g * kTileInputs);
      _mm512_storeu_ps(to, fresh ? _mm512_mul_ps(more, factor)
                                 : _mm512_fmadd_ps(more, factor, _mm512_loadu_ps(to)));
    }
  }
}

// The same for sizes that were divided by factors, where there are any: the sums of a group's runs
// at a time. One part of sizes, at most kCoarseBlock rows.
void sum_radii(const RadiusSums& work, const RunFactors& factors) {
  if (factors.values == nullptr) return sum_radii(work);
  alignas(64) float part[coarse_scratch()];
  const int64_t runs = work.pairs / kCoarsePairs;
  for (int64_t run = 0, end; run < runs; run = end) {
    end = factors.group_end(run);
    if (end > runs) end = runs;
    RadiusSums own = work;
    own.sizes += run * kCoarsePairs;
    for (const uint32_t*& radii : own.radii) radii += run * kCoarsePairs * work.plane;
    own.pairs = (end - run) * kCoarsePairs;
    own.sums = part;
    own.sum_stride = 2 * kTileInputs;
    sum_radii(own);
    add_scaled(work, part, factors.from(0, run), run == 0);
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
