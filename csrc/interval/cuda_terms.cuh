// One term of a box as centre and radius, before either becomes bfloat16.
#pragma once

#include "core/rounding.h"
#include "cuda/primitives.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kPrepareThreads = 256;

// Half a step of the dynamic 8-bit rounding over 1, rounded up (panels.h: half_step).
constexpr float kHalfStep = 0.5f / 127.0f * (1.0f + 4.0f / 1048576.0f);

constexpr uint16_t kInfiniteHalf = 0x7f80;

// Of value >= 0; infinity where there is none above, or of a NaN.
PYROBUST_HD uint16_t bfloat16_up(float value) {
  if (!(value < rounding::infinity())) return kInfiniteHalf;
  return static_cast<uint16_t>((bits_of_float(value) + 0xffffu) >> 16);
}

struct Prepared {
  float centre;
  float radius;  // r', before the rounding of activations
  float magnitude;
  bool finite;
};

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

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
