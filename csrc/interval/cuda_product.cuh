// Both sums of 32 rows of W for up to 8 inputs: W and inputs from global memory straight into
// fragments, the eight warps of a block taking every eighth step of the terms.
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_layout.h"
#include "interval/cuda_weights.cuh"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kWarps = 8;
constexpr int kProductThreads = 32 * kWarps;

template <class Source>
struct ProductWork {
  Source source;
  const uint16_t* operands;
  const float* offsets;
  const float* bias;
  int64_t batch;
  int64_t rows;
  int64_t terms;
  Constants constants;
  float* out_lower;
  float* out_upper;
  int parts = 1;  // blocks that share rows and inputs (cuda_shared.cuh)
};

constexpr int kRowTiles = 2;  // of 16 rows, of a block

// A lane's accumulators: rows g and g + 8 of each row tile, inputs 2t and 2t + 1.
struct Sums {
  float centre[kRowTiles][1][4];
  float radius[kRowTiles][1][4];
};

constexpr int kSumsOfLane = kRowTiles * 4;
constexpr size_t kProductShared = sizeof(float) * 2 * kSumsOfLane * 32 * kWarps;

PYROBUST_DEVICE void fragment(const uint32_t (&top)[4], const uint32_t (&bottom)[4], int s,
                              uint32_t (&a)[4]) {
  a[0] = top[2 * s];
  a[1] = bottom[2 * s];
  a[2] = top[2 * s + 1];
  a[3] = bottom[2 * s + 1];
}

// Adds 8 terms a lane (32 of the step) to the accumulators of one row tile and all input tiles.
template <bool kSecond, int kTiles>
PYROBUST_DEVICE void multiply_eight(const Eight& top, const Eight& bottom,
                                    const cuda::Words4 (&x)[kTiles][kPlanes],
                                    float (&centre)[kTiles][4], float (&radius)[kTiles][4]) {
  constexpr uint32_t kMagnitude = 0x7fff7fffu, kSign = 0x80008000u;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint32_t a[4], size[4], second[4], signed_second[4];
    fragment(top.first, bottom.first, s, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) size[i] = a[i] & kMagnitude;
    if (kSecond) {
      fragment(top.second, bottom.second, s, second);
#pragma unroll
      for (int i = 0; i < 4; ++i) signed_second[i] = second[i] ^ (a[i] & kSign);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t b[kPlanes][2];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        b[plane][0] = x[tile][plane].word[2 * s];
        b[plane][1] = x[tile][plane].word[2 * s + 1];
      }
      cuda::mma_m16n8k16_bf16(centre[tile], a, b[0]);
      cuda::mma_m16n8k16_bf16(radius[tile], size, b[2]);
      cuda::mma_m16n8k16_bf16(centre[tile], a, b[1]);
      cuda::mma_m16n8k16_bf16(radius[tile], size, b[3]);
      if (kSecond) {
        cuda::mma_m16n8k16_bf16(centre[tile], second, b[0]);
        cuda::mma_m16n8k16_bf16(radius[tile], signed_second, b[2]);
      }
    }
  }
}

// One step: 128 terms into fresh accumulators, which then join the totals, times the scale.
template <class Source>
PYROBUST_DEVICE void add_step(const ProductWork<Source>& work, const Shape& shape, int64_t row,
                              int64_t first, int64_t step, Sums* totals) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  typename Source::Lane lanes[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int64_t n = row + 8 * i + g;
    lanes[i / 2][i % 2] = work.source.begin(n < work.rows ? n : work.rows - 1, step, t);
  }
  // Lanes past the batch read the last input again, which costs no traffic; finish_outputs leaves
  // their columns out.
  const int64_t wanted = first + g, input = wanted < work.batch ? wanted : work.batch - 1;
  const uint16_t* inputs = work.operands + (input * (shape.terms / kStep) + step) * kStep * kPlanes;
  Sums sums = {};
  // Unrolled, weights of all quarters are decoded early: two blocks leave 128 registers, too few
  // for those of even widths and float32.
  constexpr bool kRolled = Source::kSecond || (Source::kBits != 0 && Source::kBits % 2 == 0);
  constexpr int kUnroll = kRolled ? 1 : 4;
#pragma unroll kUnroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    Eight eights[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      lanes[i / 2][i % 2].eight(quarter, &eights[i / 2][i % 2]);
    }
    const int offset = (quarter * 4 + t) * kPlanes * static_cast<int>(kEight);
    cuda::Words4 x[1][kPlanes];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      x[0][plane] = cuda::load16(inputs + offset + plane * kEight);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      multiply_eight<Source::kSecond>(eights[i][0], eights[i][1], x, sums.centre[i],
                                      sums.radius[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float scale = lanes[i][j / 2].scale();
      totals->centre[i][0][j] += scale * sums.centre[i][0][j];
      totals->radius[i][0][j] += scale * sums.radius[i][0][j];
    }
  }
}

PYROBUST_DEVICE void store_totals(const Sums& totals, float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float* own = shared + warp * 2 * kSumsOfLane * 32 + lane;
#pragma unroll
  for (int at = 0; at < kSumsOfLane; ++at) {
    own[at * 32] = totals.centre[at / 4][0][at % 4];
    own[(kSumsOfLane + at) * 32] = totals.radius[at / 4][0][at % 4];
  }
}

// Ends of output n of an input from its sums.
template <class Source>
PYROBUST_DEVICE void finish_output(const ProductWork<Source>& work, int64_t n, int64_t input,
                                   float centre, float radius) {
  if (n >= work.rows || input >= work.batch) return;
  const float offset = work.offsets[input];
  const int64_t to = input * work.rows + n;
  if (!(offset < rounding::infinity())) {  // an input that is not finite, in every mode
    work.out_lower[to] = -rounding::infinity();
    work.out_upper[to] = rounding::infinity();
    return;
  }
  finish_one(centre, radius, work.bias != nullptr ? work.bias[n] : 0.0f, offset, work.constants,
             work.out_lower + to, work.out_upper + to);
}

template <class Source>
PYROBUST_DEVICE void finish_outputs(const ProductWork<Source>& work, int64_t row, int64_t first,
                                    const float* shared) {
  constexpr int kSums = kSumsOfLane;
  for (int index = static_cast<int>(threadIdx.x); index < kSums * 32; index += kProductThreads) {
    float centre = 0.0f, radius = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      centre += shared[warp * 2 * kSums * 32 + index];
      radius += shared[(warp * 2 + 1) * kSums * 32 + index];
    }
    const int lane = index % 32, at = index / 32, j = at % 4;
    const int64_t n = row + at / 4 * 16 + lane / 4 + j / 2 * 8;
    finish_output(work, n, first + lane % 4 * 2 + j % 2, centre, radius);
  }
}

// Of one multiprocessor: two where the registers of a thread suffice. bfloat16 is faster with one,
// which has registers for more loads under way.
template <class Source>
constexpr int kBlocks = Source::kSecond || Source::kBits != 0 ? 2 : 1;

template <class Source>
PYROBUST_KERNEL_OF(kProductThreads, kBlocks<Source>)
product_kernel(const __grid_constant__ ProductWork<Source> work) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const Shape shape = operand_shape(work.batch, work.terms);
  const BlockPlace place = block_place(blockIdx.x, shape.batch / kColumns);
  const int64_t row = place.rows * 16 * kRowTiles, first = place.inputs * kColumns;
  const int64_t steps = shape.terms / kStep;
  Sums totals = {};
  for (int64_t step = static_cast<int>(threadIdx.x) / 32; step < steps; step += kWarps) {
    add_step(work, shape, row, first, step, &totals);
  }
  store_totals(totals, shared);
  cuda::sync_threads();
  finish_outputs(work, row, first, shared);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
