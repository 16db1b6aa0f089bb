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

// The coefficients of every octave that one word can reach as a row of 48 bytes: two loads a
// variate instead of six, one address, and hardly a bank conflict: lanes of one octave read one
// address, and octaves collide 8 apart, that is once in 2^8 values. Row e is for floats with the
// exponent field e. Rows below kFirstExponent hold nothing: only the word 0, which is redrawn,
// reads one (row 0).
struct NormalRow {
  cuda::Words4 high;  // coefficients 5 to 2
  cuda::Words2 low;   // 1 and 0
  cuda::Words4 unused;
};
static_assert(sizeof(NormalRow) == 48, "the stride of the table");

constexpr int kExponents = 160, kFirstExponent = 127;
constexpr int kShiftOfWord = 32;  // normal_magnitude's shift for one word
constexpr size_t kNormalShared = kExponents * sizeof(NormalRow);

PYROBUST_DEVICE const NormalRow* fill_normal(const NormalTable& table, uint8_t* shared) {
  auto* rows = reinterpret_cast<NormalRow*>(shared);
  for (int e = static_cast<int>(threadIdx.x); e < kExponents; e += static_cast<int>(blockDim.x)) {
    const int octave = e - 127 + kShiftOfWord;
    const bool reached = e >= kFirstExponent && octave < 64;
    uint32_t bits[kNormalDegree + 1];
#pragma unroll
    for (int k = 0; k <= kNormalDegree; ++k) {
      bits[k] = reached ? bits_of_float(table.coefficient[k][octave]) : 0u;
    }
    rows[e].high = {{bits[5], bits[4], bits[3], bits[2]}};
    rows[e].low = {{bits[1], bits[0]}};
  }
  cuda::sync_threads();
  return rows;
}

static_assert(kNormalDegree == 5, "fill_normal and normal_by_table spell the degree out");

// normal_from_bits, for bits that need no refinement; for others, something finite.
PYROBUST_DEVICE float normal_by_table(const NormalRow* rows, uint32_t bits) {
  const uint32_t scaled =
      bits_of_float(static_cast<float>(static_cast<int32_t>(bits & 0x7fffffffu)));
  const float s = float_from_bits((scaled & 0x007fffffu) | 0x3f800000u) - 1.5f;
  const NormalRow* row = rows + (scaled >> 23);
  const cuda::Words4 high = cuda::load16(&row->high);
  const cuda::Words2 low = row->low;
  float value = float_from_bits(high.word[0]);
  value = fused_multiply_add(value, s, float_from_bits(high.word[1]));
  value = fused_multiply_add(value, s, float_from_bits(high.word[2]));
  value = fused_multiply_add(value, s, float_from_bits(high.word[3]));
  value = fused_multiply_add(value, s, float_from_bits(low.word[0]));
  value = fused_multiply_add(value, s, float_from_bits(low.word[1]));
  return normal_with_sign(value, bits);
}

// normal_at, refinement included.
PYROBUST_DEVICE float normal_here(const NormalRow* rows, const NormalTable& table,
                                  const Stream& stream, Place place, uint32_t bits) {
  if (!normal_needs_refinement(bits)) return normal_by_table(rows, bits);
  return normal_refined(table, bits, word_at(stream, place, kPurposeRefinement));
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
