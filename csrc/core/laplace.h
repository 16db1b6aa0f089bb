// 32 random bits to a Laplace variate of scale 1 (density exp(-|z|) / 2), with the same layout and
// the same refinement of small magnitudes as the normal transform (normal.h): bit 31 is the sign
// and |z| = -ln((m + 1/2) / 2^31), so the tail reaches 43.6. ln 2 times the octave of the
// probability, plus one polynomial of degree 7 for all octaves (minimax on [1, 2), found as in
// normal_table.py).
//
// Error: ||z| - the quantile above| <= kLaplaceError for every m >= 2^18, and at most
// kLaplaceErrorRefined in the refined branch, where float32 itself is that coarse
// (tests/native/test_laplace.py).
#pragma once

#include <stdint.h>

#include "core/float_types.h"
#include "core/fused.h"
#include "core/host_device.h"
#include "core/normal.h"

namespace pyrobust {

constexpr double kLaplaceError = 3.0e-6, kLaplaceErrorRefined = 4.5e-6;
constexpr int kLaplaceDegree = 7;
constexpr float kLn2 = 0.693147180559945309f;

// -ln(1.5 + s), |s| <= 1/2, to 2.2e-7.
struct LaplaceTable {
  float coefficient[kLaplaceDegree + 1];
};
constexpr LaplaceTable kLaplaceTable = {{-4.05465305e-01f, -6.66665733e-01f, 2.22245395e-01f,
                                         -9.88048837e-02f, 4.89289910e-02f, -2.58622728e-02f,
                                         1.74141936e-02f, -1.04839671e-02f}};

// |z| from a float32 `scaled` > 0 with tail probability scaled * 2^(shift - 64).
PYROBUST_HD float laplace_magnitude(const LaplaceTable& table, float scaled, int shift) {
  const uint32_t bits = bits_of_float(scaled);
  const int octaves = 63 - shift + 127 - static_cast<int>(bits >> 23);
  const float s = float_from_bits((bits & 0x007fffffu) | 0x3f800000u) - 1.5f;
  float value = table.coefficient[kLaplaceDegree];
  for (int k = kLaplaceDegree - 1; k >= 0; --k) {
    value = fused_multiply_add(value, s, table.coefficient[k]);
  }
  return fused_multiply_add(static_cast<float>(octaves), kLn2, value);
}

// For bits that need no refinement (normal_needs_refinement).
PYROBUST_HD float laplace_from_bits(const LaplaceTable& table, uint32_t bits) {
  const float scaled = static_cast<float>(static_cast<int32_t>(bits & 0x7fffffffu));
  return normal_with_sign(laplace_magnitude(table, scaled, 32), bits);
}

// For bits that need it, with 32 bits more.
PYROBUST_HD float laplace_refined(const LaplaceTable& table, uint32_t bits, uint32_t extra) {
  const uint64_t m = (static_cast<uint64_t>(bits & 0x7fffffffu) << 32) | extra | 1u;
  const float scaled = static_cast<float>(static_cast<int64_t>(m));
  return normal_with_sign(laplace_magnitude(table, scaled, 0), bits);
}

}  // namespace pyrobust
