// Both sums of 64 rows of W for up to 16 inputs, which all rows of a block share: a ring of stages
// in shared memory holds their steps, filled by asynchronous copies, so that inputs are read once
// for 64 rows. W goes from global memory straight into fragments, a step ahead of its products
// where registers suffice: not with float32 weights, of which eight warps have 64 KB under way
// anyway.
#pragma once

#include "interval/cuda_product.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int kSharedThreads = kTeams * kTeam;
constexpr int kStages = 4;
constexpr int kStageBytes = kSharedInputs * kStepVectors * 16;
constexpr int kVectorsOfLane = 2 * kSharedTiles;  // of four sums: centre and radius of each tile
constexpr size_t kSharedBytes = size_t{kTeams} * kStages * kStageBytes;
static_assert(kSharedThreads * kVectorsOfLane * 16 <= kSharedBytes, "sums lie over the stages");

// Copies the step of all inputs; this thread's vectors lie kApart inputs apart.
struct InputCopier {
  static constexpr int kCopies = kSharedInputs * kStepVectors / kTeam;
  static constexpr int kApart = kTeam / kStepVectors;  // inputs
  static_assert(kApart % 2 == 0, "so that a thread's vectors have one place in every input");
  const uint16_t* from;  // of the team's step 0
  int64_t input_size;    // of all steps, in halves
  int place;             // bytes, of the first
  int present;           // inputs from the first on

  static __device__ __forceinline__ InputCopier of(const uint16_t* operands, int64_t batch,
                                                   int64_t first, int64_t padded_terms) {
    const int thread = static_cast<int>(threadIdx.x) % kTeam;
    const int input = thread / kStepVectors, index = thread % kStepVectors;
    const int64_t size = padded_terms * kPlanes;
    return {operands + (first + input) * size + index * 8, size, shared_place_of(input, index) * 16,
            static_cast<int>(batch - first - input)};
  }

  __device__ __forceinline__ void copy(int64_t step, uint8_t* stage) const {
    const uint16_t* source = from + step * (kStep * kPlanes);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool valid = i * kApart < present;
      cuda::copy16_async_or_zero(stage + place + i * kApart * kStepVectors * 16,
                                 valid ? source + i * kApart * input_size : from, valid);
    }
  }
};

// A lane's weights of a step: 32 terms of rows g and g + 8, fetched and not yet used.
template <class Source>
struct Fetched {
  typename Source::Lane lane[2];
  typename Source::Lane::Part part[2][4];
};

template <class Source>
PYROBUST_DEVICE void fetch(const ProductWork<Source>& work, int64_t row, int64_t step,
                           Fetched<Source>* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = row + lane / 4 + 8 * i;
    out->lane[i] = work.source.begin(n < work.rows ? n : work.rows - 1, step, lane % 4);
  }
  const bool whole = work.source.whole(step);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (whole) out->lane[i / 4].load_whole(i % 4, &out->part[i / 4][i % 4]);
  }
  if (whole) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) out->lane[i / 4].load(i % 4, &out->part[i / 4][i % 4]);
}

struct SharedSums {
  float centre[kSharedTiles][4];
  float radius[kSharedTiles][4];
};

// One step into fresh accumulators, which then join the totals, times the scale.
template <class Source>
PYROBUST_DEVICE void multiply_step(const Fetched<Source>& weights, const uint8_t* stage,
                                   SharedSums* totals) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  SharedSums sums = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    Eight top, bottom;
    weights.lane[0].convert(e, weights.part[0][e], &top);
    weights.lane[1].convert(e, weights.part[1][e], &bottom);
    cuda::Words4 x[kSharedTiles][kPlanes];
#pragma unroll
    for (int i = 0; i < kSharedTiles * kPlanes; ++i) {
      const int input = i / kPlanes * static_cast<int>(kColumns) + lane / 4;
      const int at = shared_vector(input, e, i % kPlanes, lane % 4) * 16;
      x[i / kPlanes][i % kPlanes] = cuda::load16(stage + at);
    }
    multiply_eight<Source::kSecond>(top, bottom, x, sums.centre, sums.radius);
  }
#pragma unroll
  for (int tile = 0; tile < kSharedTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float scale = weights.lane[j / 2].scale();
      totals->centre[tile][j] += scale * sums.centre[tile][j];
      totals->radius[tile][j] += scale * sums.radius[tile][j];
    }
  }
}

// Vector v of the sums of a lane of a team.
PYROBUST_DEVICE int place_of_sums(int team, int thread_of_team, int v) {
  return ((team * kVectorsOfLane + v) * kTeam + thread_of_team) * 16;
}

PYROBUST_DEVICE void store_sums(const SharedSums& sums, uint8_t* shared) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int v = 0; v < kVectorsOfLane; ++v) {
    const float (&four)[4] = v % 2 == 0 ? sums.centre[v / 2] : sums.radius[v / 2];
    cuda::store16(shared + place_of_sums(thread / kTeam, thread % kTeam, v),
                  {{bits_of_float(four[0]), bits_of_float(four[1]), bits_of_float(four[2]),
                    bits_of_float(four[3])}});
  }
}

// The sum over all teams of all blocks, in their order.
PYROBUST_DEVICE void add_teams(const uint8_t* shared, int parts, int thread, int v,
                               float (&sum)[4]) {
  for (int run = 0; run < parts * kTeams; ++run) {
    const uint8_t* from = shared + place_of_sums(run % kTeams, thread, v);
    const cuda::Words4 four =
        parts > 1 ? cuda::load16_of_cluster(from, run / kTeams) : cuda::load16(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += float_from_bits(four.word[j]);
  }
}

// A thread ends two rows of two inputs; the blocks of a cluster end every so many-th thread's.
template <class Source>
PYROBUST_DEVICE void finish_shared(const ProductWork<Source>& work, int part, int64_t row,
                                   int64_t first, const uint8_t* shared) {
  for (int item = static_cast<int>(threadIdx.x) * work.parts + part; item < kTeam * kSharedTiles;
       item += kSharedThreads * work.parts) {
    const int thread = item % kTeam, tile = item / kTeam, lane = thread % 32;
    float centre[4] = {}, radius[4] = {};
    add_teams(shared, work.parts, thread, 2 * tile, centre);
    add_teams(shared, work.parts, thread, 2 * tile + 1, radius);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = row + thread / 32 * 16 + lane / 4 + j / 2 * 8;
      const int64_t input = first + tile * kColumns + lane % 4 * 2 + j % 2;
      finish_output(work, n, input, centre[j], radius[j]);
    }
  }
}

template <class Source>
PYROBUST_KERNEL_OF(kSharedThreads, 1)
shared_kernel(const __grid_constant__ ProductWork<Source> work) {
  uint8_t* shared = cuda::shared_memory();
  const Shape shape = operand_shape(work.batch, work.terms);
  const int64_t groups = (work.batch + kSharedInputs - 1) / kSharedInputs;
  const int part = static_cast<int>(blockIdx.x) % work.parts;
  const BlockPlace place = block_place(blockIdx.x / work.parts, groups);
  const int team = static_cast<int>(threadIdx.x) / kTeam;
  const int64_t block_row = place.rows * kSharedRows, first = place.inputs * kSharedInputs;
  const int64_t row = block_row + static_cast<int>(threadIdx.x) % kTeam / 32 * 16;
  const int64_t split = work.parts * kTeams, steps = shape.terms / kStep;
  const InputCopier inputs = InputCopier::of(work.operands, work.batch, first, shape.terms);
  uint8_t* stages = shared + team * kStages * kStageBytes;

  int64_t ahead = part * kTeams + team;  // the step that is copied next
  for (int i = 0; i < kStages - 1; ++i, ahead += split) {
    if (ahead < steps) inputs.copy(ahead, stages + i * kStageBytes);
    cuda::commit_copies();
  }
  constexpr bool kAhead = !Source::kSecond;
  Fetched<Source> weights, next;
  int64_t step = part * kTeams + team;
  if (kAhead && step < steps) fetch(work, row, step, &weights);
  SharedSums totals = {};
  int stage = 0, free = (kStages - 1) * kStageBytes;
#pragma unroll 1
  for (; step < steps; step += split, ahead += split) {
    cuda::wait_copies<kStages - 2>();
    cuda::sync_group<kTeam>(team);
    if (ahead < steps) inputs.copy(ahead, stages + free);
    cuda::commit_copies();
    if (!kAhead) fetch(work, row, step, &weights);
    if (kAhead && step + split < steps) fetch(work, row, step + split, &next);
    multiply_step<Source>(weights, stages + stage, &totals);
    if (kAhead) weights = next;
    free = stage;
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }
  cuda::wait_copies<0>();
  cuda::sync_threads();
  store_sums(totals, shared);
  cuda::sync_threads();
  if (work.parts > 1) cuda::sync_cluster();
  finish_shared(work, part, block_row, first, shared);
  if (work.parts > 1) cuda::sync_cluster();  // others read this block's sums
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
