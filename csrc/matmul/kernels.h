// Internal: what an instruction set supplies to the matmul family.
//
// dispatch.cpp cuts M into blocks of at most kMaxBlockRows rows of x, prepares each block once
// (float32 or int8, in the order of k that the set wants), and splits the rows of W over threads.
#pragma once

#include <cstdint>

#include "matmul/complex_block.h"
#include "matmul/matmul.h"

namespace pyrobust::matmul {

// Rows of x per block: enough to pay for decoding W again per block, few enough for scratch to stay
// small (block * cols floats).
constexpr int64_t kMaxBlockRows = 256;

// Rows of x in a block from which 8-bit activations take the tile instructions of AMX. Set from
// counts of instructions, not measured: with 16 rows, 64 columns of 32 rows of W take two tile
// products (16 cycles each) in place of 512 dot products (two a cycle); unpacking and scaling are
// the same. Fewer rows would fill a tile in part only.
constexpr int64_t kLeastTileRows = 16;

// Longest int32 sum: 65536 * 127 * 255 < 2^31.
constexpr int64_t kMaxIntegerRun = 65536;

// Columns decoded at once: codes of every format then begin on a byte border, and codes and floats
// stay in the first-level cache.
constexpr int64_t kSpan = 1280;

// The gradient to x (gradients.cpp) is g W over tiles of W: so many rows, whose products are summed
// in float, and so many columns.
constexpr int64_t kGradientRows = 64;
constexpr int64_t kGradientColumns = 128;

// One block of prepared activations. `data` is laid out by the same set's `prepare`.
struct Block {
  const void* data = nullptr;
  const double* step = nullptr;  // int8 mode: one per row
  int64_t rows = 0;
};

// Where a tile of results goes: row-major (x.rows, stride), `row` the block's first row, column 0
// the result of row `first` of W.
struct Output {
  void* data = nullptr;
  const float* bias = nullptr;
  FloatType type = FloatType::kFloat32;
  int64_t row = 0;
  int64_t stride = 0;
  int64_t first = 0;
  const float* row_scale = nullptr;   // of the weight
  const double* remainder = nullptr;  // (rows of W in the call, rows of the block), or null
  int64_t remainder_row = 0;          // row of W that `remainder` begins with
  int64_t remainder_stride = 0;
};

// A table of LevelCodes as kernels want it, made once a call (dispatch.cpp).
struct LevelTable {
  float scaled[256] = {};   // alpha times the entry, which is rounded to the target's type first
  uint16_t half[256] = {};  // the entry in the target's type, float16 or bfloat16
  float alpha = 0.0f;
};

// 8-bit parts of a row of x.
constexpr int parts_of(Mode mode) {
  return mode == Mode::kTwoParts     ? 2
         : mode == Mode::kThreeParts ? 3
         : mode == Mode::kFourParts  ? 4
                                     : 1;
}

struct MatmulKernels {
  // Whether the set multiplies float activations in 8-bit parts: those of 16 bits in two, a row of
  // 32 bits in as many as row_mode() says; that mode then stands for kExact in the other entries.
  bool (*takes_parts)(const PackedMatrix& weight);
  // Bytes that `prepare` writes for `rows` rows, and scratch bytes that `multiply` needs a thread.
  int64_t (*prepared_bytes)(const PackedMatrix& weight, Mode mode, int64_t rows);
  int64_t (*scratch_bytes)(const PackedMatrix& weight, Mode mode, int64_t rows);
  // Converts the rows `part` of the block [first, first + rows) of x; writes their `step` in int8
  // mode. `scratch` is as above. Parts begin at multiples of 8.
  void (*prepare)(const PackedMatrix& weight, Mode mode, const Activations& x, int64_t first,
                  int64_t rows, RowRange part, void* prepared, double* step, void* scratch);
  // Writes columns [begin, end) of the output (rows of W) for one block.
  void (*multiply)(const PackedMatrix& weight, Mode mode, const Block& block, int64_t begin,
                   int64_t end, const Output& out, void* scratch);
  // Rows of W a thread's share must be a multiple of.
  int64_t row_align;
  // Columns [begin, end) of row n of the exact float weight: written to `out`, or added to
  // `target`, of `type`, times `alpha` (rounded as matmul.h says). `begin` is a multiple of kSpan,
  // `end` at most kSpan further. `saved`, where not null, receives what `target` held, past the
  // caches (dispatch.cpp fences).
  void (*decode)(const PackedMatrix& weight, int64_t n, int64_t begin, int64_t end,
                 float* out) = nullptr;
  void (*add)(const PackedMatrix& weight, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target, void* saved) = nullptr;
  // target[k] += table.scaled[code of column begin + k], in the same spans.
  void (*add_levels)(const LevelCodes& codes, const LevelTable& table, int64_t n, int64_t begin,
                     int64_t end, FloatType type, void* target, void* saved) = nullptr;
  // target[k] += alpha * value[k] for `count` elements; values are floats or, like the target, of
  // `type`.
  void (*add_values)(const void* value, FloatType value_type, int64_t count, float alpha,
                     FloatType type, void* target, void* saved) = nullptr;
  // The block as the remainder wants it: floats (cols, rows), rounded values in int8 mode. One row
  // of scratch.
  void (*sparse_prepare)(Mode mode, const Activations& x, int64_t cols, int64_t first, int64_t rows,
                         float* prepared, float* scratch) = nullptr;
  // sums (end - begin, rows): the product of rows [begin, end) of the remainder with the block.
  void (*sparse_multiply)(const PackedMatrix& weight, const float* prepared, int64_t rows,
                          int64_t begin, int64_t end, double* sums) = nullptr;
  // The complex product (complex.h): the column, within its block, of byte p of prepared x; and
  // rows [begin, end) of W times all of x.
  int (*complex_order)(int p) = nullptr;
  void (*complex_multiply)(const ComplexBlock& x, int64_t begin, int64_t end) = nullptr;
  // The panel order: rows of a panel, bytes of all panels (0: this format takes none), and panels
  // [begin, end) of it written to `out`, where panel 0 begins. Null where the set has none.
  int64_t panel_rows = 0;
  int64_t (*panel_bytes)(const PackedMatrix& weight) = nullptr;
  void (*write_panels)(const PackedMatrix& weight, int64_t begin, int64_t end,
                       uint8_t* out) = nullptr;
  // The codes of row n, or their entries of the codebook, one a byte; writes up to 64 bytes more.
  void (*expand)(const PackedMatrix& weight, int64_t n, uint8_t* out) = nullptr;
  // How a float32 row of x meets a weight that takes parts: kThreeParts, kFourParts or kExact, by
  // the row alone. Null where the set takes none.
  Mode (*row_mode)(const PackedMatrix& weight, const float* row) = nullptr;
  // The gradient to x. Float weights of rows [first, first + count) of W, at most kGradientRows,
  // and kGradientColumns columns from `column` on, a multiple of that; 0 past the last.
  void (*gradient_tile)(const PackedMatrix& weight, int64_t first, int64_t count, int64_t column,
                        float* tile) = nullptr;
  // totals (rows, kGradientColumns) += g (rows, kGradientRows) tile, of `count` rows of W.
  void (*add_gradient_tile)(const float* g, int64_t rows, int64_t count, const float* tile,
                            double* totals) = nullptr;
  // Float p of a row of the tile, or of `words`, is column order[p] of the tile's.
  void (*gradient_order)(const PackedMatrix& weight, int64_t column, bool words,
                         int* order) = nullptr;
  // The same where g has 16 bits, for tiles that the set takes so, those of which the first returns
  // the bytes, not 0: writes such a tile, and adds to totals in float. Null where the set takes
  // none.
  int64_t (*gradient_words_bytes)(const PackedMatrix& weight, int64_t column) = nullptr;
  void (*gradient_words)(const PackedMatrix& weight, int64_t first, int64_t count, int64_t column,
                         void* tile) = nullptr;
  void (*add_gradient_words)(const PackedMatrix& weight, int64_t column, const float* g,
                             int64_t rows, int64_t count, const void* tile,
                             float* totals) = nullptr;
};

// Null where the build has no such path. A null entry of a table means "use the next lower".
const MatmulKernels& portable_kernels();
const MatmulKernels* avx2_kernels();
const MatmulKernels* avx512_kernels();
const MatmulKernels* amx_kernels();

}  // namespace pyrobust::matmul
