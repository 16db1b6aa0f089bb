// Where random words lie, and the variates of one place; shared by the CPU and CUDA.
#pragma once

#include <cstdint>

#include "core/choice.h"
#include "core/grid_normal.h"
#include "core/host_device.h"
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

// The variates that the first word alone does not settle.
PYROBUST_HD float normal_at(const NormalTable& table, const Stream& stream, Place place,
                            uint32_t bits) {
  if (!normal_needs_refinement(bits)) return normal_from_bits(table, bits);
  return normal_refined(table, bits, word_at(stream, place, kPurposeRefinement));
}

PYROBUST_HD float laplace_at(const LaplaceTable& table, const Stream& stream, Place place,
                             uint32_t bits) {
  if (!normal_needs_refinement(bits)) return laplace_from_bits(table, bits);
  return laplace_refined(table, bits, word_at(stream, place, kPurposeLaplaceRefinement));
}

PYROBUST_HD bool keep_at(const Stream& stream, Place place, uint64_t threshold, uint32_t bits) {
  if (!keep_needs_more(threshold, bits)) return keep_from_bits(threshold, bits);
  return keep_refined(threshold, bits, word_at(stream, place, kPurposeKeepRefinement));
}

PYROBUST_HD int32_t grid_at(const NormalTable& normal, const Stream& stream, Place place,
                            const GridTable& table, uint32_t bits) {
  const uint32_t purposes[kGridWords] = {kPurposeNormal, kPurposeRefinement, kPurposeGridThird,
                                         kPurposeGridFourth};
  uint32_t u[kGridWords] = {bits & 0x7fffffffu};
  const int32_t guess = grid_guess(table, normal, bits);
  int32_t k = grid_magnitude(table, u, 1, guess);
  for (int words = 2; words <= kGridWords && k < 0; ++words) {
    u[words - 1] = word_at(stream, place, purposes[words - 1]);
    k = grid_magnitude(table, u, words, guess);
  }
  return grid_with_sign(k, bits);
}

// A uniform member of a list of `count` >= 1.
PYROBUST_HD uint32_t choice_at(const Stream& stream, Place place, uint32_t count, uint32_t bits) {
  if (!choice_needs_more(count, bits)) return choice_from_bits(count, bits);
  return choice_refined(count, bits, word_at(stream, place, kPurposeChoiceRefinement));
}

}  // namespace sampling
}  // namespace pyrobust
