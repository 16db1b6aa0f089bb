// Both sums of 16 or 32 rows of W for up to 32 inputs: W from global memory straight into
// fragments, the eight warps of a block taking every eighth step of the terms.
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_layout.h"
#include "interval/cuda_weights.cuh"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

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
};

// Tiles of 16 rows of a block: two where their sums fit into registers.
template <int kTiles>
constexpr int kRowTiles = kTiles <= 2 ? 2 : 1;

// A lane's accumulators: rows g and g + 8 of each row tile, inputs 2t and 2t + 1 of each tile.
template <int kTiles>
struct Sums {
  float centre[kRowTiles<kTiles>][kTiles][4];
  float radius[kRowTiles<kTiles>][kTiles][4];
};

template <int kTiles>
constexpr int kSumsOfLane = kRowTiles<kTiles> * kTiles * 4;

template <int kTiles>
PYROBUST_HD size_t product_shared_bytes() {
  return sizeof(float) * 2 * kSumsOfLane<kTiles> * 32 * kWarps;
}

PYROBUST_DEVICE void fragment(const uint32_t (&top)[4], const uint32_t (&bottom)[4], int s,
                              uint32_t (&a)[4]) {
  a[0] = top[2 * s];
  a[1] = bottom[2 * s];
  a[2] = top[2 * s + 1];
  a[3] = bottom[2 * s + 1];
}

// Adds 8 terms a lane (32 of the step) to the accumulators of one row tile and one input tile.
template <bool kSecond>
PYROBUST_DEVICE void multiply_eight(const Eight& top, const Eight& bottom,
                                    const cuda::Words4 (&x)[kPlanes], float (&centre)[4],
                                    float (&radius)[4]) {
  constexpr uint32_t kMagnitude = 0x7fff7fffu, kSign = 0x80008000u;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint32_t b[kPlanes][2];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      b[plane][0] = x[plane].word[2 * s];
      b[plane][1] = x[plane].word[2 * s + 1];
    }
    uint32_t a[4], size[4];
    fragment(top.first, bottom.first, s, a);
    cuda::mma_m16n8k16_bf16(centre, a, b[0]);
    cuda::mma_m16n8k16_bf16(centre, a, b[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) size[i] = a[i] & kMagnitude;
    cuda::mma_m16n8k16_bf16(radius, size, b[2]);
    cuda::mma_m16n8k16_bf16(radius, size, b[3]);
    if (kSecond) {
      uint32_t second[4];
      fragment(top.second, bottom.second, s, second);
      cuda::mma_m16n8k16_bf16(centre, second, b[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) second[i] ^= a[i] & kSign;
      cuda::mma_m16n8k16_bf16(radius, second, b[2]);
    }
  }
}

// One step: 128 terms into fresh accumulators, which then join the totals, times the scale.
template <class Source, int kTiles>
PYROBUST_DEVICE void add_step(const ProductWork<Source>& work, const Shape& shape, int64_t row,
                              int64_t first, int64_t step, Sums<kTiles>* totals) {
  constexpr int kRows = kRowTiles<kTiles>;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  typename Source::Lane lanes[kRows][2];
#pragma unroll
  for (int i = 0; i < 2 * kRows; ++i) {
    const int64_t n = row + 8 * i + g;
    lanes[i / 2][i % 2] = work.source.begin(n < work.rows ? n : work.rows - 1, step, t);
  }
  // Lanes past the batch read the last input again, which costs no traffic; finish_outputs leaves
  // their columns out.
  const uint16_t* inputs[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t wanted = first + tile * kColumns + g;
    const int64_t input = wanted < work.batch ? wanted : work.batch - 1;
    inputs[tile] = work.operands + (input * (shape.terms / kStep) + step) * kStep * kPlanes;
  }
  Sums<kTiles> sums = {};
  // Unrolled, weights of all quarters are decoded early: with four tiles packed ones spill, and
  // with one tile, where two blocks leave 128 registers, those of even widths and float32.
  constexpr bool kPacked = Source::kBits != 0;
  constexpr bool kRolled = kTiles == 4   ? kPacked
                           : kTiles == 1 ? Source::kSecond || (kPacked && Source::kBits % 2 == 0)
                                         : false;
  constexpr int kUnroll = kRolled ? 1 : 4;
#pragma unroll kUnroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    Eight eights[kRows][2];
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) lanes[i / 2][i % 2].eight(quarter, &eights[i / 2][i % 2]);
    const int offset = (quarter * 4 + t) * kPlanes * static_cast<int>(kEight);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      cuda::Words4 x[kPlanes];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        x[plane] = cuda::load16(inputs[tile] + offset + plane * kEight);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        multiply_eight<Source::kSecond>(eights[i][0], eights[i][1], x, sums.centre[i][tile],
                                        sums.radius[i][tile]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scale = lanes[i][j / 2].scale();
        totals->centre[i][tile][j] += scale * sums.centre[i][tile][j];
        totals->radius[i][tile][j] += scale * sums.radius[i][tile][j];
      }
    }
  }
}

template <int kTiles>
PYROBUST_DEVICE void store_totals(const Sums<kTiles>& totals, float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float* own = shared + warp * 2 * kSumsOfLane<kTiles> * 32 + lane;
#pragma unroll
  for (int i = 0; i < kRowTiles<kTiles>; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = (i * kTiles + tile) * 4 + j;
        own[at * 32] = totals.centre[i][tile][j];
        own[(kSumsOfLane<kTiles> + at) * 32] = totals.radius[i][tile][j];
      }
    }
  }
}

template <class Source, int kTiles>
PYROBUST_DEVICE void finish_outputs(const ProductWork<Source>& work, int64_t row, int64_t first,
                                    const float* shared) {
  constexpr int kSums = kSumsOfLane<kTiles>;
  for (int index = static_cast<int>(threadIdx.x); index < kSums * 32; index += kProductThreads) {
    float centre = 0.0f, radius = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      centre += shared[warp * 2 * kSums * 32 + index];
      radius += shared[(warp * 2 + 1) * kSums * 32 + index];
    }
    const int lane = index % 32, at = index / 32, j = at % 4;
    const int64_t n = row + at / (4 * kTiles) * 16 + lane / 4 + j / 2 * 8;
    const int64_t input = first + at / 4 % kTiles * kColumns + lane % 4 * 2 + j % 2;
    if (n >= work.rows || input >= work.batch) continue;
    const float offset = work.offsets[input];
    const int64_t to = input * work.rows + n;
    if (!(offset < rounding::infinity())) {  // an input that is not finite, in every mode
      work.out_lower[to] = -rounding::infinity();
      work.out_upper[to] = rounding::infinity();
      continue;
    }
    finish_one(centre, radius, work.bias != nullptr ? work.bias[n] : 0.0f, offset, work.constants,
               work.out_lower + to, work.out_upper + to);
  }
}

// Of one multiprocessor: two where the registers of a thread suffice. bfloat16 is faster with one,
// which has registers for more loads under way.
template <class Source, int kTiles>
constexpr int kBlocks = kTiles == 1 && (Source::kSecond || Source::kBits != 0) ? 2 : 1;

template <class Source, int kTiles>
PYROBUST_KERNEL_OF(kProductThreads, (kBlocks<Source, kTiles>))
product_kernel(const __grid_constant__ ProductWork<Source> work) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const Shape shape = operand_shape(work.batch, work.terms);
  const BlockPlace place = block_place(blockIdx.x, shape.batch / kColumns / kTiles);
  const int64_t row = place.rows * 16 * kRowTiles<kTiles>;
  const int64_t first = place.inputs * kTiles * kColumns;
  const int64_t steps = shape.terms / kStep;
  Sums<kTiles> totals = {};
  for (int64_t step = static_cast<int>(threadIdx.x) / 32; step < steps; step += kWarps) {
    add_step<Source, kTiles>(work, shape, row, first, step, &totals);
  }
  store_totals<kTiles>(totals, shared);
  cuda::sync_threads();
  finish_outputs<Source, kTiles>(work, row, first, shared);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
