// The numbers of the proof in interval.h.
#include <algorithm>
#include <limits>

#include "interval/interval.h"
#include "interval/plan.h"
#include "runtime/check.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kFlush = 4.70197740328915e-38;        // 2^-124
constexpr double kPackedFlush = 512.0 * kFlush;        // of scales, integers up to 511
constexpr double kInputFloor = 7.888609052210118e-31;  // 2^-100
constexpr double kPackedError = 1.1e-6;                // of matmul/matmul.h, exact mode
constexpr double kLimit = 8.507059173023462e37;        // 2^126

}  // namespace

Constants constants_for(const Call& call, int64_t nonzero) {
  const auto depth = static_cast<double>(sum_depth(call.weight.terms));
  return constants_for(call, nonzero, rounding::gamma_bound(depth));
}

Constants plain_radii() {
  Constants out{};
  out.outward = false;
  return out;
}

int64_t nonzero_terms(const Ends& ends) {
  int32_t zeros = 0;  // at most kMaxTerms; without branches, so that the loop becomes vectors
  for (int64_t k = 0; k < ends.count; ++k) {
    const float low = ends.lower[k], high = ends.upper[k];
    const int32_t left = static_cast<int32_t>(low == 0.0f) | static_cast<int32_t>(low < ends.floor);
    const int32_t right =
        static_cast<int32_t>(high == 0.0f) | static_cast<int32_t>(high < ends.floor);
    zeros += left & right;
  }
  return ends.count - zeros;
}

Constants constants_for(const Call& call, int64_t nonzero, double of_sum) {
  using rounding::gamma_bound;
  using rounding::kUnit;
  using rounding::to_float_up;
  const auto depth = static_cast<double>(sum_depth(call.weight.terms));
  const double half = 0.5 * gamma_bound(static_cast<double>(nonzero + 1));       // H
  const double moved = (2.0 + call.operand_error) * call.operand_error;          // V
  double of_terms = moved + kUnit * (1.0 + moved) + half * (1.0 + 2.0 * moved);  // A
  double of_bias = half;
  if (call.weight.packed != nullptr) {
    of_terms = std::max(of_terms, kPackedError);
    of_bias = std::max(of_bias, kPackedError);
  }
  constexpr double kRoundings = 1.0 + 1e-14;  // of the lines above and below
  const bool deployed = call.rounding == Rounding::kDeployed;
  Constants out{};
  out.outward = call.rounding != Rounding::kNearest;
  out.centre_gain =
      to_float_up(deployed ? (of_sum * (1.0 + half) + of_terms) * kRoundings : of_sum);
  const double of_rounding = gamma_bound(depth) / depth;  // gamma_d <= d times that, d <= depth
  out.term_gain = to_float_up((deployed ? 1.0 + half : 1.0) * of_rounding * kRoundings);
  out.radius_gain = to_float_up(deployed ? (1.0 + of_terms + half) * kRoundings : 1.0);
  out.input_floor = out.outward ? to_float_up(kInputFloor) : 0.0f;
  const double reach = gamma_bound(depth + (call.coarse_radius ? 2.0 * kCoarseChain : 0.0));
  out.inflate = to_float_up((1.0 + 8.0 * kUnit) / (1.0 - reach));
  out.bias_gain = deployed ? to_float_up(of_bias * kRoundings) : 0.0f;
  out.value_gain = deployed ? to_float_up(half * (1.0 + 2.0 * kUnit)) : 0.0f;
  out.least = deployed ? std::numeric_limits<float>::min() : 0.0f;
  out.limit = deployed ? rounding::to_float_down(half * kLimit) : rounding::infinity();
  return out;
}

float offset_for(const Call& call, float largest) {
  if (call.operand_error > 0.0f && !(largest < 8.507059e37f)) return rounding::infinity();
  const bool scaled = call.weight.packed != nullptr && call.rounding == Rounding::kDeployed;
  const double scale = (call.coarse_radius ? 2.0 : 1.0) * (scaled ? kPackedFlush : kFlush) *
                       static_cast<double>(call.weight.terms + 8);
  return rounding::to_float_up(scale * (1.0 + 2.0 * static_cast<double>(largest)));
}

void check_terms(const char* subject, int64_t terms) {
  check(terms <= kMaxTerms, subject, ": an output may sum at most ", kMaxTerms, " products; got ",
        terms, ".");
}

}  // namespace interval
}  // namespace pyrobust
