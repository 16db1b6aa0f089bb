// Included by the file of each instruction set: tiles of W for the gradient to x (kernels.h) in
// plain order, of any format.
#pragma once

#include "matmul/decode_rows.h"

namespace pyrobust::matmul {
namespace {

inline int64_t tile_columns(const PackedMatrix& w, int64_t column) {
  return w.cols - column < kGradientColumns ? w.cols - column : kGradientColumns;
}

// Codes of a span begin on a byte border: up to four columns before the tile where five share one.
template <typename Codes>
void plain_gradient_tile(const PackedMatrix& w, int64_t first, int64_t count, int64_t column,
                         float* tile) {
  const int64_t columns = tile_columns(w, column);
  const int64_t before = w.levels == kTernaryLevels ? column % kTritsPerByte : 0;
  float decoded[kGradientColumns + kTritsPerByte] = {};
  for (int64_t i = 0; i < count; ++i, tile += kGradientColumns) {
    decode_span<Codes>(w, first + i, column - before, column + columns, decoded);
    __builtin_memcpy(tile, decoded + before, kGradientColumns * sizeof(float));
  }
}

inline void plain_gradient_order(const PackedMatrix&, int64_t, bool, int* order) {
  for (int p = 0; p < kGradientColumns; ++p) order[p] = p;
}

}  // namespace
}  // namespace pyrobust::matmul
