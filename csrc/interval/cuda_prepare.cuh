// Centres and radii as bfloat16 pairs, and the absolute term of every input.
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_layout.h"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kPrepareThreads = 256;

struct PrepareWork {
  const float* lower;
  const float* upper;
  int64_t batch;
  int64_t terms;
  int bits;  // order of the terms
  bool int8;
  Constants constants;
  uint16_t* operands;
  float* offsets;  // (padded batch)
};

// Half a step of the dynamic 8-bit rounding over 1, rounded up (panels.h: half_step).
constexpr float kHalfStep = 0.5f / 127.0f * (1.0f + 4.0f / 1048576.0f);

struct Prepared {
  float centre;
  float radius;  // r', before the rounding of activations
  float magnitude;
  bool finite;
};

PYROBUST_HD float lowest_part(float value, float rest) {
  return (value - float_from_bfloat16(bfloat16_from_float(value))) - rest;
}

PYROBUST_DEVICE Prepared prepare_term(float low, float high, const Constants& constants) {
  const float c = low == high ? low : 0.5f * low + 0.5f * high;
  const float up = high - c, down = c - low;
  Prepared out;
  out.centre = c;
  out.magnitude = rounding::infinity();
  const float largest = fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high);
  out.finite = c - c == 0.0f && up - up == 0.0f && down - down == 0.0f && largest - largest == 0.0f;
  if (out.finite) out.magnitude = largest;
  if (!constants.outward) {
    out.radius = up > down ? up : down;
    return out;
  }
  const float reach = cuda::add_up(high, -c) > cuda::add_up(c, -low) ? cuda::add_up(high, -c)
                                                                     : cuda::add_up(c, -low);
  const float high_part = float_from_bfloat16(bfloat16_from_float(c));
  const float rest = c - high_part;  // exact, and so is what its own rounding leaves
  const float left = fabsf(rest - float_from_bfloat16(bfloat16_from_float(rest)));
  out.radius = cuda::fma_up(
      reach, constants.radius_gain,
      cuda::fma_up(fabsf(c), constants.centre_gain, cuda::add_up(left, constants.input_floor)));
  return out;
}

PYROBUST_DEVICE void store_term(const PrepareWork& work, const Shape& shape, int64_t input,
                                int64_t term, float centre, float radius) {
  uint16_t* to = work.operands;
  const uint16_t centre_high = bfloat16_from_float(centre);
  const uint16_t centre_low = bfloat16_from_float(centre - float_from_bfloat16(centre_high));
  const auto radius_high = static_cast<uint16_t>(bits_of_float(radius) >> 16);  // cut
  const float rest = radius - float_from_bfloat16(radius_high);
  const auto radius_low = static_cast<uint16_t>((bits_of_float(rest) + 0xffffu) >> 16);  // up
  to[operand_index(shape, 0, input, term, work.bits)] = centre_high;
  to[operand_index(shape, 1, input, term, work.bits)] = centre_low;
  to[operand_index(shape, 2, input, term, work.bits)] = radius_high;
  to[operand_index(shape, 3, input, term, work.bits)] = radius_low;
}

// The maximum over the block of values >= 0, in every thread.
PYROBUST_DEVICE float block_max(float value, float* shared) {
  const float of_warp = cuda::warp_max(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_warp;
  cuda::sync_threads();
  float most = 0.0f;
  for (int warp = 0; warp < kPrepareThreads / 32; ++warp) {
    most = shared[warp] > most ? shared[warp] : most;
  }
  cuda::sync_threads();
  return most;
}

PYROBUST_DEVICE float offset_of(float largest, int64_t terms, const Constants& constants) {
  if (!constants.outward) return 0.0f;
  constexpr float kTwiceFlush = 9.4039548065783e-38f;  // 2^-123
  const float scale = cuda::mul_up(kTwiceFlush, cuda::add_up(static_cast<float>(terms), 8.0f));
  return cuda::mul_up(scale, cuda::fma_up(2.0f, largest, 1.0f));
}

// One block an input; blocks past the batch write zeros.
PYROBUST_KERNEL(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareWork work) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const Shape shape = operand_shape(work.batch, work.terms);
  const int64_t input = blockIdx.x;
  const int64_t present = input < work.batch ? work.terms : 0;
  const float *lower = work.lower + input * work.terms, *upper = work.upper + input * work.terms;
  float largest = 0.0f, widest = 0.0f;
  for (int64_t k = threadIdx.x; k < present; k += kPrepareThreads) {
    const Prepared term = prepare_term(lower[k], upper[k], work.constants);
    largest = term.magnitude > largest ? term.magnitude : largest;
    const float reach = cuda::add_up(fabsf(term.centre), term.radius);
    widest = reach > widest ? reach : widest;
  }
  largest = block_max(largest, shared);
  widest = work.int8 ? block_max(widest, shared) : 0.0f;
  const float extra = cuda::mul_up(cuda::mul_up(widest, kHalfStep), work.constants.radius_gain);
  for (int64_t k = threadIdx.x; k < shape.terms; k += kPrepareThreads) {
    Prepared term = {0.0f, 0.0f, 0.0f, true};
    if (k < present) term = prepare_term(lower[k], upper[k], work.constants);
    store_term(work, shape, input, k, term.finite ? term.centre : 0.0f,
               term.finite && k < present ? cuda::add_up(term.radius, extra) : 0.0f);
  }
  if (threadIdx.x == 0) {
    // An input that is not finite shows in its outputs by an infinite offset, in every mode.
    const bool finite = largest < rounding::infinity();
    work.offsets[input] =
        finite ? offset_of(largest, work.terms, work.constants) : rounding::infinity();
  }
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
