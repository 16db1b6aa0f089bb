// What the linear product and the convolution share: kernels and constants for a call, equal shares
// of the work, rows of W.
#pragma once

#include <algorithm>
#include <memory>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "runtime/float_environment.h"
#include "runtime/kept_memory.h"
#include "runtime/pages.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace interval {

constexpr int64_t kRowStep = 60;              // a multiple of every kernel's tile height
constexpr int64_t kShareStep = kRowStep / 5;  // of shares among threads that have the same to do

IntervalKernels pick_kernels();
// `nonzero` counts the terms of an output that may be other than zero.
Constants constants_for(const Call& call, int64_t nonzero);
// The same where the radius is to take up an error of the centre's sum of at most `of_sum` times
// the sum of magnitudes; 0 where the caller bounds it in another way, as by counts of roundings.
Constants constants_for(const Call& call, int64_t nonzero, double of_sum);
// For `prepare`, where radii take up errors later.
Constants plain_radii();
// Terms of an input whose box is not {0} after the ReLU that the floor stands for.
int64_t nonzero_terms(const Ends& ends);
void check_terms(const char* subject, int64_t terms);
// The absolute term of one input: what flushing and underflow lose.
float offset_for(const Call& call, float largest);

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Equal shares of [0, count) with borders on multiples of `step`, at least 20 us of work each:
// below this a second thread costs more than it brings. `work` counts some 8 flops.
struct Shares {
  int64_t count, step, number;

  Shares(int64_t count, int64_t step, double work, int num_threads) : count(count), step(step) {
    constexpr double kGrain = 1 << 17;
    const auto useful = static_cast<int64_t>(work / kGrain);
    number = std::max<int64_t>(
        1, std::min({static_cast<int64_t>(num_threads), useful, blocks(count, step)}));
  }
  int64_t begin(int64_t share) const {
    return std::min(count, blocks(count, step) * share / number * step);
  }

  template <typename Body>  // body(share, begin, end)
  void run(const Body& body) const {
    parallel_for(number, 1, 1, static_cast<int>(number), [&](int64_t first, int64_t last) {
      const DefaultFloatEnvironment environment;
      for (int64_t share = first; share < last; ++share) {
        if (begin(share) < begin(share + 1)) body(share, begin(share), begin(share + 1));
      }
    });
  }
};

// Scratch memory whose columns do not straddle cache lines.
struct FreeFloats {
  int64_t bytes = 0;
  void operator()(float* memory) const { give_back({memory, bytes}); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats floats(int64_t count) {
  const KeptBlock block = take_block(count * int64_t{sizeof(float)});
  return Floats(static_cast<float*>(block.memory), FreeFloats{block.bytes});
}

inline int64_t whole_lines(int64_t count) { return (count + 15) / 16 * 16; }

// Rows of W that meet one panel after another: 64 K floats leave a second-level cache room for a
// panel (128 x 1024 x 1024: 1% faster than 32 K or 20 K).
inline int64_t rows_at_once(int64_t rows, int64_t terms) {
  constexpr int64_t kBlockFloats = 65536;
  const int64_t fit = kBlockFloats / std::max<int64_t>(1, terms) / kRowStep * kRowStep;
  return std::min(std::max(fit, kRowStep), blocks(rows, kRowStep) * kRowStep);
}

// Whether the radii of a call meet |W| in bfloat16: where that is allowed, and the product is large
// enough to gain by it.
inline bool coarse_pays(const Call& call, const IntervalKernels& table, int64_t rows) {
  constexpr int64_t kLeastRows = 24, kLeastTerms = 64;
  return call.coarse_radius && table.coarse_tiles != nullptr && rows >= kLeastRows &&
         call.weight.terms >= kLeastTerms;
}

inline int64_t decoded_size(const Weight& weight, int64_t rows) {
  return weight.packed != nullptr ? rows * weight.terms : 0;
}

// Rows [begin, begin + count); packed ones are decoded into `scratch`.
inline const float* rows_of(const Weight& weight, int64_t begin, int64_t count, float* scratch) {
  if (weight.packed == nullptr) return weight.data + begin * weight.terms;
  matmul::dequantize_rows(*weight.packed, begin, begin + count, scratch);
  return scratch;
}

// Ends that suit the constants of both.
inline void suit_ends(Constants& ends, const Constants& other) {
  ends.bias_gain = std::max(ends.bias_gain, other.bias_gain);
  ends.value_gain = std::max(ends.value_gain, other.value_gain);
  ends.limit = std::min(ends.limit, other.limit);
}

// Whether ends are too many to be read from a cache by the next layer: then they need not be in one
// either.
inline bool past_cache(int64_t bytes) { return bytes >= int64_t{12} << 20; }

// Whether the roundings of each term are counted (radius_loops.h). The rounding of activations to 8
// bits takes up so much more that it is not worth it.
inline bool counts_roundings(const Call& call) {
  return call.rounding != Rounding::kNearest && !call.int8;
}

// Constants for radii that are widened term by term, or else for `prepare`; those of one input. The
// 8-bit layer sums integers: a count would not help it.
inline Constants constants_of(const Call& call, int64_t nonzero, bool counted) {
  return counted ? constants_for(call, nonzero, 0.0) : constants_for(call, nonzero);
}

inline Constants constants_of_input(const Call& call, const Ends& input, const Constants& of_all,
                                    bool counted) {
  if (call.rounding != Rounding::kDeployed || call.int8) return of_all;
  return constants_of(call, nonzero_terms(input), counted);
}

inline const float* shifted(const float* bias, int64_t by) {
  return bias != nullptr ? bias + by : bias;
}

}  // namespace interval
}  // namespace pyrobust
