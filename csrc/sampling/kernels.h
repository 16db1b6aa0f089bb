// Internal to the sampling family: what an instruction set supplies, and where random words lie.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "core/grid_normal.h"
#include "core/keep.h"
#include "core/laplace.h"
#include "core/normal.h"
#include "core/philox.h"
#include "core/uniform.h"

namespace pyrobust {
namespace sampling {

constexpr int64_t kTile = 64, kLanes = 16, kWords = 4;

// No two distributions share random words, but for the rounded Gaussian, which rounds the Gaussian.
enum Purpose : uint32_t {
  kPurposeNormal = 0,
  kPurposeRefinement = 1,
  kPurposeGridThird = 2,
  kPurposeGridFourth = 3,
  kPurposeUniform = 4,
  kPurposeLaplace = 5,
  kPurposeLaplaceRefinement = 6,
  kPurposeKeep = 7,
  kPurposeKeepRefinement = 8,
  kPurposeChoice = 9,
  kPurposeChoiceRefinement = 10
};

// One sample of one image: everything of the counter but the block.
struct Stream {
  uint64_t seed;
  int64_t sample;
  int64_t image;
};

PYROBUST_HD PhiloxWords stream_counter(const Stream& stream, uint32_t block, uint32_t purpose) {
  const uint32_t high = purpose << 24 | static_cast<uint32_t>(stream.sample >> 32 & 0xff) << 16 |
                        static_cast<uint32_t>(stream.image >> 32 & 0xffff);
  return {{block, static_cast<uint32_t>(stream.sample), static_cast<uint32_t>(stream.image), high}};
}

// Block and word of one element.
struct Place {
  uint32_t block;
  int word;
};

PYROBUST_HD Place place_of(int64_t element) {
  return {static_cast<uint32_t>(element / kTile * kLanes + element % kLanes),
          static_cast<int>(element % kTile / kLanes)};
}

// The random word of a place; rarely needed alone.
PYROBUST_HD uint32_t word_at(const Stream& stream, Place place, uint32_t purpose) {
  return philox4x32(stream_counter(stream, place.block, purpose), stream.seed).word[place.word];
}

// The tiles [begin_tile, end_tile) of one sample, whose last tile may be cut by `elements`. Nothing
// past x[elements - 1] and out[elements - 1] is touched.
struct RowTiles {
  Stream stream;
  int64_t begin_tile;
  int64_t end_tile;
  int64_t elements;
};

// out[e] = x[e] + scale * z[e], z normal, Laplace, or uniform on [-1, 1].
struct NoiseRow {
  RowTiles tiles;
  const float* x;
  float scale;
  void* out;
  FloatType out_type;
};

// out[e] = x[e] with probability keep / 2^64, else fill.
struct KeepRow {
  RowTiles tiles;
  const float* x;
  uint64_t keep;
  float fill;
  void* out;
  FloatType out_type;
};

// out[e] = x[e] + k[e], k the rounded Gaussian; int16, or floats of that integer over `levels`.
struct GridRow {
  RowTiles tiles;
  const uint8_t* x;
  GridTable table;
  float margin;  // where the float variate is this close to a rounding border, it does not decide
  float levels;
  void* out;
  bool integers;
  FloatType out_type;  // unless integers
};

// The variates that the first word alone does not settle.
PYROBUST_HD float normal_at(const Stream& stream, Place place, uint32_t bits) {
  if (!normal_needs_refinement(bits)) return normal_from_bits(kNormalTable, bits);
  return normal_refined(kNormalTable, bits, word_at(stream, place, kPurposeRefinement));
}

PYROBUST_HD float laplace_at(const Stream& stream, Place place, uint32_t bits) {
  if (!normal_needs_refinement(bits)) return laplace_from_bits(kLaplaceTable, bits);
  return laplace_refined(kLaplaceTable, bits, word_at(stream, place, kPurposeLaplaceRefinement));
}

PYROBUST_HD bool keep_at(const Stream& stream, Place place, uint64_t threshold, uint32_t bits) {
  if (!keep_needs_more(threshold, bits)) return keep_from_bits(threshold, bits);
  return keep_refined(threshold, bits, word_at(stream, place, kPurposeKeepRefinement));
}

PYROBUST_HD int32_t grid_at(const Stream& stream, Place place, const GridTable& table,
                            uint32_t bits) {
  const uint32_t purposes[kGridWords] = {kPurposeNormal, kPurposeRefinement, kPurposeGridThird,
                                         kPurposeGridFourth};
  uint32_t u[kGridWords] = {bits & 0x7fffffffu};
  const int32_t guess = grid_guess(table, kNormalTable, bits);
  int32_t k = grid_magnitude(table, u, 1, guess);
  for (int words = 2; k < 0; ++words) {
    u[words - 1] = word_at(stream, place, purposes[words - 1]);
    k = grid_magnitude(table, u, words, guess);
  }
  return grid_with_sign(k, bits);
}

// One grid value as it is stored: n, or n over levels.
PYROBUST_HD void store_grid(const GridRow& row, int64_t index, int32_t n) {
  if (row.integers) {
    static_cast<int16_t*>(row.out)[index] = static_cast<int16_t>(n);
  } else {
    store_float(row.out, index, row.out_type, static_cast<float>(n) / row.levels);
  }
}

// votes of `rows` dense rows; returns the first row with a NaN, or -1.
struct VoteRows {
  const void* logits;
  FloatType type;
  int64_t rows;
  int64_t classes;
  int64_t* votes;
};

// A null entry means "use the next lower set".
struct SamplingKernels {
  void (*gaussian_row)(const NoiseRow& row);
  void (*uniform_row)(const NoiseRow& row);
  void (*laplace_row)(const NoiseRow& row);
  void (*keep_row)(const KeepRow& row);
  void (*grid_row)(const GridRow& row);
  // The random words of one tile: out[64].
  void (*random_tile)(const Stream& stream, uint32_t purpose, int64_t tile, uint32_t* out);
  int64_t (*vote_rows)(const VoteRows& rows);
};

extern const SamplingKernels kPortableKernels;
#if defined(PYROBUST_X86)
extern const SamplingKernels kAvx2Kernels;
extern const SamplingKernels kAvx512Kernels;
#endif

}  // namespace sampling
}  // namespace pyrobust
