// Internal to the sampling family: what an instruction set supplies.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "core/normal.h"
#include "core/philox.h"

namespace pyrobust {
namespace sampling {

constexpr int64_t kTile = 64, kLanes = 16, kWords = 4;
constexpr uint32_t kPurposeNormal = 0, kPurposeRefinement = 1;

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

// The variate of word `word` of block `block` whose bits were found too small; rare.
PYROBUST_HD float refined_normal(const NormalTable& table, const Stream& stream, uint32_t block,
                                 int word, uint32_t bits) {
  const PhiloxWords extra =
      philox4x32(stream_counter(stream, block, kPurposeRefinement), stream.seed);
  return normal_refined(table, bits, extra.word[word]);
}

// out[e] = x[e] + sigma * z[e] for the tiles [begin_tile, end_tile) of one sample; the last tile
// may be cut by `elements`. Nothing past x[elements - 1] and out[elements - 1] is touched.
struct GaussianRow {
  const float* x;
  float sigma;
  Stream stream;
  int64_t begin_tile;
  int64_t end_tile;
  int64_t elements;
  void* out;
  FloatType out_type;
};

// votes of `rows` dense rows; returns the first row with a NaN, or -1.
struct VoteRows {
  const void* logits;
  FloatType type;
  int64_t rows;
  int64_t classes;
  int64_t* votes;
};

struct SamplingKernels {
  void (*gaussian_row)(const GaussianRow& row);
  int64_t (*vote_rows)(const VoteRows& rows);
};

extern const SamplingKernels kPortableKernels;
#if defined(PYROBUST_X86)
extern const SamplingKernels kAvx2Kernels;
#endif

}  // namespace sampling
}  // namespace pyrobust
