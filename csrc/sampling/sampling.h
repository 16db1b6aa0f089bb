// The sampling kernels: noise that is a pure function of its position, and votes.
//
// Noise. The standard normal of element e of sample s of image i under a 64-bit seed is
//
//   tile = e / 64, word = e % 64 / 16, lane = e % 16
//   counter = (tile * 16 + lane, s low 32, i low 32, purpose << 24 | s high 8 << 16 | i high 16)
//   z = normal(philox4x32-10(counter, seed)[word])                     (core/normal.h)
//
// with purpose 0, and purpose 1 for the extra bits of a refined tail. A tile of 64 elements is 16
// consecutive counters by 4 words, so that every vector width stores whole vectors without a
// transpose. Limits: e < 2^34, s < 2^40, i < 2^48.
//
// out = x + sigma * z, two float32 roundings, then one more to the output type. The same bits on
// every instruction set, thread count and split of the batch.
//
// Votes. The class of a row of logits is its largest value, the lowest index among equals; a row
// with a NaN has none and is reported.
#pragma once

#include <cstdint>

#include "core/float_types.h"

namespace pyrobust {
namespace sampling {

constexpr int64_t kMaxElements = int64_t{1} << 34;
constexpr int64_t kMaxSamples = int64_t{1} << 40;
constexpr int64_t kMaxImages = int64_t{1} << 48;

// out[b, j, e] = x[b, e] + sigma[b] * z(first_index + b, first_sample + j, e), all dense.
struct GaussianCall {
  const float* x;      // (images, elements)
  const float* sigma;  // (images)
  int64_t images;
  int64_t samples;
  int64_t elements;
  uint64_t seed;
  int64_t first_sample;
  int64_t first_index;
  void* out;  // (images, samples, elements) of out_type
  FloatType out_type;
};

void gaussian_samples(const GaussianCall& call, int num_threads);

// votes[r] = class of row r. Returns the first row with a NaN, or -1.
struct VoteCall {
  const void* logits;  // (rows, classes) of type
  FloatType type;
  int64_t rows;
  int64_t classes;  // at least 1
  int64_t* votes;   // (rows)
};

int64_t find_votes(const VoteCall& call, int num_threads);

}  // namespace sampling
}  // namespace pyrobust
