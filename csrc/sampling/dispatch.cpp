// Checks, picks the kernels, and splits the work over threads.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "runtime/check.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"
#include "sampling/kernels.h"
#include "sampling/sampling.h"

namespace pyrobust {
namespace sampling {
namespace {

// About 20 microseconds of one core.
constexpr int64_t kTilesPerGrain = 400;
constexpr int64_t kLogitsPerGrain = 20000;

template <typename Function>
Function pick(Function SamplingKernels::* member) {
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx512 && kAvx512Kernels.*member != nullptr) {
    return kAvx512Kernels.*member;
  }
  if (current_isa() >= Isa::kAvx2 && kAvx2Kernels.*member != nullptr) return kAvx2Kernels.*member;
#endif
  return kPortableKernels.*member;
}

void check_positions(const char* subject, const Positions& at) {
  check(at.images >= 0 && at.samples >= 0 && at.elements >= 0, subject,
        ": sizes must not be negative.");
  check(at.elements <= kMaxElements, subject, ": an input must have at most 2^34 elements; got ",
        at.elements, ".");
  check(at.first_sample >= 0 && at.first_sample <= kMaxSamples - at.samples, subject,
        ": sample indices must lie in [0, 2^40); got ", at.samples, " from ", at.first_sample,
        " on.");
  check(at.first_index >= 0 && at.first_index <= kMaxImages - at.images, subject,
        ": image indices must lie in [0, 2^48); got ", at.images, " from ", at.first_index, " on.");
}

void check_scale(const char* subject, const char* name, double scale) {
  check(std::isfinite(scale) && scale > 0, subject, ": ", name,
        " must be finite and positive; got ", scale, ".");
}

// Calls body(image, row, tiles) for runs of tiles; row counts samples of all images, each
// `channels` times over.
template <typename Body>
void for_each_row(const Positions& at, int64_t channels, int num_threads, const Body& body) {
  const int64_t row_tiles = (at.elements + kTile - 1) / kTile;
  const int64_t rows = at.images * at.samples * channels;
  parallel_for(rows * row_tiles, kTilesPerGrain, 1, num_threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / row_tiles, first = begin % row_tiles;
      const int64_t last = std::min(row_tiles, first + (end - begin));
      const int64_t sample = row / channels % at.samples, image = row / channels / at.samples;
      const Stream stream = {at.seed, at.first_sample + sample, at.first_index + image};
      body(image, row, RowTiles{stream, first, last, at.elements});
      begin += last - first;
    }
  });
}

void* row_address(void* out, int64_t row, int64_t elements, int64_t bytes) {
  return static_cast<char*>(out) + row * elements * bytes;
}

const char* subject_of(Noise noise) {
  return noise == Noise::kGaussian  ? "gaussian_samples"
         : noise == Noise::kUniform ? "uniform_samples"
                                    : "laplace_samples";
}

// The largest distance of s z + 1/2, as the vector kernels compute it, from its value for the exact
// z of any completion of the random bits. z: kNormalError, and 4.9e-7 for the bits not yet drawn
// (half a step of 2^-32 where the density is least, at 2^-14 of tail probability). The float32
// scale, sum and offset: 2^-24 of at most 4 s each.
float grid_margin(double scale) {
  return static_cast<float>(scale * (kNormalError + 4.9e-7 + 8 * 0x1p-24) + 0x1p-20);
}

}  // namespace

void noise_samples(const NoiseCall& call, int num_threads) {
  const Positions& at = call.at;
  check_positions(subject_of(call.noise), at);
  for (int64_t b = 0; b < at.images; ++b) {
    check_scale(subject_of(call.noise), call.noise == Noise::kGaussian ? "sigma" : "scale",
                call.scale[b]);
  }
  const auto kernel = pick(call.noise == Noise::kGaussian  ? &SamplingKernels::gaussian_row
                           : call.noise == Noise::kUniform ? &SamplingKernels::uniform_row
                                                           : &SamplingKernels::laplace_row);
  const int64_t bytes = float_type_bytes(call.out_type);
  for_each_row(at, 1, num_threads, [&](int64_t image, int64_t row, const RowTiles& tiles) {
    kernel({tiles, call.x + image * at.elements, call.scale[image],
            row_address(call.out, row, at.elements, bytes), call.out_type});
  });
}

void split_samples(const SplitCall& call, int num_threads) {
  const Positions& at = call.at;
  check_positions("split_gaussian_samples", at);
  check_scale("split_gaussian_samples", "sigma", call.scale_left);
  check_scale("split_gaussian_samples", "sigma", call.scale_right);
  const auto kernel = pick(&SamplingKernels::gaussian_row);
  const bool alike = call.scale_left == call.scale_right;
  for_each_row(at, 1, num_threads, [&](int64_t image, int64_t row, const RowTiles& tiles) {
    const float* x = call.x + image * at.elements;
    float* left = call.left + row * at.elements;
    float* right = call.right + row * at.elements;
    kernel({tiles, x, call.scale_left, left, FloatType::kFloat32});
    if (!alike) kernel({tiles, x, call.scale_right, right, FloatType::kFloat32});
    const float* drawn = alike ? left : right;
    const int64_t end = std::min(at.elements, tiles.end_tile * kTile);
    for (int64_t e = tiles.begin_tile * kTile; e < end; ++e) {
      const float other = drawn[e];
      left[e] = call.mask[e] != 0 ? left[e] : 0.0f;
      right[e] = call.mask[e] != 0 ? 0.0f : other;
    }
  });
}

void keep_samples(const KeepCall& call, int num_threads) {
  const Positions& at = call.at;
  check_positions("masked_samples", at);
  check(call.channels >= 1, "masked_samples: x must have at least one channel; got ", call.channels,
        ".");
  const auto kernel = pick(&SamplingKernels::keep_row);
  const int64_t bytes = float_type_bytes(call.out_type);
  for_each_row(at, call.channels, num_threads,
               [&](int64_t image, int64_t row, const RowTiles& tiles) {
                 const int64_t from = image * call.channels + row % call.channels;
                 kernel({tiles, call.x + from * at.elements, call.keep, call.fill,
                         row_address(call.out, row, at.elements, bytes), call.out_type});
               });
}

void grid_samples(const GridCall& call, int num_threads) {
  const Positions& at = call.at;
  check_positions("grid_samples", at);
  check_scale("grid_samples", "sigma", call.scale);
  check(call.table.count >= 1 && call.table.count <= kMaxGridSteps,
        "grid_samples: the thresholds must be 1 to ", kMaxGridSteps, "; got ", call.table.count,
        ".");
  const auto kernel = pick(&SamplingKernels::grid_row);
  const int64_t bytes = call.integers ? 2 : float_type_bytes(call.out_type);
  GridTable table = call.table;
  table.scale = static_cast<float>(call.scale);
  for_each_row(at, 1, num_threads, [&](int64_t image, int64_t row, const RowTiles& tiles) {
    kernel({tiles, call.x + image * at.elements, table, grid_margin(call.scale), call.levels,
            row_address(call.out, row, at.elements, bytes), call.integers, call.out_type});
  });
}

void choice_samples(const ChoiceCall& call, int num_threads) {
  const Positions& at = call.at;
  check_positions("substituted_tokens", at);
  check(call.lists >= 0 && call.offsets[0] == 0, "substituted_tokens: offsets must start at 0.");
  for (int64_t t = 0; t < call.lists; ++t) {
    const int64_t count = call.offsets[t + 1] - call.offsets[t];
    check(count >= 0 && count <= 0xffffffff,
          "substituted_tokens: offsets must not fall, nor rise by more than 2^32; list ", t,
          " has ", count, " candidates.");
  }
  const auto words = pick(&SamplingKernels::random_tile);
  for_each_row(at, 1, num_threads, [&](int64_t image, int64_t row, const RowTiles& tiles) {
    const int64_t* tokens = call.tokens + image * at.elements;
    int64_t* out = call.out + row * at.elements;
    uint32_t bits[kTile];
    for (int64_t tile = tiles.begin_tile; tile < tiles.end_tile; ++tile) {
      words(tiles.stream, kPurposeChoice, tile, bits);
      const int64_t end = std::min(at.elements, (tile + 1) * kTile);
      for (int64_t e = tile * kTile; e < end; ++e) {
        const int64_t token = tokens[e];
        const bool known = token >= 0 && token < call.lists;
        const int64_t first = known ? call.offsets[token] : 0;
        const uint32_t count = known ? static_cast<uint32_t>(call.offsets[token + 1] - first) : 0u;
        if (count == 0) {
          out[e] = token;
          continue;
        }
        const uint32_t chosen = choice_at(tiles.stream, place_of(e), count, bits[e % kTile]);
        out[e] = call.candidates[first + chosen];
      }
    }
  });
}

int64_t find_votes(const VoteCall& call, int num_threads) {
  check(call.classes >= 1, "count_votes: logits must have at least one class; got ", call.classes,
        ".");
  const auto kernel = pick(&SamplingKernels::vote_rows);
  const int64_t row_bytes = call.classes * float_type_bytes(call.type);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerGrain / call.classes);
  std::atomic<int64_t> first_nan{call.rows};
  parallel_for(call.rows, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t found = kernel({static_cast<const char*>(call.logits) + begin * row_bytes,
                                  call.type, end - begin, call.classes, call.votes + begin});
    if (found < 0) return;
    int64_t known = first_nan.load();
    while (begin + found < known && !first_nan.compare_exchange_weak(known, begin + found)) {
    }
  });
  return first_nan.load() < call.rows ? first_nan.load() : -1;
}

}  // namespace sampling
}  // namespace pyrobust
