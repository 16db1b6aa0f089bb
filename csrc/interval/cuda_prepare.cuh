// Centres and radii as bfloat16, and the absolute term of every input.
#pragma once

#include "interval/cuda_layout.h"
#include "interval/cuda_prepare.h"
#include "interval/cuda_terms.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

struct PrepareWork {
  const float* lower;
  const float* upper;
  int64_t batch;
  int64_t terms;
  bool int8;
  Constants constants;
  uint16_t* operands;
  float* offsets;     // (batch)
  int parts;          // blocks of a cluster, which share an input
  int32_t* counters;  // that become zero
  int count;
  int image_inputs;
  TermStrides strides;
  float flush;  // flush_of()
};

constexpr size_t kPrepareShared = 128;
constexpr int kMaximaAt = 64;  // bytes; block_max uses those before

// Blocks of an input: each thread has one chunk of eight terms where eight blocks are enough.
PYROBUST_HD int prepare_parts(int64_t terms) {
  int parts = 1;
  while (parts < kMostParts && parts * kPrepareThreads * kEight < terms) parts *= 2;
  return parts;
}

struct Maxima {
  float largest;  // |x|; infinite where an end is not finite
  float widest;   // |c| + r'
};

// Terms of chunk `chunk` of an input: eight that lie side by side, in images or in operands.
template <bool kImages>
PYROBUST_DEVICE void prepare_eight(const PrepareWork& work, int64_t input, int64_t chunk,
                                   Prepared (&out)[kEight]) {
  const int of_step = static_cast<int>(chunk % 16);
  const TermRun run =
      kImages ? run_of_images(work.strides, of_step) : run_of_operands(work.strides, of_step);
  const int64_t step = chunk / 16 * kStep, left = work.terms - step;
  const float* lower = work.lower + input * work.terms + step;
  const float* upper = work.upper + input * work.terms + step;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const int term = term_of_run(run, i);
    out[i] = {0.0f, -1.0f, 0.0f, true};  // a radius that stays below 0: absent
    if (term < left) out[i] = prepare_term(lower[term], upper[term], work.constants);
  }
}

PYROBUST_DEVICE void join_maxima(const Prepared (&terms)[kEight], Maxima* maxima) {
#pragma unroll
  for (const Prepared& term : terms) {
    maxima->largest = term.magnitude > maxima->largest ? term.magnitude : maxima->largest;
    const float reach = cuda::add_up(fabsf(term.centre), term.radius);
    maxima->widest = reach > maxima->widest ? reach : maxima->widest;
  }
}

PYROBUST_DEVICE void store_halves16(const uint32_t (&h)[kEight], uint16_t* to) {
  cuda::store16(to, {{h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16}});
}

// To four planes side by side, 64 bytes on end; or to the three of an image, its radius rounded up.
template <bool kImages>
PYROBUST_DEVICE void store_eight(const PrepareWork& work, const Prepared (&terms)[kEight],
                                 float extra, int64_t input, int64_t chunk) {
  uint32_t half[kPlanes][kEight];
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const bool present = terms[i].finite && terms[i].radius >= 0.0f;
    const float centre = present ? terms[i].centre : 0.0f;
    const float radius = present ? cuda::add_up(terms[i].radius, extra) : 0.0f;
    half[0][i] = bfloat16_from_float(centre);
    const float left = centre - float_from_bfloat16(static_cast<uint16_t>(half[0][i]));
    half[1][i] = bfloat16_from_float(left);
    half[2][i] = bits_of_float(radius) >> 16;  // cut
    const float rest = radius - float_from_bfloat16(static_cast<uint16_t>(half[2][i]));
    half[3][i] = (bits_of_float(rest) + 0xffffu) >> 16;  // up
    if (kImages) {
      half[2][i] = work.constants.outward ? bfloat16_up(radius) : bfloat16_from_float(radius);
    }
  }
  const int64_t terms_in_all = operand_shape(work.batch, work.terms).terms;
#pragma unroll
  for (int plane = 0; plane < (kImages ? kImagePlanes : kPlanes); ++plane) {
    const int64_t at = kImages ? image_index(terms_in_all, work.image_inputs, plane, input, chunk)
                               : (input * terms_in_all + chunk * kEight) * kPlanes + plane * kEight;
    store_halves16(half[plane], work.operands + at);
  }
}

// An input that is not finite shows in its outputs by an infinite offset, in every mode.
PYROBUST_DEVICE float offset_of(float largest, float flush) {
  if (!(largest < rounding::infinity())) return rounding::infinity();
  return flush == 0.0f ? 0.0f : cuda::mul_up(flush, cuda::fma_up(2.0f, largest, 1.0f));
}

// Over all blocks of the input; before the end of any block all must have read its maxima.
PYROBUST_DEVICE Maxima maxima_of_input(const PrepareWork& work, Maxima own) {
  uint8_t* shared = cuda::shared_memory();
  auto* of_warps = reinterpret_cast<float*>(shared);
  own.largest = block_max(own.largest, of_warps);
  own.widest = block_max(own.widest, of_warps);
  if (work.parts == 1) return own;
  if (threadIdx.x == 0) {
    cuda::store16(shared + kMaximaAt,
                  {{bits_of_float(own.largest), bits_of_float(own.widest), 0u, 0u}});
  }
  cuda::sync_cluster();
  for (int rank = 0; rank < work.parts; ++rank) {
    const cuda::Words4 words = cuda::load16_of_cluster(shared + kMaximaAt, rank);
    const float largest = float_from_bits(words.word[0]), widest = float_from_bits(words.word[1]);
    own.largest = largest > own.largest ? largest : own.largest;
    own.widest = widest > own.widest ? widest : own.widest;
  }
  cuda::sync_cluster();
  return own;
}

template <bool kImages>
PYROBUST_KERNEL_OF(kPrepareThreads, 3)
prepare_kernel(const __grid_constant__ PrepareWork work) {
  cuda::begin_next_grid();
  const int64_t input = blockIdx.x / static_cast<unsigned>(work.parts);
  const int part = static_cast<int>(blockIdx.x) % work.parts;
  const int64_t chunks = operand_shape(work.batch, work.terms).terms / kEight;
  const int64_t first = part * kPrepareThreads + static_cast<int>(threadIdx.x);
  const int64_t apart = int64_t{kPrepareThreads} * work.parts;
  const int64_t thread = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x;
  if (thread < work.count) work.counters[thread] = 0;
  Maxima maxima = {0.0f, 0.0f};
  for (int64_t chunk = first; chunk < chunks; chunk += apart) {
    Prepared terms[kEight];
    prepare_eight<kImages>(work, input, chunk, terms);
    join_maxima(terms, &maxima);
    if (!work.int8) store_eight<kImages>(work, terms, 0.0f, input, chunk);
  }
  maxima = maxima_of_input(work, maxima);
  if (part == 0 && threadIdx.x == 0) {
    work.offsets[input] = offset_of(maxima.largest, work.flush);
  }
  if (!work.int8) return;
  const float extra =
      cuda::mul_up(cuda::mul_up(maxima.widest, kHalfStep), work.constants.radius_gain);
  for (int64_t chunk = first; chunk < chunks; chunk += apart) {
    Prepared terms[kEight];
    prepare_eight<kImages>(work, input, chunk, terms);
    store_eight<kImages>(work, terms, extra, input, chunk);
  }
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
