// Boxes and weights as bfloat16 operands of a library's products (cuda_library.h).
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_library.h"
#include "interval/cuda_terms.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kFour = 4;  // terms of a thread
constexpr int64_t kTermsOfSegment = kFour * kPrepareThreads;

PYROBUST_HD int64_t segments_of(int64_t count) {
  return (count + kTermsOfSegment - 1) / kTermsOfSegment;
}

PYROBUST_DEVICE uint16_t radius_half(float radius, float extra, bool outward) {
  return outward ? bfloat16_up(cuda::add_up(radius, extra)) : bfloat16_from_float(radius + extra);
}

// (c_hi | c_lo << 16, r^)
PYROBUST_DEVICE cuda::Words2 split_term(float low, float high, float extra,
                                        const Constants& constants) {
  const Prepared term = prepare_term(low, high, constants);
  if (!term.finite) return {{0u, kInfiniteHalf}};
  const uint32_t centre_high = bfloat16_from_float(term.centre);
  const uint32_t centre_low =
      bfloat16_from_float(term.centre - float_from_bfloat16(static_cast<uint16_t>(centre_high)));
  return {{centre_high | centre_low << 16, radius_half(term.radius, extra, constants.outward)}};
}

PYROBUST_DEVICE void load_four(const float* from, int64_t left, bool vectors, float (&out)[kFour]) {
  if (vectors && left >= kFour) {
    const cuda::Words4 four = cuda::load16_once(from);
#pragma unroll
    for (int i = 0; i < kFour; ++i) out[i] = float_from_bits(four.word[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) out[i] = i < left ? from[i] : 0.0f;
}

// Four halves at an 8-byte address, as one word: nvcc takes a pair of words apart here.
PYROBUST_DEVICE void store_halves(const uint32_t (&half)[kFour], uint16_t* to) {
  const uint64_t low = half[0] | half[1] << 16, high = half[2] | half[3] << 16;
  *reinterpret_cast<uint64_t*>(to) = low | high << 32;
}

// Four terms side by side to each of the three planes.
PYROBUST_DEVICE void store_four(const cuda::Words2 (&parts)[kFour], uint16_t* to,
                                int64_t plane_size) {
  uint32_t high[kFour], low[kFour], radius[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    high[i] = parts[i].word[0] & 0xffffu;
    low[i] = parts[i].word[0] >> 16;
    radius[i] = parts[i].word[1];
  }
  store_halves(high, to);
  store_halves(low, to + plane_size);
  store_halves(radius, to + 2 * plane_size);
}

// --- weights ------------------------------------------------------------------------------------

struct SplitWeightWork {
  SplitWeight to;
  bool vectors;  // rows of float32 begin on vector borders
};

PYROBUST_KERNEL(kPrepareThreads)
split_weight_kernel(const __grid_constant__ SplitWeightWork work) {
  const SplitWeight& to = work.to;
  const int64_t segments = segments_of(to.padded), row = blockIdx.x / segments;
  const int64_t at = (blockIdx.x % segments * kPrepareThreads + threadIdx.x) * kFour;
  if (at >= to.padded) return;
  const int64_t from = row * to.terms + at, left = to.terms - at;
  float w[kFour];
  if (to.bfloat16) {
    const auto* halves = static_cast<const uint16_t*>(to.weight) + from;
#pragma unroll
    for (int i = 0; i < kFour; ++i) w[i] = i < left ? float_from_bfloat16(halves[i]) : 0.0f;
  } else {
    load_four(static_cast<const float*>(to.weight) + from, left, work.vectors, w);
  }
  constexpr float kLeastMagnitude = 7.888609052210118e-31f;  // 2^-100
  uint32_t first[kFour], second[kFour], magnitude[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const float size = fabsf(w[i]);
    first[i] = bfloat16_from_float(w[i]);
    second[i] = bfloat16_from_float(w[i] - float_from_bfloat16(static_cast<uint16_t>(first[i])));
    // Not where a term is absent: zeros there keep whatever they meet out of the sums.
    magnitude[i] = i < left ? bfloat16_up(size < kLeastMagnitude ? kLeastMagnitude : size) : 0u;
  }
  const int64_t place = row * to.padded + at;
  if (to.first != nullptr) store_halves(first, to.first + place);
  if (to.second != nullptr) store_halves(second, to.second + place);
  if (to.magnitude != nullptr) store_halves(magnitude, to.magnitude + place);
}

// --- rows ---------------------------------------------------------------------------------------

struct SplitRowsWork {
  SplitRows to;
  Constants constants;
  bool vectors;
};

PYROBUST_DEVICE float extra_of(float widest, const Constants& constants) {
  return cuda::mul_up(cuda::mul_up(widest, kHalfStep), constants.radius_gain);
}

// One block an input: what the rounding of activations adds to its radii.
PYROBUST_KERNEL(kPrepareThreads) extra_rows_kernel(const __grid_constant__ SplitRowsWork work) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const int64_t terms = work.to.sum.terms, first = blockIdx.x * terms;
  float widest = 0.0f;
  for (int64_t k = threadIdx.x; k < terms; k += kPrepareThreads) {
    const Prepared term =
        prepare_term(work.to.lower[first + k], work.to.upper[first + k], work.constants);
    const float reach =
        term.finite ? cuda::add_up(fabsf(term.centre), term.radius) : rounding::infinity();
    widest = reach > widest ? reach : widest;
  }
  widest = block_max(widest, shared);
  if (threadIdx.x == 0) work.to.extra[blockIdx.x] = extra_of(widest, work.constants);
}

PYROBUST_KERNEL(kPrepareThreads) split_rows_kernel(const __grid_constant__ SplitRowsWork work) {
  const LibrarySum& sum = work.to.sum;
  const int64_t segments = segments_of(sum.padded), input = blockIdx.x / segments;
  const int64_t at = (blockIdx.x % segments * kPrepareThreads + threadIdx.x) * kFour;
  if (at >= sum.padded) return;
  const float extra = work.to.extra != nullptr ? work.to.extra[input] : 0.0f;
  const int64_t from = input * sum.terms + at, left = sum.terms - at;
  float low[kFour], high[kFour];
  load_four(work.to.lower + from, left, work.vectors, low);
  load_four(work.to.upper + from, left, work.vectors, high);
  cuda::Words2 parts[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    parts[i] = cuda::Words2{{0u, 0u}};
    if (i < left) parts[i] = split_term(low[i], high[i], extra, work.constants);
  }
  store_four(parts, work.to.planes + input * sum.padded + at, work.to.batch * sum.padded);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
