// The product with the transposed weight, g W: W is decoded once for all rows of g, a tile at a
// time that stays in the first cache, and the columns of W are split over threads.
//
//   columns of W    block 0 | block 1 | ...                 each thread takes whole blocks
//   rows 0..63      tile    | tile    |        g (all rows, 64) times a tile: sums in float
//   rows 64..127    tile    | tile    |        totals (all rows, 128) += the sums, in double
#include "matmul/dispatch.h"
#include "matmul/weights.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"

namespace pyrobust::matmul {
namespace {

// Totals of the blocks of columns that a thread takes at once stay in the second cache. Many rows
// of W then lie between two tiles of a block, so that few rows of g take whole rows of W in turn.
constexpr int64_t kTotalBytes = 512 * 1024;

// What packed_linear_transpose() was called with.
struct GradientProduct {
  const Activations& g;
  const PackedMatrix& weight;
  RowRange range;
  void* out;

  int64_t terms() const { return range.end - range.begin; }
};

// Rows of g, floats (blocks of kGradientRows terms, rows, kGradientRows).
struct PreparedGradient {
  float* data;
  int64_t first;  // of the rows
  int64_t rows;

  float* at(int64_t block, int64_t m) const { return data + (block * rows + m) * kGradientRows; }
};

void prepare_rows(const GradientProduct& p, const PreparedGradient& to, RowRange part) {
  for (int64_t m = part.begin; m < part.end; ++m) {
    const int64_t from = (to.first + m) * p.terms();
    for (int64_t n = 0; n < p.terms(); n += kGradientRows) {
      const int64_t count = std::min(kGradientRows, p.terms() - n);
      float* row = to.at(n / kGradientRows, m);
      for (int64_t i = 0; i < count; ++i) row[i] = load_float(p.g.data, from + n + i, p.g.type);
    }
  }
}

// The working memory of a thread.
struct GradientMemory {
  float* tile;
  double* totals;  // (blocks, rows, kGradientColumns)
  int64_t blocks;  // of columns at once

  GradientMemory(int64_t rows, int64_t most) {
    const int64_t tile_floats = kGradientRows * kGradientColumns,
                  of_block = rows * kGradientColumns;
    const int64_t size = sizeof(double);
    blocks = std::clamp(kTotalBytes / (of_block * size), int64_t{1}, most);
    tile = static_cast<float*>(
        thread_scratch(ScratchSlot::kThread, (tile_floats / 2 + blocks * of_block) * size));
    totals = reinterpret_cast<double*>(tile + tile_floats);
  }
};

void write_results(const GradientProduct& p, const PreparedGradient& g, const int* order,
                   int64_t column, const double* totals) {
  const int64_t count = std::min(kGradientColumns, p.weight.cols - column);
  float row[kGradientColumns];
  for (int64_t m = 0; m < g.rows; ++m, totals += kGradientColumns) {
    for (int64_t i = 0; i < kGradientColumns; ++i) row[order[i]] = static_cast<float>(totals[i]);
    const int64_t at = (g.first + m) * p.weight.cols + column;
    for (int64_t k = 0; k < count; ++k) store_float(p.out, at + k, p.g.type, row[k]);
  }
}

// Blocks of columns [begin, end).
void multiply_blocks(const GradientProduct& p, const PreparedGradient& g, int64_t begin,
                     int64_t end) {
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::gradient_tile);
  const GradientMemory memory(g.rows, end - begin);
  const int64_t of_block = g.rows * kGradientColumns;
  for (int64_t b = begin; b < end; b += memory.blocks) {
    const int64_t blocks = std::min(memory.blocks, end - b);
    std::fill_n(memory.totals, blocks * of_block, 0.0);
    for (int64_t n = 0; n < p.terms(); n += kGradientRows) {
      const int64_t count = std::min(kGradientRows, p.terms() - n);
      for (int64_t i = 0; i < blocks; ++i) {
        kernels.gradient_tile(p.weight, p.range.begin + n, count, (b + i) * kGradientColumns,
                              memory.tile);
        kernels.add_gradient_tile(g.at(n / kGradientRows, 0), g.rows, count, memory.tile,
                                  memory.totals + i * of_block);
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t column = (b + i) * kGradientColumns;
      int order[kGradientColumns];
      kernels.gradient_order(p.weight, column, order);
      write_results(p, g, order, column, memory.totals + i * of_block);
    }
  }
}

}  // namespace

void packed_linear_transpose(const Activations& g, const PackedMatrix& weight, RowRange range,
                             void* out, int num_threads) {
  check_weight(weight);
  check_range(weight, range);
  check(g.rows >= 0, "grad must not have a negative number of rows; got ", g.rows, ".");
  const GradientProduct product{g, weight, range, out};
  const int64_t terms = product.terms(), blocks = ceil_div(weight.cols, kGradientColumns);
  for (int64_t first = 0; first < g.rows; first += kMaxBlockRows) {
    const int64_t rows = std::min(kMaxBlockRows, g.rows - first);
    const int64_t floats = ceil_div(terms, kGradientRows) * rows * kGradientRows;
    const PreparedGradient prepared{
        static_cast<float*>(
            thread_scratch(ScratchSlot::kShared, floats * static_cast<int64_t>(sizeof(float)))),
        first, rows};
    parallel_for(rows, grain_rows(8 * terms), 1, num_threads,
                 [&](int64_t from, int64_t to) { prepare_rows(product, prepared, {from, to}); });
    parallel_for(blocks, grain_rows(rows * terms * kGradientColumns), 1, num_threads,
                 [&](int64_t from, int64_t to) { multiply_blocks(product, prepared, from, to); });
  }
}

}  // namespace pyrobust::matmul
