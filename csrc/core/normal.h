// The one normal transform of the library: 32 random bits to a standard normal variate, with
// integer operations, float32 additions and fused multiply-adds only, each rounded once, so that
// every instruction set and CUDA give the same bits.
//
// Bit 31 is the sign, m = the other 31 bits, and |z| = -Phi^-1((m + 1/2) / 2^32): the inverse of
// the distribution function, by a polynomial of degree 5 per octave of the tail probability
// (normal_table.h). Where m < 2^18, once in 2^13 draws, 32 more bits refine it to
// -Phi^-1((m 2^32 + (extra | 1)) / 2^64). So the tail is not cut: |z| reaches 9.08, and the mass
// beyond that is 2^-63.
// Magnitudes that round to 2^31 fall into an octave of zeros, right to 4e-8.
//
// Error: ||z| - the quantile above| <= kNormalError, checked over every m >= 2^18 and over every
// float that the refined branch can meet (tests/native/test_normal.py).
#pragma once

#include <stdint.h>

#include "core/float_types.h"
#include "core/fused.h"
#include "core/host_device.h"
#include "core/normal_table.h"

namespace pyrobust {

constexpr double kNormalError = 4.0e-6;
constexpr uint32_t kNormalRefineBelow = 1u << 18;

// |z| from a float32 `scaled` > 0 with tail probability scaled * 2^(shift - 64).
PYROBUST_HD float normal_magnitude(const NormalTable& table, float scaled, int shift) {
  const uint32_t bits = bits_of_float(scaled);
  const int octave = static_cast<int>(bits >> 23) - 127 + shift;
  const float s = float_from_bits((bits & 0x007fffffu) | 0x3f800000u) - 1.5f;
  float value = table.coefficient[kNormalDegree][octave];
  for (int k = kNormalDegree - 1; k >= 0; --k) {
    value = fused_multiply_add(value, s, table.coefficient[k][octave]);
  }
  return value;
}

PYROBUST_HD bool normal_needs_refinement(uint32_t bits) {
  return (bits & 0x7fffffffu) < kNormalRefineBelow;
}

PYROBUST_HD float normal_with_sign(float magnitude, uint32_t bits) {
  return float_from_bits(bits_of_float(magnitude) ^ (bits & 0x80000000u));
}

// For bits that need no refinement.
PYROBUST_HD float normal_from_bits(const NormalTable& table, uint32_t bits) {
  const float scaled = static_cast<float>(static_cast<int32_t>(bits & 0x7fffffffu));
  return normal_with_sign(normal_magnitude(table, scaled, 32), bits);
}

// For bits that need it, with 32 bits more.
PYROBUST_HD float normal_refined(const NormalTable& table, uint32_t bits, uint32_t extra) {
  const uint64_t m = (static_cast<uint64_t>(bits & 0x7fffffffu) << 32) | extra | 1u;
  const float scaled = static_cast<float>(static_cast<int64_t>(m));
  return normal_with_sign(normal_magnitude(table, scaled, 0), bits);
}

}  // namespace pyrobust
