// How the sampling kernels divide their work: index arithmetic only, in 64 bits, tested on the CPU.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "sampling/places.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

// Four consecutive counters make a quad: four words of each, so elements
//   tile * 64 + 16 word + lane + i,  word and i in 0 .. 3,
// that is four vectors of four elements.
constexpr int64_t kQuad = 4;
constexpr int64_t kQuadsPerTile = kLanes / kQuad;

PYROBUST_HD int64_t tiles_of(int64_t elements) { return (elements + kTile - 1) / kTile; }

// a / b and a % b, in 32 bits where that is enough: a division of 64 bits costs about 70
// instructions on a GPU.
struct Divided {
  int64_t quotient;
  int64_t rest;
};
PYROBUST_HD Divided divided(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t of = static_cast<uint32_t>(a), by = static_cast<uint32_t>(b);
    return {of / by, of % by};
  }
  return {a / b, a % b};
}

// An item of noise: one quad of an image, for a run of samples, so that x is read once a run. The
// samples of a run lie `runs` apart: at a time all threads write into rows that follow one another.
struct NoiseItems {
  int64_t images;
  int64_t samples;
  int64_t quads;  // of one image
  int64_t runs;   // items over the samples
  int64_t most;   // samples of the longest run
};

struct NoiseItem {
  int64_t image;
  int64_t first_sample;  // then every runs-th
  int64_t quad;
};

// Runs of such a length that each of `threads` finds several of them.
constexpr int64_t kLongestRun = 16, kRunsPerThread = 8;
PYROBUST_HD NoiseItems noise_items(int64_t images, int64_t samples, int64_t elements,
                                   int64_t threads) {
  const int64_t quads = tiles_of(elements) * kQuadsPerTile;
  int64_t run = images * quads * samples / (threads * kRunsPerThread);
  run = run < 1 ? 1 : run > kLongestRun ? kLongestRun : run;
  const int64_t runs = (samples + run - 1) / run;
  return {images, samples, quads, runs, (samples + runs - 1) / runs};
}

PYROBUST_HD int64_t count_of(const NoiseItems& items) {
  return items.images * items.runs * items.quads;
}

PYROBUST_HD NoiseItem noise_item(const NoiseItems& items, int64_t index) {
  const Divided row = divided(index, items.quads);
  const Divided place = divided(row.quotient, items.runs);
  return {place.quotient, place.rest, row.rest};
}

// Samples of the run that begins with `first_sample`: `most`, or one less.
PYROBUST_HD int64_t samples_of(const NoiseItems& items, int64_t first_sample) {
  const bool all = first_sample + (items.most - 1) * items.runs < items.samples;
  return all ? items.most : items.most - 1;
}

// Samples up to the next whose number has other high words, which a counter takes from its first.
PYROBUST_HD int64_t samples_together(int64_t first_sample, int64_t samples) {
  const int64_t left = (int64_t{1} << 32) - (first_sample & 0xffffffff);
  return samples < left ? samples : left;
}

// Counter and first element of a quad.
PYROBUST_HD uint32_t block_of_quad(int64_t quad) { return static_cast<uint32_t>(quad * kQuad); }
PYROBUST_HD int64_t element_of_quad(int64_t quad) {
  return quad / kQuadsPerTile * kTile + quad % kQuadsPerTile * kQuad;
}

// The other distributions: one counter of one row an item; rows are samples of images, times
// channels.
struct RowItem {
  int64_t image;
  int64_t sample;
  int64_t channel;
  int64_t block;
  int64_t row;
};

PYROBUST_HD RowItem row_item(int64_t index, int64_t samples, int64_t channels, int64_t blocks) {
  const Divided row = divided(index, blocks);
  const Divided copy = divided(row.quotient, channels);
  const Divided place = divided(copy.quotient, samples);
  return {place.quotient, place.rest, copy.rest, row.rest, row.quotient};
}

PYROBUST_HD int64_t element_of_block(int64_t block, int word) {
  return block / kLanes * kTile + word * kLanes + block % kLanes;
}

// Votes: a block of the grid takes a stretch of rows of one histogram.
struct VoteStretches {
  int64_t rows;       // of one histogram
  int64_t length;     // rows of a stretch
  int64_t stretches;  // of one histogram
  int64_t histograms;
};

PYROBUST_HD VoteStretches vote_stretches(int64_t rows, int64_t samples, int64_t least_length,
                                         int64_t wanted) {
  VoteStretches work = {samples, samples, 1, samples == 0 ? 0 : rows / samples};
  if (work.histograms == 0) return work;
  const int64_t parts = wanted / work.histograms + 1;
  work.length = (samples + parts - 1) / parts;
  if (work.length < least_length) work.length = least_length;
  work.stretches = (samples + work.length - 1) / work.length;
  return work;
}

struct VoteStretch {
  int64_t histogram;
  int64_t begin;  // rows, of the whole
  int64_t end;
};

PYROBUST_HD VoteStretch vote_stretch(const VoteStretches& work, int64_t index) {
  const int64_t histogram = index / work.stretches, part = index % work.stretches;
  const int64_t first = part * work.length, last = first + work.length;
  const int64_t base = histogram * work.rows;
  return {histogram, base + first, base + (last < work.rows ? last : work.rows)};
}

// Lanes that share a row of logits: the least power of two such that each loads its vectors at
// once, at most a warp.
constexpr int kVoteLoads = 8;
PYROBUST_HD int lanes_per_row(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && int64_t{kVoteLoads} * lanes < vectors) lanes *= 2;
  return lanes;
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
