// Both sums of a block's rows of W for up to 8 or 16 inputs: a ring of stages in shared memory,
// filled by asynchronous copies, holds steps of W and of the inputs, so that W has tens of KB under
// way and inputs are read once for all rows of a block. Two warps share 16 or 32 rows and take half
// of every step each; the blocks of a cluster take every so many-th step.
#pragma once

#include "cuda/primitives.h"
#include "interval/cuda_layout.h"
#include "interval/cuda_weights.cuh"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kRowWarps = 4;
constexpr int kProductThreads = 32 * kRowWarps * kHalves;

// What a product is of; images of inputs stand for operands in that of warpgroups (cuda_wide.cuh).
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
  int parts;  // blocks that share rows and inputs
};

// kTiles: of eight inputs, of a block.
template <class Source, int kTiles>
struct ProductShape {
  static constexpr int kRowTiles = Source::kRowTiles;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kInputs = static_cast<int>(kColumns) * kTiles;
  static constexpr int kWeightBytes = kRows * Source::kChunks * 16;
  static constexpr int kStageBytes = kWeightBytes + kInputs * kStepVectors * 16;
  // What compute capability 8.0 has, less what a block takes for itself.
  static constexpr int kMostBytes = 160 * 1024, kMostStages = 6;
  static constexpr int kFit = kMostBytes / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kVectors = 2 * kRowTiles * kTiles;  // of four sums, of a lane
  static constexpr int kSumBytes = kProductThreads * kVectors * 16;
  static constexpr int kRing = kStages * kStageBytes;
  static constexpr size_t kShared = kRing > kSumBytes ? kRing : kSumBytes;
  static_assert(kStages >= 3, "two steps under way");
};

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

// A lane's accumulators: rows g and g + 8 of each row tile, inputs 2t and 2t + 1 of each tile.
template <int kRowTiles, int kTiles>
struct Sums {
  float centre[kRowTiles][kTiles][4];
  float radius[kRowTiles][kTiles][4];
};

// Where a thread block works, and its copies.
template <class Source, int kTiles>
struct Block {
  using Shape_ = ProductShape<Source, kTiles>;
  int64_t row;
  int64_t first;  // input
  int present;    // inputs
  int part;

  static __device__ __forceinline__ Block of(const ProductWork<Source>& work) {
    const int64_t groups = (work.batch + Shape_::kInputs - 1) / Shape_::kInputs;
    const BlockPlace place = block_place(blockIdx.x / static_cast<unsigned>(work.parts), groups);
    const int64_t first = place.inputs * Shape_::kInputs, left = work.batch - first;
    return {place.rows * Shape_::kRows, first,
            static_cast<int>(left < Shape_::kInputs ? left : Shape_::kInputs),
            static_cast<int>(blockIdx.x % static_cast<unsigned>(work.parts))};
  }

  __device__ __forceinline__ void copy_weights(const ProductWork<Source>& work, int64_t step,
                                               cuda::SharedPlace stage) const {
    constexpr int kChunks = Source::kChunks, kAll = Shape_::kRows * kChunks;
    constexpr int kCopies = (kAll + kProductThreads - 1) / kProductThreads;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * kProductThreads + static_cast<int>(threadIdx.x);
      if (kAll % kProductThreads != 0 && index >= kAll) break;
      const int own = index / kChunks, chunk = index % kChunks;
      const int place = Source::kBits == 0 ? weight_vector(kChunks, own, chunk) : index;
      work.source.copy(stage + place * 16, row + own < work.rows ? row + own : -1, step, chunk);
    }
  }

  // Only of inputs that are there: lanes of others read one that is.
  __device__ __forceinline__ void copy_inputs(const ProductWork<Source>& work, int64_t steps,
                                              int64_t step, cuda::SharedPlace stage) const {
    constexpr int kApart = kProductThreads / kStepVectors;  // inputs
    static_assert(kApart % 2 == 0, "so that a thread's vectors have one place in every input");
    const int thread = static_cast<int>(threadIdx.x);
    const int input = thread / kStepVectors, index = thread % kStepVectors;
    const int place = Shape_::kWeightBytes + shared_place_of(input, index) * 16;
    const uint16_t* from =
        work.operands + ((first + input) * steps + step) * (kStep * kPlanes) + index * 8;
#pragma unroll
    for (int i = 0; i < Shape_::kInputs / kApart; ++i) {
      if (input + i * kApart < present) {
        cuda::copy16_async(stage + place + i * kApart * kStepVectors * 16,
                           from + i * kApart * steps * (kStep * kPlanes));
      }
    }
  }
};

// Factors of a lane's rows: g and g + 8 of each row tile.
template <class Source>
struct Factors {
  Factor of[2 * Source::kRowTiles];

  __device__ __forceinline__ void load(const ProductWork<Source>& work, int64_t row, int64_t step) {
    if (Source::kBits == 0) return;
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * Source::kRowTiles; ++i) {
      const int64_t n = row + 8 * i + g;
      of[i] = work.source.factor(n < work.rows ? n : work.rows - 1, step);
    }
  }
};

// Half a step into fresh accumulators, which then join the totals, times the scale.
template <class Source, int kTiles>
PYROBUST_DEVICE void multiply_step(cuda::SharedPlace stage, int present,
                                   const Factors<Source>& factors,
                                   Sums<Source::kRowTiles, kTiles>* totals) {
  using Shape_ = ProductShape<Source, kTiles>;
  constexpr int kRowTiles = Source::kRowTiles;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / kRowWarps;
  const int row = warp % kRowWarps * 16 * kRowTiles + g;
  typename Source::Lane lanes[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    lanes[i] = Source::lane(stage, row + 8 * i, t, factors.of[i]);
  }
  cuda::SharedPlace inputs[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int wanted = tile * static_cast<int>(kColumns) + g;
    inputs[tile] = stage + Shape_::kWeightBytes +
                   shared_vector(wanted < present ? wanted : present - 1, 2 * half, 0, t) * 16;
  }
  Sums<kRowTiles, kTiles> sums = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    cuda::Words4 x[kTiles][kPlanes];
#pragma unroll
    for (int i = 0; i < kTiles * kPlanes; ++i) {
      const cuda::SharedPlace at = inputs[i / kPlanes];
      x[i / kPlanes][i % kPlanes] = cuda::load16_shared(at ^ (i % kPlanes * 64), e * 256);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      Eight top, bottom;
      lanes[2 * r].eight(2 * half + e, &top);
      lanes[2 * r + 1].eight(2 * half + e, &bottom);
      multiply_eight<Source::kSecond>(top, bottom, x, sums.centre[r], sums.radius[r]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles * kTiles * 4; ++i) {
    const int r = i / (4 * kTiles), tile = i / 4 % kTiles, j = i % 4;
    const float scale = factors.of[2 * r + j / 2].scale;
    totals->centre[r][tile][j] += scale * sums.centre[r][tile][j];
    totals->radius[r][tile][j] += scale * sums.radius[r][tile][j];
  }
}

// Vector v of the sums of a thread.
PYROBUST_DEVICE int place_of_sums(int thread, int v) { return (v * kProductThreads + thread) * 16; }

template <int kRowTiles, int kTiles>
PYROBUST_DEVICE void store_sums(const Sums<kRowTiles, kTiles>& sums, uint8_t* shared) {
#pragma unroll
  for (int v = 0; v < 2 * kRowTiles * kTiles; ++v) {
    const int r = v / 2 / kTiles, tile = v / 2 % kTiles;
    const float (&four)[4] = v % 2 == 0 ? sums.centre[r][tile] : sums.radius[r][tile];
    cuda::store16(shared + place_of_sums(static_cast<int>(threadIdx.x), v),
                  {{bits_of_float(four[0]), bits_of_float(four[1]), bits_of_float(four[2]),
                    bits_of_float(four[3])}});
  }
}

// The sum over both halves of all blocks, in their order.
PYROBUST_DEVICE void add_parts(const uint8_t* shared, int parts, int thread, int v,
                               float (&sum)[4]) {
  for (int run = 0; run < parts * kHalves; ++run) {
    const uint8_t* from =
        shared + place_of_sums(run % kHalves * (kProductThreads / kHalves) + thread, v);
    const cuda::Words4 four =
        parts > 1 ? cuda::load16_of_cluster(from, run / kHalves) : cuda::load16(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += float_from_bits(four.word[j]);
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

// A thread ends two rows of two inputs; the blocks of a cluster share out whole vectors.
template <class Source, int kTiles>
PYROBUST_DEVICE void finish_sums(const ProductWork<Source>& work,
                                 const Block<Source, kTiles>& block, const uint8_t* shared) {
  constexpr int kOfHalf = kProductThreads / kHalves;
  constexpr int kItems = kOfHalf * Source::kRowTiles * kTiles;
  for (int item = block.part * kProductThreads + static_cast<int>(threadIdx.x); item < kItems;
       item += kProductThreads * work.parts) {
    const int thread = item % kOfHalf, pair = item / kOfHalf, lane = thread % 32;
    const int r = pair / kTiles, tile = pair % kTiles;
    const int64_t input = block.first + tile * kColumns + lane % 4 * 2;
    if (input >= work.batch) continue;
    float centre[4] = {}, radius[4] = {};
    add_parts(shared, work.parts, thread, 2 * pair, centre);
    add_parts(shared, work.parts, thread, 2 * pair + 1, radius);
    const int64_t row = block.row + (thread / 32 * Source::kRowTiles + r) * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      finish_output(work, row + j / 2 * 8, input + j % 2, centre[j], radius[j]);
    }
  }
}

// Faults for tests to find: a stage is read while its copies may be under way; inputs are copied
// before they are prepared; products meet a stage that no fence has shown to them (cuda_wide.cuh).
enum Fault : int { kNoFault, kLateCopies, kEarlyInputs, kNoFence };

// Weights are under way before the inputs are prepared.
template <class Source, int kTiles, int kFault = kNoFault>
PYROBUST_KERNEL_OF(kProductThreads, 1)
product_kernel(const __grid_constant__ ProductWork<Source> work) {
  using Shape_ = ProductShape<Source, kTiles>;
  constexpr int kStages = Shape_::kStages;
  uint8_t* shared = cuda::shared_memory();
  const cuda::SharedPlace ring = cuda::shared_place(shared);
  const auto block = Block<Source, kTiles>::of(work);
  const int64_t steps = padded(work.terms, kStep) / kStep;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 % kRowWarps * 16 * Source::kRowTiles;
  for (int i = 0; i < kStages - 1; ++i) {
    const int64_t step = block.part + i * work.parts;
    if (step < steps) block.copy_weights(work, step, ring + i * Shape_::kStageBytes);
  }
  Factors<Source> factors, next;
  factors.load(work, block.row + warp_row, block.part);
  if (kFault != kEarlyInputs) cuda::await_grid();
  for (int i = 0; i < kStages - 1; ++i) {
    const int64_t step = block.part + i * work.parts;
    if (step < steps) block.copy_inputs(work, steps, step, ring + i * Shape_::kStageBytes);
    cuda::commit_copies();
  }
  Sums<Source::kRowTiles, kTiles> totals = {};
  int stage = 0, free = kStages - 1;
#pragma unroll 1
  for (int64_t step = block.part; step < steps; step += work.parts) {
    cuda::wait_copies<kStages - 2 + (kFault == kLateCopies ? 1 : 0)>();
    cuda::sync_threads();
    const int64_t ahead = step + (kStages - 1) * work.parts;
    if (ahead < steps) {
      const cuda::SharedPlace to = ring + free * Shape_::kStageBytes;
      block.copy_weights(work, ahead, to);
      block.copy_inputs(work, steps, ahead, to);
    }
    cuda::commit_copies();
    next = factors;
    if (step + work.parts < steps) next.load(work, block.row + warp_row, step + work.parts);
    multiply_step<Source, kTiles>(ring + stage * Shape_::kStageBytes, block.present, factors,
                                  &totals);
    factors = next;
    free = stage;
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  cuda::wait_copies<0>();
  cuda::sync_threads();
  store_sums(totals, shared);
  cuda::sync_threads();
  if (work.parts > 1) cuda::sync_cluster();
  finish_sums(work, block, shared);
  if (work.parts > 1) cuda::sync_cluster();  // others read this block's sums
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
