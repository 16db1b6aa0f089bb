// Internal to the sampling family: what an instruction set supplies, and where random words lie.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "core/grid_normal.h"
#include "sampling/places.h"

namespace pyrobust {
namespace sampling {

// The tiles [begin_tile, end_tile) of one sample, whose last tile may be cut by `elements`. Nothing
// past x[elements - 1] and out[elements - 1] is touched.
struct RowTiles {
  Stream stream;
  int64_t begin_tile;
  int64_t end_tile;
  int64_t elements;
};

// out[e] = x[e] + scale * z[e], z normal, Laplace, or uniform on [-1, 1].
struct NoiseRow {
  RowTiles tiles;
  const float* x;
  float scale;
  void* out;
  FloatType out_type;
};

// out[e] = x[e] with probability keep / 2^64, else fill.
struct KeepRow {
  RowTiles tiles;
  const float* x;
  uint64_t keep;
  float fill;
  void* out;
  FloatType out_type;
};

// out[e] = x[e] + k[e], k the rounded Gaussian; int16, or floats of that integer over `levels`.
struct GridRow {
  RowTiles tiles;
  const uint8_t* x;
  GridTable table;
  float margin;  // where the float variate is this close to a rounding border, it does not decide
  float levels;
  void* out;
  bool integers;
  FloatType out_type;  // unless integers
};

// One grid value as it is stored: n, or n over levels.
PYROBUST_HD void store_grid(const GridRow& row, int64_t index, int32_t n) {
  if (row.integers) {
    static_cast<int16_t*>(row.out)[index] = static_cast<int16_t>(n);
  } else {
    store_float(row.out, index, row.out_type, static_cast<float>(n) / row.levels);
  }
}

// votes of `rows` dense rows; returns the first row with a NaN, or -1.
struct VoteRows {
  const void* logits;
  FloatType type;
  int64_t rows;
  int64_t classes;
  int64_t* votes;
};

// A null entry means "use the next lower set".
struct SamplingKernels {
  void (*gaussian_row)(const NoiseRow& row);
  void (*uniform_row)(const NoiseRow& row);
  void (*laplace_row)(const NoiseRow& row);
  void (*keep_row)(const KeepRow& row);
  void (*grid_row)(const GridRow& row);
  // The random words of one tile: out[64].
  void (*random_tile)(const Stream& stream, uint32_t purpose, int64_t tile, uint32_t* out);
  int64_t (*vote_rows)(const VoteRows& rows);
};

extern const SamplingKernels kPortableKernels;
#if defined(PYROBUST_X86)
extern const SamplingKernels kAvx2Kernels;
extern const SamplingKernels kAvx512Kernels;
#endif

}  // namespace sampling
}  // namespace pyrobust
