// Differs from avx512.cpp where a block has kLeastTileRows rows of x or more: 8-bit activations
// with groups of whole 32 columns go through the tile instructions (amx_int8.h, amx_two_level.h),
// and so do float ones in 8-bit parts (amx_parts.h). Everything else is passed on. With
// PYROBUST_EMULATED_TILES the same code runs without AMX, for tests.
#include "core/activation_int8.h"
#include "matmul/amx_parts.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

bool is_tiled(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (mode == Mode::kExact || w.group_dim != 1 || w.cols == 0 || rows < kLeastTileRows)
    return false;
  if (mode != Mode::kInt8) return !has_panels_alone(w);
  const bool whole = w.group_size % (kBlock / 2) == 0 || w.group_size >= w.cols;
  return whole && (w.group_size <= kMaxIntegerRun || w.cols <= kMaxIntegerRun);
}

// The last block of x may be too short for tiles, so that memory must serve both.
int64_t tiled_prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t other = avx512_kernels()->prepared_bytes(w, mode, rows);
  if (!is_tiled(w, mode, rows)) return other;
  const int64_t own =
      mode == Mode::kInt8 ? TiledX::bytes(w, rows) : TiledParts(nullptr, w, rows, mode).used;
  return own > other ? own : other;
}

int64_t tiled_scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t other = avx512_kernels()->scratch_bytes(w, mode, rows);
  if (!is_tiled(w, mode, rows)) return other;
  const int64_t prepare = tiled_row_bytes(w), multiply = PartsScratch(nullptr, w, rows).all_used;
  const int64_t own = prepare > multiply ? prepare : multiply;
  return own > other ? own : other;
}

void tiled_prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first,
                   int64_t rows, RowRange part, void* prepared, double* step, void* scratch) {
  if (!is_tiled(w, mode, rows)) {
    return avx512_kernels()->prepare(w, mode, x, first, rows, part, prepared, step, scratch);
  }
  if (mode == Mode::kInt8) return prepare_tiled(w, x, first, rows, part, prepared, step, scratch);
  const TiledParts out(prepared, w, rows, mode);
  switch (mode) {
    case Mode::kTwoParts:
      return prepare_tiled_parts<2>(w, x, first, rows, part, out, step);
    case Mode::kThreeParts:
      return prepare_tiled_parts<3>(w, x, first, rows, part, out, step);
    default:
      return prepare_tiled_parts<4>(w, x, first, rows, part, out, step);
  }
}

void tiled_multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                    int64_t end, const Output& out, void* scratch) {
  if (!is_tiled(w, mode, block.rows)) {
    return avx512_kernels()->multiply(w, mode, block, begin, end, out, scratch);
  }
  switch (mode) {
    case Mode::kTwoParts:
      return multiply_tiled_parts<2>(w, mode, block, begin, end, out, scratch);
    case Mode::kThreeParts:
      return multiply_tiled_parts<3>(w, mode, block, begin, end, out, scratch);
    case Mode::kFourParts:
      return multiply_tiled_parts<4>(w, mode, block, begin, end, out, scratch);
    default:
      return multiply_tiled(w, block, begin, end, out, scratch);
  }
}

// The other entries fall through to avx512.cpp.
constexpr MatmulKernels kKernels = {nullptr,       tiled_prepared_bytes, tiled_scratch_bytes,
                                    tiled_prepare, tiled_multiply,       kWidth};

}  // namespace

const MatmulKernels* amx_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
