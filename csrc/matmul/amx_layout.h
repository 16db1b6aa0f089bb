// Included by amx.cpp alone: how x and W lie in memory for the tile instructions, and how groups
// are cut into steps of one tile product.
//
//   x   tiles of 16 rows and 64 columns, 1 KiB each; those of rows 0..15 first, block by block
//   W   a panel of 32 rows: per block of 64 columns two tiles of 16 rows of W, whose row j holds
//       four columns of each:   columns 4 j .. 4 j + 3 of rows 0, 1, ... 15         64 bytes
//
// A product takes 64 columns, or 32 where groups are no multiple of 64: then the first or second
// half of each row of x, and the first or last 8 rows of a tile of W.
#pragma once

#include "matmul/avx2_tile.h"
#include "matmul/avx512_decode.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kXRows = 16;  // rows of x in a tile
constexpr int64_t kWRows = 16;  // rows of W in a tile
constexpr int64_t kPairs = 2;   // tiles of x, and of W, that are multiplied together
constexpr int64_t kWidth = kPairs * kWRows;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kChunkBlocks = 8;  // 512 columns: 16 KiB of panel stay in L1

// Within a block: the order of wide_bytes(), with the dwords of columns 0..31 moved to the front.
// (Every dword's four columns are in one half, at every width.)
struct ColumnOrder {
  uint8_t place[16];   // of dword j of wide_bytes()
  uint8_t column[64];  // of byte p of a row of x

  explicit ColumnOrder(int bits) {
    int next[2] = {0, 8};
    for (int j = 0; j < 16; ++j) {
      const int at = next[wide_order(bits, 4 * j) / 32]++;
      place[j] = static_cast<uint8_t>(at);
      for (int c = 0; c < 4; ++c) {
        column[4 * at + c] = static_cast<uint8_t>(wide_order(bits, 4 * j + c));
      }
    }
  }
};

struct TileSteps {
  int64_t columns;   // of one product: 32 or 64
  int64_t count;     // steps along k
  int64_t to_group;  // steps to a group
  int64_t chunk;     // blocks of a panel: whole groups

  explicit TileSteps(const PackedMatrix& w) {
    const int64_t blocks = blocks_of(w);
    const int64_t group = w.group_size >= w.cols ? blocks * kBlock : w.group_size;
    const bool whole = group % kBlock == 0;
    columns = whole ? kBlock : kBlock / 2;
    count = ceil_div(w.cols, columns);
    to_group = group / columns;
    const int64_t unit = whole ? group / kBlock : 2 * group / kBlock;
    chunk = unit >= kChunkBlocks ? unit : kChunkBlocks / unit * unit;
    if (chunk > blocks) chunk = blocks;
  }
  // Bytes from the first block's tile of x, and from the first block's pair of tiles of W.
  int64_t offset_in_x(int64_t step) const {
    return step * columns / kBlock * kTileBytes + step * columns % kBlock;
  }
  int64_t offset_in_panel(int64_t step) const {
    return step * columns / kBlock * kPairs * kTileBytes + step * columns % kBlock * kWRows;
  }
};

// Prepared x: tiles, rows past the end zero, then the sums per row and group.
struct TiledX {
  int8_t* q;
  int32_t* q_sum;
  int64_t pitch;  // bytes of 16 rows

  TiledX(void* data, const PackedMatrix& w, int64_t rows)
      : q(static_cast<int8_t*>(data)), pitch(blocks_of(w) * kTileBytes) {
    q_sum = reinterpret_cast<int32_t*>(q + ceil_div(rows, kXRows) * pitch);
  }
  static int64_t bytes(const PackedMatrix& w, int64_t rows) {
    return ceil_div(rows, kXRows) * blocks_of(w) * kTileBytes +
           rows * groups_of(w) * static_cast<int64_t>(sizeof(int32_t));
  }
  int8_t* block(int64_t m, int64_t b) const {
    return q + m / kXRows * pitch + b * kTileBytes + m % kXRows * kBlock;
  }
};

// quantize_activations() by vectors; division and conversion round alike.
void quantize_row(const float* x, int64_t count, double step, int8_t* q) {
  const __m512d divisor = _mm512_set1_pd(step);
  int64_t k = 0;
  for (; step > 0.0 && k + 16 <= count; k += 16) {
    const __m256i low =
        _mm512_cvtpd_epi32(_mm512_div_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + k)), divisor));
    const __m256i high =
        _mm512_cvtpd_epi32(_mm512_div_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + k + 8)), divisor));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(both));
  }
  quantize_activations(x + k, count - k, step, q + k);
}

// Row m of the block from its rounded columns, which zeros follow up to a whole block.
void store_tiled_row(const PackedMatrix& w, const int8_t* q, int64_t m, const ColumnOrder& order,
                     const TiledX& out) {
  const int64_t groups = groups_of(w);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t from = g * w.group_size;
    const int64_t to = w.cols - from < w.group_size ? w.cols : from + w.group_size;
    int32_t sum = 0;
    for (int64_t k = from; k < to; ++k) sum += q[k];
    out.q_sum[m * groups + g] = sum;
  }
  for (int64_t b = 0; b < blocks_of(w); ++b) {
    int8_t* to = out.block(m, b);
    for (int64_t p = 0; p < kBlock; ++p) to[p] = q[b * kBlock + order.column[p]];
  }
}

// Bytes of scratch that prepare_tiled() needs: one row as floats and as bytes.
int64_t tiled_row_bytes(const PackedMatrix& w) { return blocks_of(w) * kBlock * 5 + 64; }

void prepare_tiled(const PackedMatrix& w, const Activations& x, int64_t first, int64_t rows,
                   RowRange part, void* prepared, double* step, void* scratch) {
  const TiledX out(prepared, w, rows);
  const ColumnOrder order(stored_bits(w));
  const int64_t columns = blocks_of(w) * kBlock;
  auto* row = static_cast<float*>(scratch);
  auto* q = reinterpret_cast<int8_t*>(row + columns);
  for (int64_t m = part.begin; m < part.end; ++m) {
    for (int64_t k = 0; k < w.cols; ++k) {
      row[k] = load_float(x.data, (first + m) * w.cols + k, x.type);
    }
    step[m] = activation_step(row, w.cols);
    quantize_row(row, w.cols, step[m], q);
    for (int64_t k = w.cols; k < columns; ++k) q[k] = 0;
    store_tiled_row(w, q, m, order, out);
  }
  for (int64_t m = rows; part.end == rows && m % kXRows != 0; ++m) {
    for (int64_t b = 0; b < blocks_of(w); ++b) __builtin_memset(out.block(m, b), 0, kBlock);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
