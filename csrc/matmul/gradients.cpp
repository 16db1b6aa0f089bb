// The product with the transposed weight, g W: W is decoded once for all rows of g, a tile at a
// time that stays in the first cache, and the columns of W are split over threads.
//
//   columns of W    block 0 | block 1 | ...                 each thread takes whole blocks
//   rows 0..63      tile    | tile    |        g (all rows, 64) times a tile: sums in float
//   rows 64..127    tile    | tile    |        totals (all rows, 128) += the sums, in double
//
// Totals of many rows of g do not fit the first cache. Then several tiles below one another are
// decoded, into the second one, and some rows of g meet all of these before the next rows do.
//
// Where g has 16 bits a set may take tiles of 16-bit integers instead (avx512_gradient_words.h).
#include "matmul/dispatch.h"
#include "matmul/weights.h"
#include "runtime/pages.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"

namespace pyrobust::matmul {
namespace {

// Totals of the blocks of columns that a thread takes at once stay in the second cache. Many rows
// of W then lie between two tiles of a block, so that few rows of g take whole rows of W in turn.
constexpr int64_t kTotalBytes = 512 * 1024;

// Tiles decoded at once for so many rows of g and more, and the bytes of totals of the rows that
// meet them.
constexpr int64_t kTilesAtOnce = 8;
constexpr int64_t kManyRows = 32;
constexpr int64_t kNearBytes = 16 * 1024;

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

// load_float() and store_float() of a run, with loops of one type each that the compiler turns into
// vectors.
void load_run(const void* from, int64_t at, int64_t count, FloatType type, float* to) {
  if (type == FloatType::kBFloat16) {
    const auto* halves = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = float_from_bfloat16(halves[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(from, at + i, type);
  }
}

void store_run(const float* from, int64_t count, FloatType type, void* to, int64_t at) {
  if (type == FloatType::kBFloat16) {
    auto* halves = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) halves[i] = bfloat16_from_float(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store_float(to, at + i, type, from[i]);
  }
}

void prepare_rows(const GradientProduct& p, const PreparedGradient& to, RowRange part) {
  for (int64_t m = part.begin; m < part.end; ++m) {
    const int64_t from = (to.first + m) * p.terms();
    for (int64_t n = 0; n < p.terms(); n += kGradientRows) {
      const int64_t count = std::min(kGradientRows, p.terms() - n);
      load_run(p.g.data, from + n, count, p.g.type, to.at(n / kGradientRows, m));
    }
  }
}

// Blocks of columns [begin, end) on one thread.
class BlockProducts {
 public:
  BlockProducts(const GradientProduct& p, const PreparedGradient& g, int64_t begin, int64_t end)
      : kernels_(kernels_with(&MatmulKernels::gradient_tile)),
        p_(p),
        g_(g),
        of_block_(g.rows * kGradientColumns),
        tiles_(g.rows >= kManyRows ? kTilesAtOnce : 1) {
    tile_bytes_ = kGradientRows * kGradientColumns * static_cast<int64_t>(sizeof(float));
    for (int64_t b = begin; b < end; ++b) tile_bytes_ = std::max(tile_bytes_, words_bytes(b));
    tile_bytes_ = ceil_div(tile_bytes_, 64) * 64;
    const int64_t scratch = tiles_ * tile_bytes_;
    const int64_t block_bytes = of_block_ * static_cast<int64_t>(sizeof(double));
    const int64_t at_once = std::clamp(kTotalBytes / block_bytes, int64_t{1}, end - begin);
    tile_ =
        static_cast<char*>(thread_scratch(ScratchSlot::kThread, scratch + at_once * block_bytes));
    totals_ = reinterpret_cast<double*>(tile_ + scratch);
    for (int64_t b = begin; b < end; b += at_once) multiply(b, std::min(end, b + at_once));
  }

 private:
  // 0 where g meets floats.
  int64_t words_bytes(int64_t block) const {
    if (p_.g.type == FloatType::kFloat32 || kernels_.gradient_words_bytes == nullptr) return 0;
    return kernels_.gradient_words_bytes(p_.weight, block * kGradientColumns);
  }

  void multiply(int64_t begin, int64_t end) {
    std::fill_n(totals_, (end - begin) * of_block_, 0.0);  // and floats of 0
    for (int64_t n = 0; n < p_.terms(); n += tiles_ * kGradientRows) {
      const int64_t stop = std::min(p_.terms(), n + tiles_ * kGradientRows);
      for (int64_t b = begin; b < end; ++b) {
        double* totals = totals_ + (b - begin) * of_block_;
        if (words_bytes(b) != 0) {
          add_words(n, stop, b * kGradientColumns, reinterpret_cast<float*>(totals));
        } else {
          add_floats(n, stop, b * kGradientColumns, totals);
        }
      }
    }
    for (int64_t b = begin; b < end; ++b) {
      const double* totals = totals_ + (b - begin) * of_block_;
      const bool words = words_bytes(b) != 0;
      int order[kGradientColumns];
      kernels_.gradient_order(p_.weight, b * kGradientColumns, words, order);
      if (words) {
        write_results(reinterpret_cast<const float*>(totals), order, b * kGradientColumns);
      } else {
        write_results(totals, order, b * kGradientColumns);
      }
    }
  }

  // decode(n, count, tile) for the tiles of terms [begin, end), then for these and all rows of g
  // add(rows of g, how many, count, tile, their totals).
  template <typename Total, typename Decode, typename Add>
  void add_tiles(int64_t begin, int64_t end, Total* totals, const Decode& decode,
                 const Add& add) const {
    constexpr int64_t kRowBytes = kGradientColumns * static_cast<int64_t>(sizeof(Total));
    const auto for_tiles = [&](const auto& body) {
      char* tile = tile_;
      for (int64_t n = begin; n < end; n += kGradientRows, tile += tile_bytes_) {
        body(n, std::min(kGradientRows, end - n), tile);
      }
    };
    for_tiles(decode);
    const int64_t some = tiles_ > 1 ? kNearBytes / kRowBytes : g_.rows;
    for (int64_t m = 0; m < g_.rows; m += some) {
      for_tiles([&](int64_t n, int64_t count, const void* tile) {
        add(g_.at(n / kGradientRows, m), std::min(some, g_.rows - m), count, tile,
            totals + m * kGradientColumns);
      });
    }
  }

  void add_words(int64_t begin, int64_t end, int64_t column, float* totals) const {
    const auto decode = [&](int64_t n, int64_t count, void* tile) {
      kernels_.gradient_words(p_.weight, p_.range.begin + n, count, column, tile);
    };
    const auto add = [&](const float* g, int64_t rows, int64_t count, const void* tile, float* to) {
      kernels_.add_gradient_words(p_.weight, column, g, rows, count, tile, to);
    };
    add_tiles(begin, end, totals, decode, add);
  }

  void add_floats(int64_t begin, int64_t end, int64_t column, double* totals) const {
    const auto decode = [&](int64_t n, int64_t count, void* tile) {
      kernels_.gradient_tile(p_.weight, p_.range.begin + n, count, column,
                             static_cast<float*>(tile));
    };
    const auto add = [&](const float* g, int64_t rows, int64_t count, const void* tile,
                         double* to) {
      kernels_.add_gradient_tile(g, rows, count, static_cast<const float*>(tile), to);
    };
    add_tiles(begin, end, totals, decode, add);
  }

  template <typename Total>
  void write_results(const Total* totals, const int* order, int64_t column) const {
    const int64_t count = std::min(kGradientColumns, p_.weight.cols - column);
    float row[kGradientColumns];
    for (int64_t m = 0; m < g_.rows; ++m, totals += kGradientColumns) {
      for (int64_t i = 0; i < kGradientColumns; ++i) row[order[i]] = static_cast<float>(totals[i]);
      store_run(row, count, p_.g.type, p_.out, (g_.first + m) * p_.weight.cols + column);
    }
  }

  const MatmulKernels& kernels_;
  const GradientProduct& p_;
  const PreparedGradient& g_;
  int64_t of_block_;  // totals
  int64_t tiles_;     // at once
  int64_t tile_bytes_;
  char* tile_;
  double* totals_;  // (blocks, rows, kGradientColumns)
};

}  // namespace

void packed_linear_transpose(const Activations& g, const PackedMatrix& weight, RowRange range,
                             void* out, int num_threads) {
  check_weight(weight);
  check_range(weight, range);
  check(g.rows >= 0, "grad must not have a negative number of rows; got ", g.rows, ".");
  prefer_large_pages(out, g.rows * weight.cols * float_type_bytes(g.type));
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
                 [&](int64_t from, int64_t to) { BlockProducts(product, prepared, from, to); });
  }
}

}  // namespace pyrobust::matmul
