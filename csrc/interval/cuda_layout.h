// Where operands of the interval product lie: index arithmetic only, tested on the CPU.
//
// A step is kStep = 128 terms, of which each of the four lanes that share a row of a fragment holds
// 32, in weights and in inputs alike: which four terms of 128 meet in one mma does not matter to
// the sum. Of packed weights lane t holds terms 32 t .. 32 t + 31, one to eight whole words at
// every width; of dense ones every fourth 16 bytes, so that the four lanes read 64 bytes on end.
// The 32 terms of a lane form 16 pairs, and pairs 2 s and 2 s + 1 are what fragment s of 8 takes
// (a[0], a[2] and b[0], b[1]).
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "interval/cuda.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int64_t kTermsOfLane = 32;
constexpr int kPlanes = 4;       // c_hi, c_lo, r_hi, r_lo
constexpr int64_t kColumns = 8;  // inputs of one tile

PYROBUST_HD int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Blocks of the same rows follow one another, so that only the first reads W from memory.
struct BlockPlace {
  int64_t rows;    // index of a group of rows
  int64_t inputs;  // index of a group of tiles
};
PYROBUST_HD BlockPlace block_place(int64_t block, int64_t input_groups) {
  return {block / input_groups, block % input_groups};
}

// Where term i of 32 consecutive ones of packed weights stands in its lane's pairs. Codes of `bits`
// bits are taken from a word with one shift and one mask a pair, which pairs a code with the one
// half a word further; 3 bits keep the order.
PYROBUST_HD int64_t place_of_term(int bits, int64_t i) {
  if (bits == 3) return i;
  const int64_t word = 32 / bits, half = word / 2;
  return i / word * word + i % half * 2 + i % word / half;
}

// Orders of the terms of dense weights, beside the bits of packed ones.
constexpr int kBFloat16Order = 16;
constexpr int kFloat32Order = 32;

struct TermPlace {
  int64_t lane;   // 0 .. 3
  int64_t place;  // among the lane's 32 terms
};
PYROBUST_HD TermPlace place_in_step(int order, int64_t term) {
  if (order < kBFloat16Order) {
    return {term / kTermsOfLane, place_of_term(order, term % kTermsOfLane)};
  }
  const int64_t piece = order == kBFloat16Order ? 8 : 4, run = 4 * piece;  // 16 bytes, four lanes
  return {term % run / piece, term / run * piece + term % piece};
}

// The other way: the term of a step that stands at a place of a lane.
PYROBUST_HD int64_t term_of_place(int order, int64_t lane, int64_t place) {
  if (order >= kBFloat16Order) {
    const int64_t piece = order == kBFloat16Order ? 8 : 4;
    return place / piece * 4 * piece + lane * piece + place % piece;
  }
  if (order == 3) return lane * kTermsOfLane + place;
  const int64_t word = 32 / order, half = word / 2;
  return lane * kTermsOfLane + place / word * word + place % 2 * half + place % word / 2;
}

// The same as numbers: the term of a place is a sum over the bits of the place and of the lane, so
// that one kernel serves all orders.
constexpr int kPlaceBits = 5;
struct TermStrides {
  int32_t of_place[kPlaceBits];  // of a bit of the place
  int32_t of_lane;               // of 1 of the lane
};
PYROBUST_HD TermStrides strides_of(int order) {
  TermStrides strides = {};
  for (int bit = 0; bit < kPlaceBits; ++bit) {
    strides.of_place[bit] = static_cast<int32_t>(term_of_place(order, 0, int64_t{1} << bit));
  }
  strides.of_lane = static_cast<int32_t>(term_of_place(order, 1, 0));
  return strides;
}

// Eight terms that follow one another in memory, chunk `chunk` (0 .. 15) of a step: the first
// one's, and strides of the bits of the others' places among the eight.
struct TermRun {
  int32_t first;
  int32_t stride[3];
};
PYROBUST_HD int32_t term_of_run(const TermRun& run, int i) {
  return run.first + i % 2 * run.stride[0] + i / 2 % 2 * run.stride[1] + i / 4 * run.stride[2];
}

struct Shape {
  int64_t batch;
  int64_t terms;  // padded to whole steps
};

PYROBUST_HD Shape operand_shape(int64_t batch, int64_t terms) {
  return {batch, padded(terms, kStep)};
}

// Index of a term among bfloat16 operands. Eight terms of a lane are 16 bytes a plane; the planes
// of eight terms lie side by side, so that one address and constant offsets reach all, and the four
// lanes of a row side by side as well.
//
//   (input, step, eighth of the lane's terms 0 .. 3, lane 0 .. 3, plane, term 0 .. 7)
constexpr int64_t kEight = 8;
PYROBUST_HD int64_t operand_index(const Shape& shape, int plane, int64_t input, int64_t term,
                                  int order) {
  const TermPlace at = place_in_step(order, term % kStep);
  const int64_t step = input * (shape.terms / kStep) + term / kStep;
  return ((step * 4 + at.place / kEight) * 4 + at.lane) * kPlanes * kEight + plane * kEight +
         at.place % kEight;
}

// The blocks of a cluster take every so many-th step of the same rows and inputs. Of each step two
// halves of a block's warps, kHalves, take 64 terms each.
constexpr int kHalves = 2;
constexpr int kMostParts = 8;

// How many float32 roundings a term meets on its way from an accumulator to the result: a product
// and a sum a step of its part of the terms, then the sums over the parts and halves.
PYROBUST_HD int64_t gpu_depth(int64_t terms, int64_t parts) {
  const int64_t steps = (terms + kStep - 1) / kStep;
  return 2 * ((steps + parts - 1) / parts) + kHalves * parts + 2;
}

// Blocks that share rows and inputs: as many as fit the device at a time, each with a step or more.
PYROBUST_HD int shared_parts(int64_t blocks, int multiprocessors, int64_t terms) {
  const int64_t steps = (terms + kStep - 1) / kStep;
  int parts = 1;
  while (2 * parts <= kMostParts && blocks * 2 * parts <= multiprocessors && 2 * parts <= steps) {
    parts *= 2;
  }
  return parts;
}

// --- images -------------------------------------------------------------------------------------
// What warpgroups multiply with lies in memory as in shared memory (cuda_wide.cuh): of 8, 16, 32 or
// 64 inputs and 64 terms three planes, c_hi, c_lo and r rounded up, of a row of 128 bytes an input,
// whose chunk c of 16 bytes lies where c ^ (row % 8) is.
//
//   (run of inputs, 64 terms, plane, input, term)
constexpr int kImagePlanes = 3, kMostImageInputs = 64;
constexpr int64_t kImageTerms = 64;
PYROBUST_HD constexpr int plane_bytes(int inputs) { return inputs * 128; }
PYROBUST_HD constexpr int image_bytes(int inputs) { return kImagePlanes * plane_bytes(inputs); }
PYROBUST_HD int image_inputs(int64_t batch) {
  return batch <= 8 ? 8 : batch <= 16 ? 16 : batch <= 32 ? 32 : kMostImageInputs;
}

// The term of a step at a column of its two images. Columns 16 b .. 16 b + 15 are one product,
// whose fragment takes pairs 2 (b % 2) and the next of eighth b / 2 of each lane (fragment() in
// cuda_product.cuh).
PYROBUST_HD int64_t term_of_column(int order, int64_t column) {
  const int64_t block = column / 16, pair = column % 16 / 8;
  return term_of_place(order, column % 8 / 2,
                       block / 2 * 8 + block % 2 * 4 + pair * 2 + column % 2);
}

// Chunks of operands, and of images.
PYROBUST_HD TermRun run_of_operands(const TermStrides& by, int chunk) {
  return {chunk % 4 * by.of_lane + chunk / 4 % 2 * by.of_place[3] + chunk / 8 * by.of_place[4],
          {by.of_place[0], by.of_place[1], by.of_place[2]}};
}
PYROBUST_HD TermRun run_of_images(const TermStrides& by, int chunk) {
  return {chunk % 2 * by.of_place[1] + chunk / 2 % 2 * by.of_place[2] +
              chunk / 4 % 2 * by.of_place[3] + chunk / 8 * by.of_place[4],
          {by.of_place[0], by.of_lane, 2 * by.of_lane}};
}

// Index of eight terms on end among bfloat16 images of `inputs` inputs; chunk: of the input's
// terms.
PYROBUST_HD int64_t image_index(int64_t padded_terms, int inputs, int plane, int64_t input,
                                int64_t chunk) {
  const auto own =
      static_cast<int64_t>(static_cast<uint32_t>(input) % static_cast<uint32_t>(inputs));
  const int64_t run = static_cast<uint32_t>(input) / static_cast<uint32_t>(inputs);
  const int64_t image = run * (padded_terms / kImageTerms) + chunk / 8;
  return (image * kImagePlanes + plane) * (plane_bytes(inputs) / 2) + own * 64 +
         (chunk % 8 ^ own % 8) * 8;
}

// The order in which a block takes its `count` steps: blocks of other rows begin elsewhere, so that
// they read other inputs at a time.
struct Rotation {
  int count;
  int at;
};
PYROBUST_HD void advance(Rotation* rotation) {
  rotation->at = rotation->at + 1 == rotation->count ? 0 : rotation->at + 1;
}
PYROBUST_HD Rotation rotation_of(int64_t count, int64_t rows) {
  if (count <= 0) return {0, 0};
  const auto n = static_cast<uint32_t>(count);
  return {static_cast<int>(n), static_cast<int>(static_cast<uint32_t>(rows) * 5u % n)};
}

// --- shared memory ------------------------------------------------------------------------------
// A step of an input is 64 vectors of 16 bytes in either memory. In shared memory those of one
// plane and eighth lie side by side, every other input's four further on: eight lanes that load
// together find eight banks.
constexpr int kStepVectors = static_cast<int>(kStep) * kPlanes / 8;
PYROBUST_HD int shared_vector(int input, int eighth, int plane, int lane) {
  return input * kStepVectors + ((eighth * 16 + plane * 4 + lane) ^ (input % 2 * 4));
}
// Where vector `index` of an input's step in global memory (operand_index) goes.
PYROBUST_HD int shared_place_of(int input, int index) {
  return shared_vector(input, index / 16, index % 4, index / 4 % 4);
}

// Where 16 bytes of a row of dense weights go, of `chunks` that a row has in a step: for the same
// reason every other row's four further on.
PYROBUST_HD int weight_vector(int chunks, int row, int chunk) {
  return row * chunks + (chunk ^ (row % 2 * 4));
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
