// The constants of interval.h's proof for sums on tensor cores, from the relative errors of both.
#pragma once

#include <cstdint>
#include <limits>

#include "core/rounding.h"
#include "interval/interval.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr double kTensorUnit = 1.0 / 4194304.0;  // 2^-22: n products are summed within n times it
constexpr double kMagnitudes = 1.02;             // of all products of parts, over |W| |x|

// Relative errors of a kernel's sums: of the centre's to sum |W| |c|, of the radius's to itself.
struct SumErrors {
  double centre;
  double radius;
};

// The packed product of float32 inputs on a GPU (matmul/cuda.h): two bfloat16 terms, within 2^-16
// of the input, each with (K + 64) 2^-22; 1.01 and the other half of 2^-15 cover sums and their
// rounding.
inline double packed_error(int64_t terms) {
  return 1.01 * static_cast<double>(terms + 64) * kTensorUnit + 1.0 / 32768.0;
}

// `packed`: kDeployed speaks of the product with packed weights. As in constants.cpp, with these
// sums' errors and n = K.
inline Constants constants_of(const SumErrors& own, int64_t terms, Rounding mode, bool packed) {
  using rounding::to_float_up;
  constexpr double kInputFloor = 7.888609052210118e-31;  // 2^-100
  constexpr double kLimit = 8.507059173023462e37;        // 2^126
  constexpr double kRoundings = 1.0 + 1e-14;             // of the lines below
  Constants out{};
  out.outward = mode != Rounding::kNearest;
  out.radius_gain = out.inflate = 1.0f;
  out.limit = rounding::infinity();
  if (!out.outward) return out;
  const double half = 0.5 * rounding::gamma_bound(static_cast<double>(terms + 1));  // H
  const double least = packed ? packed_error(terms) : 0.0;
  const double of_terms = least > rounding::kUnit + half ? least : rounding::kUnit + half;  // A
  const bool deployed = mode == Rounding::kDeployed;
  out.centre_gain =
      to_float_up(deployed ? (own.centre * (1.0 + half) + of_terms) * kRoundings : own.centre);
  out.radius_gain = to_float_up(deployed ? (1.0 + of_terms + half) * kRoundings : 1.0);
  out.input_floor = to_float_up(kInputFloor);
  out.inflate = to_float_up((1.0 + 8.0 * rounding::kUnit) / (1.0 - own.radius));
  if (!deployed) return out;
  out.bias_gain = to_float_up((least > half ? least : half) * kRoundings);
  out.value_gain = to_float_up(half * (1.0 + 2.0 * rounding::kUnit));
  out.least = std::numeric_limits<float>::min();
  out.limit = rounding::to_float_down(half * kLimit);
  return out;
}

// What flushing and underflow lose of an output, times 1 + 2 max |x| (cuda.h) or alone
// (cuda_library.h); 512 times as much where scales may be flushed that multiply whole numbers up to
// 511 (interval.h).
inline float flush_of(int64_t terms, Rounding mode, bool packed) {
  constexpr double kTwiceFlush = 9.40395480657830e-38;  // 2^-123
  if (mode == Rounding::kNearest) return 0.0f;
  const double times = packed && mode == Rounding::kDeployed ? 512.0 : 1.0;
  return rounding::to_float_up(times * kTwiceFlush * (static_cast<double>(terms) + 8.0));
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
