// Centres and radii as bfloat16 pairs, and the absolute term of every input.
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_layout.h"
#include "interval/cuda_terms.cuh"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

struct PrepareWork {
  const float* lower;
  const float* upper;
  int64_t batch;
  int64_t terms;
  int order;  // of the terms
  bool int8;
  Constants constants;
  uint16_t* operands;
  float* offsets;  // (padded batch)
};

PYROBUST_DEVICE void store_term(const PrepareWork& work, const Shape& shape, int64_t input,
                                int64_t term, float centre, float radius) {
  uint16_t* to = work.operands;
  const uint16_t centre_high = bfloat16_from_float(centre);
  const uint16_t centre_low = bfloat16_from_float(centre - float_from_bfloat16(centre_high));
  const auto radius_high = static_cast<uint16_t>(bits_of_float(radius) >> 16);  // cut
  const float rest = radius - float_from_bfloat16(radius_high);
  const auto radius_low = static_cast<uint16_t>((bits_of_float(rest) + 0xffffu) >> 16);  // up
  to[operand_index(shape, 0, input, term, work.order)] = centre_high;
  to[operand_index(shape, 1, input, term, work.order)] = centre_low;
  to[operand_index(shape, 2, input, term, work.order)] = radius_high;
  to[operand_index(shape, 3, input, term, work.order)] = radius_low;
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
