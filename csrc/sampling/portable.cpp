// The reference: plain loops over core/, which the other instruction sets must match bit for bit.
#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

float normal_at(const Stream& stream, uint32_t block, int word, uint32_t bits) {
  return normal_needs_refinement(bits) ? refined_normal(kNormalTable, stream, block, word, bits)
                                       : normal_from_bits(kNormalTable, bits);
}

void normal_tile(const Stream& stream, int64_t tile, float* z) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t block = static_cast<uint32_t>(tile * kLanes + lane);
    const PhiloxWords random =
        philox4x32(stream_counter(stream, block, kPurposeNormal), stream.seed);
    for (int word = 0; word < kWords; ++word) {
      z[word * kLanes + lane] = normal_at(stream, block, word, random.word[word]);
    }
  }
}

void gaussian_row(const GaussianRow& row) {
  float z[kTile];
  for (int64_t tile = row.begin_tile; tile < row.end_tile; ++tile) {
    normal_tile(row.stream, tile, z);
    const int64_t begin = tile * kTile;
    const int64_t count = row.elements - begin < kTile ? row.elements - begin : kTile;
    for (int64_t i = 0; i < count; ++i) {
      store_float(row.out, begin + i, row.out_type, row.x[begin + i] + row.sigma * z[i]);
    }
  }
}

// The class of one row, or -1 where it holds a NaN.
int64_t vote(const void* logits, int64_t begin, int64_t classes, FloatType type) {
  int64_t best = 0;
  float best_value = load_float(logits, begin, type);
  bool ordered = best_value == best_value;
  for (int64_t k = 1; k < classes; ++k) {
    const float value = load_float(logits, begin + k, type);
    ordered = ordered && value == value;
    if (value > best_value) {
      best = k;
      best_value = value;
    }
  }
  return ordered ? best : -1;
}

int64_t vote_rows(const VoteRows& work) {
  for (int64_t row = 0; row < work.rows; ++row) {
    work.votes[row] = vote(work.logits, row * work.classes, work.classes, work.type);
    if (work.votes[row] < 0) return row;
  }
  return -1;
}

}  // namespace

const SamplingKernels kPortableKernels = {gaussian_row, vote_rows};

}  // namespace sampling
}  // namespace pyrobust
