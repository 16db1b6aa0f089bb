// The variates of core/ on a GPU: tables in shared memory, indexed by a float's exponent.
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

// Where 31 random bits m stand among floats: 2 m is converted, in [1, 2) times an octave, the
// `row`; s is its place there less 1.5.
struct Octave {
  float s;
  uint32_t row;  // the exponent field of 2 m
};
constexpr uint32_t kSettledRow = 127 + 19, kRows = 127 + 32 + 1;
static_assert(kNormalRefineBelow == 1u << 18, "rows from kSettledRow on need no refinement");

// `one`: the bits of 1.0, in a register, since an instruction takes but one constant.
PYROBUST_DEVICE Octave octave_of(uint32_t bits, uint32_t one) {
  const uint32_t scaled = bits_of_float(static_cast<float>(bits << 1));
  constexpr uint32_t kMantissa = (cuda::kLopA & cuda::kLopB) | cuda::kLopC;
  return {float_from_bits(cuda::lop3<kMantissa>(scaled, 0x007fffffu, one)) - 1.5f, scaled >> 23};
}

// The normal coefficients of a row as 16 and 8 bytes of shared memory: two loads a variate instead
// of six, one address, and hardly a bank conflict: lanes of one octave read one address, octaves
// collide 8 apart, that is once in 2^8 values. Rows below kSettledRow are zeros: their words are
// redrawn. They lie so that bit 9 of an address tells them from the others, the row 0 of m = 0
// among them: addresses joined by `and` show whether one of many words must be redrawn, at half an
// instruction each.
constexpr int kRowShift = 4;
constexpr uint32_t kRowBytes = 1u << kRowShift, kSettledBit = 512;
constexpr uint32_t kFirstRowAt = 224;                             // coefficients 5 to 2
constexpr uint32_t kLowRowsAt = kFirstRowAt + kRows * kRowBytes;  // 1 and 0
constexpr size_t kNormalShared = kLowRowsAt + kRows * kRowBytes;
static_assert((kFirstRowAt + kSettledRow * kRowBytes) % 1024 == kSettledBit &&
                  (kFirstRowAt & kSettledBit) == 0 && kRows - kSettledRow <= 32,
              "bit 9 of an address");
static_assert(kNormalDegree == 5, "fill_normal and normal_by_table spell the degree out");

// The first row, for normal_by_table.
PYROBUST_DEVICE cuda::SharedPlace fill_normal(const NormalTable& table, uint8_t* shared) {
  uint8_t* rows = shared + kFirstRowAt;
  for (uint32_t row = threadIdx.x; row < kRows; row += blockDim.x) {
    uint32_t bits[kNormalDegree + 1];
#pragma unroll
    for (int k = 0; k <= kNormalDegree; ++k) {
      // The last row, m rounded to 2^31, is the table's last octave.
      bits[k] = row >= kSettledRow ? bits_of_float(table.coefficient[k][row + 64 - kRows]) : 0u;
    }
    cuda::store16(rows + row * kRowBytes, {{bits[5], bits[4], bits[3], bits[2]}});
    cuda::store8(rows + kRows * kRowBytes + row * kRowBytes, {{bits[1], bits[0]}});
  }
  cuda::sync_threads();
  return cuda::shared_place(rows);
}

// normal_from_bits, for bits that need no refinement; for others, zero.
PYROBUST_DEVICE float normal_by_table(cuda::SharedPlace row, float s, uint32_t bits) {
  const cuda::Words4 high = cuda::load16_shared(row, 0);
  const cuda::Words2 low = cuda::load8_shared(row, kRows * kRowBytes);
  float value = float_from_bits(high.word[0]);
  value = fused_multiply_add(value, s, float_from_bits(high.word[1]));
  value = fused_multiply_add(value, s, float_from_bits(high.word[2]));
  value = fused_multiply_add(value, s, float_from_bits(high.word[3]));
  value = fused_multiply_add(value, s, float_from_bits(low.word[0]));
  value = fused_multiply_add(value, s, float_from_bits(low.word[1]));
  return normal_with_sign(value, bits);
}

// laplace_from_bits, for bits that need no refinement; for others, something finite.
PYROBUST_DEVICE float laplace_of(const LaplaceTable& table, const Octave& octave, uint32_t bits) {
  float value = table.coefficient[kLaplaceDegree];
#pragma unroll
  for (int k = kLaplaceDegree - 1; k >= 0; --k) {
    value = fused_multiply_add(value, octave.s, table.coefficient[k]);
  }
  const auto octaves = static_cast<float>(static_cast<int32_t>(kRows - 1 - octave.row));
  return normal_with_sign(fused_multiply_add(octaves, kLn2, value), bits);
}

// normal_at, refinement included.
PYROBUST_DEVICE float normal_here(cuda::SharedPlace rows, const NormalTable& table,
                                  const Stream& stream, Place place, uint32_t bits) {
  if (normal_needs_refinement(bits)) {
    return normal_refined(table, bits, word_at(stream, place, kPurposeRefinement));
  }
  const Octave octave = octave_of(bits, 0x3f800000u);
  return normal_by_table(cuda::place_of_row<kRowShift>(rows, octave.row), octave.s, bits);
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
