// Where operands of the interval product lie: index arithmetic only, tested on the CPU.
//
// A step is kStep = 128 terms, of which each of the four lanes that share a row of a fragment holds
// 32, in weights and in inputs alike: which four terms of 128 meet in one mma does not matter to
// the sum. Of packed weights and of bfloat16 lane t holds terms 32 t .. 32 t + 31, one to eight
// whole words at every width or 64 bytes; of float32 every fourth 16 bytes, so that the four lanes
// read 64 bytes on end. Either is the faster for its type on an H200.
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

// Tiles of inputs that operands are padded to: what a block of either kernel holds divides them.
PYROBUST_HD int tiles_for(int64_t batch) { return batch <= 8 ? 1 : 2; }

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
  if (order == kBFloat16Order) return {term / kTermsOfLane, term % kTermsOfLane};
  const int64_t piece = 4, run = 4 * piece;  // terms of 16 bytes, and of four lanes
  return {term % run / piece, term / run * piece + term % piece};
}

struct Shape {
  int64_t batch;  // padded to whole tiles
  int64_t terms;  // padded to whole steps
};

PYROBUST_HD Shape operand_shape(int64_t batch, int64_t terms) {
  return {padded(batch, tiles_for(batch) * kColumns), padded(terms, kStep)};
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

// How many float32 roundings a term meets on its way from an accumulator to the result: a product
// and a sum a step of its part of the terms, then the sums over the parts.
PYROBUST_HD int64_t gpu_depth(int64_t terms, int64_t parts) {
  const int64_t steps = (terms + kStep - 1) / kStep;
  return 2 * ((steps + parts - 1) / parts) + parts + 2;
}

// --- blocks whose inputs are shared (cuda_shared.cuh) -------------------------------------------
// Four warps, a team, multiply 64 rows; the teams of a block and the blocks of a cluster take every
// so many-th step.
constexpr int kTeams = 2, kTeamWarps = 4, kTeam = 32 * kTeamWarps;
constexpr int kSharedTiles = 2;
constexpr int64_t kSharedRows = 16 * kTeamWarps;
constexpr int kSharedInputs = kSharedTiles * static_cast<int>(kColumns);

// Blocks that share rows and inputs: as many as fit the device at a time, each with a step or more
// a team.
constexpr int kMostParts = 8;
PYROBUST_HD int shared_parts(int64_t blocks, int multiprocessors, int64_t terms) {
  const int64_t steps = (terms + kStep - 1) / kStep;
  int parts = 1;
  while (2 * parts <= kMostParts && blocks * 2 * parts <= multiprocessors &&
         2 * parts * kTeams <= steps) {
    parts *= 2;
  }
  return parts;
}

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

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
