// The sampling kernels: noise that is a pure function of its position, and votes.
//
// The random word of element e of sample s of image i under a 64-bit seed is
//
//   tile = e / 64, word = e % 64 / 16, lane = e % 16
//   counter = (tile * 16 + lane, s low 32, i low 32, purpose << 24 | s high 8 << 16 | i high 16)
//   bits = philox4x32-10(counter, seed)[word]
//
// Each distribution has purposes of its own (kernels.h), one for its first word and one for the
// words that a few elements need besides. A tile of 64 elements is 16 consecutive counters by 4
// words, so that every vector width stores whole vectors without a transpose. Limits: e < 2^34,
// s < 2^40, i < 2^48.
//
//   Gaussian, Laplace, uniform   out = x + scale * z, two float32 roundings, then one more to the
//                                output type (core/normal.h, core/laplace.h, core/uniform.h)
//   keep                         out = x or a fill value (core/keep.h)
//   grid                         out = x + round(s z), correctly rounded (core/grid_normal.h)
//   choice                       a token or a uniform member of its list (core/choice.h)
//
// The same bits on every instruction set, thread count and split of the batch.
//
// Votes. The class of a row of logits is its largest value, the lowest index among equals; a row
// with a NaN has none and is reported.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "core/grid_normal.h"

namespace pyrobust {
namespace sampling {

constexpr int64_t kMaxElements = int64_t{1} << 34;
constexpr int64_t kMaxSamples = int64_t{1} << 40;
constexpr int64_t kMaxImages = int64_t{1} << 48;
constexpr int64_t kMaxGridSteps = 32000;  // |k|, so that x + k fits 16 bits

// Which random words a call reads: those of `samples` samples of `images` images.
struct Positions {
  int64_t images;
  int64_t samples;
  int64_t elements;  // of one image
  uint64_t seed;
  int64_t first_sample;
  int64_t first_index;
};

enum class Noise : int { kGaussian, kUniform, kLaplace };

// out[b, j, e] = x[b, e] + scale[b] * z(first_index + b, first_sample + j, e), all dense.
struct NoiseCall {
  Noise noise;
  Positions at;
  const float* x;      // (images, elements)
  const float* scale;  // (images), finite and positive
  void* out;           // (images, samples, elements) of out_type
  FloatType out_type;
};

void noise_samples(const NoiseCall& call, int num_threads);

// The Gaussian on disjoint parts: left holds x + scale_left z where `mask` is not 0 and zeros
// elsewhere, right x + scale_right z on the other elements. z is that of noise_samples.
struct SplitCall {
  Positions at;
  const float* x;       // (images, elements)
  const uint8_t* mask;  // (elements)
  float scale_left;     // finite and positive
  float scale_right;    // finite and positive
  float* left;          // (images, samples, elements)
  float* right;         // (images, samples, elements)
};

void split_samples(const SplitCall& call, int num_threads);

// out[b, j, c, e] = x[b, c, e] where coin (b, j, e) says keep, else fill: channels share the coin.
struct KeepCall {
  Positions at;  // elements: of one channel
  int64_t channels;
  const float* x;  // (images, channels, elements)
  uint64_t keep;   // times 2^-64 the probability
  float fill;
  void* out;  // (images, samples, channels, elements) of out_type
  FloatType out_type;
};

void keep_samples(const KeepCall& call, int num_threads);

// out[b, j, e] = x[b, e] + round(s z), as int16, or divided by `levels` and rounded to a float
// type.
struct GridCall {
  Positions at;
  const uint8_t* x;  // (images, elements)
  GridTable table;   // at most kMaxGridSteps thresholds
  double scale;      // s
  float levels;
  void* out;  // (images, samples, elements)
  bool integers;
  FloatType out_type;
};

void grid_samples(const GridCall& call, int num_threads);

// out[b, j, e] = a uniform member of the list of tokens[b, e], or tokens[b, e] itself where that is
// outside [0, lists) or its list is empty. List t is candidates[offsets[t] .. offsets[t + 1] - 1].
struct ChoiceCall {
  Positions at;
  const int64_t* tokens;      // (images, elements)
  const int64_t* offsets;     // (lists + 1), not falling, from 0 on
  const int64_t* candidates;  // (offsets[lists])
  int64_t lists;
  int64_t* out;  // (images, samples, elements)
};

void choice_samples(const ChoiceCall& call, int num_threads);

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
