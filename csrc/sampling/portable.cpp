// The reference: plain loops over core/, which the other instruction sets must match bit for bit.
#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

void random_tile(const Stream& stream, uint32_t purpose, int64_t tile, uint32_t* out) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t block = static_cast<uint32_t>(tile * kLanes + lane);
    const PhiloxWords random = philox4x32(stream_counter(stream, block, purpose), stream.seed);
    for (int word = 0; word < kWords; ++word) out[word * kLanes + lane] = random.word[word];
  }
}

// Calls element(index, place, bits) for every element of the row.
template <typename Element>
void for_each_element(const RowTiles& row, uint32_t purpose, const Element& element) {
  uint32_t bits[kTile];
  for (int64_t tile = row.begin_tile; tile < row.end_tile; ++tile) {
    random_tile(row.stream, purpose, tile, bits);
    const int64_t begin = tile * kTile;
    const int64_t count = row.elements - begin < kTile ? row.elements - begin : kTile;
    for (int64_t i = 0; i < count; ++i) element(begin + i, place_of(begin + i), bits[i]);
  }
}

void store_noise(const NoiseRow& row, int64_t index, float z) {
  store_float(row.out, index, row.out_type, row.x[index] + row.scale * z);
}

void gaussian_row(const NoiseRow& row) {
  for_each_element(row.tiles, kPurposeNormal, [&](int64_t index, Place place, uint32_t bits) {
    store_noise(row, index, normal_at(kNormalTable, row.tiles.stream, place, bits));
  });
}

void laplace_row(const NoiseRow& row) {
  for_each_element(row.tiles, kPurposeLaplace, [&](int64_t index, Place place, uint32_t bits) {
    store_noise(row, index, laplace_at(kLaplaceTable, row.tiles.stream, place, bits));
  });
}

void uniform_row(const NoiseRow& row) {
  for_each_element(row.tiles, kPurposeUniform, [&](int64_t index, Place, uint32_t bits) {
    store_noise(row, index, uniform_from_bits(bits));
  });
}

void keep_row(const KeepRow& row) {
  for_each_element(row.tiles, kPurposeKeep, [&](int64_t index, Place place, uint32_t bits) {
    const bool kept = keep_at(row.tiles.stream, place, row.keep, bits);
    store_float(row.out, index, row.out_type, kept ? row.x[index] : row.fill);
  });
}

void grid_row(const GridRow& row) {
  for_each_element(row.tiles, kPurposeNormal, [&](int64_t index, Place place, uint32_t bits) {
    store_grid(row, index,
               row.x[index] + grid_at(kNormalTable, row.tiles.stream, place, row.table, bits));
  });
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

const SamplingKernels kPortableKernels = {gaussian_row, uniform_row, laplace_row, keep_row,
                                          grid_row,     random_tile, vote_rows};

}  // namespace sampling
}  // namespace pyrobust
