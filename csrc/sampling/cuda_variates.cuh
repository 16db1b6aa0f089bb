// The variates of core/ on a GPU: the table of normals in shared memory, by a float's exponent.
#pragma once

#include "cuda/primitives.h"
#include "sampling/places.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

struct Tables {
  NormalTable normal;
  LaplaceTable laplace;
};

// Where 31 random bits m stand among floats: 2 m rounded to one, `scaled`, is a power of two, an
// octave with a `row` of its own, the power's exponent field, times a place in [1, 2).
constexpr uint32_t kSettledRow = 127 + 19, kRows = 127 + 32 + 1;
constexpr uint32_t kExponent = 0x7f800000u;
static_assert(kNormalRefineBelow == 1u << 18, "rows from kSettledRow on need no refinement");

PYROBUST_DEVICE float scaled_of(uint32_t bits) { return static_cast<float>(bits << 1); }

// --- normals ------------------------------------------------------------------------------------

// The coefficients of a row as 16 and 8 bytes of shared memory: two loads a variate instead of six,
// one address, and hardly a bank conflict: lanes of one octave read one address, octaves collide 8
// apart, that is once in 2^8 values. Rows below kSettledRow are zeros: their words are redrawn.
// They lie so that bit 9 of an address tells them from the others, the row 0 of m = 0 among them:
// addresses joined by `and` show whether one of many words must be redrawn, at half an instruction
// each.
//
// With p the power, the polynomial in s = scaled / p - 1.5 is evaluated in p s, one fused operation
// from scaled and p and exact: coefficient k is multiplied by p^-k, and all of them by 2^kLift,
// which keeps the smallest normal. So every step is rounded as in normal_magnitude, and the result
// is 2^kLift |z|.
constexpr int kLift = 48;
constexpr float kLiftDown = 1.0f / (int64_t{1} << kLift);
constexpr uint32_t kRowBytes = 16, kSettledBit = 512;
constexpr uint32_t kFirstRowAt = 224;                             // coefficients 5 to 2
constexpr uint32_t kLowRowsAt = kFirstRowAt + kRows * kRowBytes;  // 1 and 0
constexpr size_t kNormalShared = kLowRowsAt + kRows * kRowBytes;
static_assert((kFirstRowAt + kSettledRow * kRowBytes) % 1024 == kSettledBit &&
                  (kFirstRowAt & kSettledBit) == 0 && kRows - kSettledRow <= 32,
              "bit 9 of an address");
static_assert(kNormalDegree == 5, "fill_normal and lifted_normals spell the degree out");
static_assert(kLift - 5 * 32 - 7 > -126 && kLift < 126, "coefficients from 2^-7 on stay normal");

PYROBUST_DEVICE float power_of_two(int exponent) {
  return float_from_bits(static_cast<uint32_t>(127 + exponent) << 23);
}

// The first row, for lifted_normals.
PYROBUST_DEVICE cuda::SharedPlace fill_normal(const NormalTable& table, uint8_t* shared) {
  uint8_t* rows = shared + kFirstRowAt;
  for (uint32_t row = threadIdx.x; row < kRows; row += blockDim.x) {
    uint32_t bits[kNormalDegree + 1];
#pragma unroll
    for (int k = 0; k <= kNormalDegree; ++k) {
      bits[k] = 0;
      if (row < kSettledRow) continue;
      // The last row, m rounded to 2^31, is the table's last octave.
      const float power = power_of_two(kLift - k * (static_cast<int>(row) - 127));
      bits[k] = bits_of_float(table.coefficient[k][row + 64 - kRows] * power);
    }
    cuda::store16(rows + row * kRowBytes, {{bits[5], bits[4], bits[3], bits[2]}});
    cuda::store8(rows + kRows * kRowBytes + row * kRowBytes, {{bits[1], bits[0]}});
  }
  cuda::sync_threads();
  return cuda::shared_place(rows);
}

// 2^kLift normal_from_bits of several words, for bits that need no refinement; for others, zero.
// `addresses` is joined with those of the rows. All words are looked up before the first is used:
// left to itself the compiler waits for one after another.
template <int kCount>
PYROBUST_DEVICE void lifted_normals(cuda::SharedPlace rows, const uint32_t (&bits)[kCount],
                                    float (&value)[kCount], uint32_t* addresses) {
  float scaled[kCount];
  uint32_t power[kCount];
  cuda::SharedPlace row[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    scaled[i] = scaled_of(bits[i]);
    power[i] = bits_of_float(scaled[i]) & kExponent;
    row[i] = rows + (power[i] >> 19);  // 16 bytes a row
  }
  constexpr uint32_t kAll = cuda::kLopA & cuda::kLopB & cuda::kLopC;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    *addresses = cuda::lop3<kAll>(*addresses, static_cast<uint32_t>(row[i]),
                                  static_cast<uint32_t>(row[i + 1 < kCount ? i + 1 : i]));
  }
  cuda::Words4 high[kCount];
  cuda::Words2 low[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) high[i] = cuda::load16_of_table(row[i], 0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) low[i] = cuda::load8_of_table(row[i], kRows * kRowBytes);
  float s[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = fused_multiply_add(float_from_bits(power[i]), -1.5f, scaled[i]);
    value[i] = float_from_bits(high[i].word[0]);
  }
#pragma unroll
  for (int k = 1; k <= kNormalDegree; ++k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t coefficient = k < 4 ? high[i].word[k % 4] : low[i].word[k % 4];
      value[i] = fused_multiply_add(value[i], s[i], float_from_bits(coefficient));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = normal_with_sign(value[i], bits[i]);
}

// --- Laplace ------------------------------------------------------------------------------------

// laplace_from_bits, for bits that need no refinement; for others, something finite, and the sign
// bit of *small is set. `one`: the bits of 1.0, in a register, since an instruction takes but one
// constant.
PYROBUST_DEVICE float laplace_of(const LaplaceTable& table, uint32_t bits, uint32_t one,
                                 uint32_t* small) {
  const uint32_t scaled = bits_of_float(scaled_of(bits));
  *small |= scaled - (kSettledRow << 23);
  constexpr uint32_t kMantissa = (cuda::kLopA & cuda::kLopB) | cuda::kLopC;
  const float s = float_from_bits(cuda::lop3<kMantissa>(scaled, 0x007fffffu, one)) - 1.5f;
  float value = table.coefficient[kLaplaceDegree];
#pragma unroll
  for (int k = kLaplaceDegree - 1; k >= 0; --k) {
    value = fused_multiply_add(value, s, table.coefficient[k]);
  }
  // 2^23 plus the row, as a float: one shift of two words.
  constexpr uint64_t kTwoTo23 = uint64_t{0x4b000000u >> 9} << 32;
  const float row = float_from_bits(static_cast<uint32_t>((kTwoTo23 | scaled) >> 23));
  const float octaves = (8388608.0f + static_cast<float>(kRows - 1)) - row;
  return normal_with_sign(fused_multiply_add(octaves, kLn2, value), bits);
}

// normal_at, refinement included.
PYROBUST_DEVICE float normal_here(cuda::SharedPlace rows, const NormalTable& table,
                                  const Stream& stream, Place place, uint32_t bits) {
  if (normal_needs_refinement(bits)) {
    return normal_refined(table, bits, word_at(stream, place, kPurposeRefinement));
  }
  const uint32_t words[1] = {bits};
  float value[1];
  uint32_t addresses = 0;
  lifted_normals(rows, words, value, &addresses);
  return value[0] * kLiftDown;
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
