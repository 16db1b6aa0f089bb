// Included by avx2.cpp, avx512.cpp and amx.cpp: one tile of the weight (four rows: codes, scales,
// zeros), the paths a weight can take, and the working memory of a thread.
#pragma once

#include <immintrin.h>

#include "matmul/avx2_decode.h"
#include "matmul/kernels.h"
#include "matmul/weights.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kTile = 4;          // rows of W in a tile
constexpr int64_t kPanelTiles = 16;   // 64 rows of W share one pass over x: 128 KiB of floats
constexpr int64_t kPanelBlocks = 8;   // 512 columns: four rows of a panel (8 KiB) stay in L1
constexpr int64_t kFusedRows = 2;     // more rows of x than this: decode to a panel
constexpr int64_t kIntegerTiles = 4;  // 16 rows of W as bytes: 64 KiB at 4096 columns

// Whole blocks; groups along a row that are none (avx2_plain.h, avx2_groups.h); groups along the
// rows of W.
enum class Path { kBlocks, kPlain, kScaled, kIntegerBlocks, kIntegerGroups, kDoubleColumns };

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t blocks_of(const PackedMatrix& w) { return round_up(w.cols, kBlock) / kBlock; }

inline Path path_of(const PackedMatrix& w, Mode mode) {
  const bool whole_blocks =
      w.group_dim == 1 && (w.group_size % kBlock == 0 || w.group_size >= w.cols);
  if (mode == Mode::kExact) {
    return whole_blocks ? Path::kBlocks : w.group_dim == 1 ? Path::kPlain : Path::kScaled;
  }
  if (w.group_dim == 0) return Path::kDoubleColumns;
  const bool short_sums = w.group_size <= kMaxIntegerRun || w.cols <= kMaxIntegerRun;
  return whole_blocks && short_sums ? Path::kIntegerBlocks : Path::kIntegerGroups;
}

// Bits of a code as the kernels see it: rows of trits are expanded to two bits, those with a
// codebook to its bytes.
int stored_bits(const PackedMatrix& w) {
  return w.levels == kTernaryLevels ? 2 : code_bits(w.levels);
}
int bits_of(const PackedMatrix& w) { return w.codebook != nullptr ? 8 : stored_bits(w); }
bool expands(const PackedMatrix& w) { return w.levels == kTernaryLevels || w.codebook != nullptr; }

// Groups of w along k as the block paths see them, and blocks to a group.
int64_t groups_of(const PackedMatrix& w) { return scale_cols(w); }
inline int64_t group_blocks(const PackedMatrix& w) {
  return w.group_size >= w.cols ? blocks_of(w) : w.group_size / kBlock;
}

// --- rows of codes ------------------------------------------------------------------------------

// Code rows of one tile, readable in whole blocks: some rows are expanded (bits_of), and the last
// partial block is copied. Rows past the end repeat the last one; their results are dropped.
struct TileRows {
  const uint8_t* row[kTile];
  uint8_t tail[kTile][kBlock];
  int64_t whole = 0;  // blocks that may be read in place

  const uint8_t* block(int64_t n, int64_t b, int bytes) const {
    return b < whole ? row[n] + b * bytes : tail[n];
  }
};

// An expanded row; before a codebook's bytes, one of trits leaves room for its two-bit codes.
int64_t expanded_row_bytes(const PackedMatrix& w) {
  const int64_t two_bits = w.levels == kTernaryLevels ? blocks_of(w) * 16 + kBlock : 0;
  return two_bits + (w.codebook != nullptr ? blocks_of(w) * kBlock : 0);
}

const uint8_t* expand_row(const PackedMatrix& w, int64_t n, uint8_t* out) {
  const uint8_t* row = code_row(w, n);
  int64_t bytes = packed_row_bytes(w.cols, w.levels);
  if (w.levels == kTernaryLevels) {
    ternary_to_two_bits(row, bytes, out);
    if (w.codebook == nullptr) return out;
    row = out;
    bytes = packed_row_bytes(w.cols, 4);
    out += blocks_of(w) * 16 + kBlock;
  }
  codes_to_entries(row, bytes, stored_bits(w), w.codebook, w.levels, blocks_of(w) * kBlock, out);
  return out;
}

void load_tile(const PackedMatrix& w, int64_t first, uint8_t* expanded, TileRows* rows) {
  const int bytes = 8 * bits_of(w);
  const int64_t blocks = blocks_of(w);
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    rows->row[i] = code_row(w, n);
    if (expands(w)) {
      rows->row[i] = expand_row(w, n, expanded + i * expanded_row_bytes(w));
      rows->whole = blocks;
      continue;
    }
    rows->whole = row_bytes / bytes;
    if (rows->whole < blocks) {
      const int64_t done = rows->whole * bytes;
      __builtin_memset(rows->tail[i], 0, kBlock);
      __builtin_memcpy(rows->tail[i], rows->row[i] + done, static_cast<size_t>(row_bytes - done));
    }
  }
}

// --- scales and zeros ---------------------------------------------------------------------------

// `count` scales from index `from` on, as floats.
void load_scales(const PackedMatrix& w, int64_t from, int64_t count, float* out) {
  int64_t i = 0;
  if (w.row_scale == nullptr && w.scale_type == FloatType::kFloat16) {
    const auto* halves = static_cast<const uint16_t*>(w.scale) + from;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
    }
  }
  for (; i < count; ++i) out[i] = scale_at(w, from + i);
}

// kMagic + zero of `count` groups from index `from` on.
inline void load_zeros(const PackedMatrix& w, int64_t from, int64_t count, float* out) {
  int64_t i = 0;
  const __m256 magic = _mm256_set1_ps(kMagic);
  if (w.zero == nullptr) {
    const __m256 constant = _mm256_set1_ps(kMagic + static_cast<float>(symmetric_zero(w)));
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, constant);
  } else {
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zero + from + i));
      _mm256_storeu_ps(out + i,
                       _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), magic));
    }
  }
  for (; i < count; ++i) out[i] = kMagic + static_cast<float>(zero_at(w, from + i));
}

// Per group, the scales of the tile's four rows; per row and group, the zero as kMagic + zero.
inline void load_group_scales(const PackedMatrix& w, int64_t first, double* scale, float* zero) {
  constexpr int64_t kChunk = 64;
  const int64_t groups = groups_of(w);
  float row[kTile][kChunk];
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    load_zeros(w, scale_row(w, n), groups, zero + i * groups);
  }
  for (int64_t g = 0; g < groups; g += kChunk) {
    const int64_t count = groups - g < kChunk ? groups - g : kChunk;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
      load_scales(w, scale_row(w, n) + g, count, row[i]);
    }
    for (int64_t j = 0; j < count; ++j) {
      const __m128 four = _mm_setr_ps(row[0][j], row[1][j], row[2][j], row[3][j]);
      _mm256_storeu_pd(scale + (g + j) * kTile, _mm256_cvtps_pd(four));
    }
  }
}

// Scale and kMagic + zero of every column of row n, in block order. Columns past the end get 0.
inline void load_column_scales(const PackedMatrix& w, int64_t n, float* scale, float* zero) {
  const int64_t columns = blocks_of(w) * kBlock, from = scale_row(w, n);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  float s = 0.0f, z = kMagic;
  for (int64_t k = 0, left = 0, group = 0; k < columns; ++k, --left) {
    if (k >= w.cols) {
      s = 0.0f;
    } else if (left == 0) {
      s = scale_at(w, from + group);
      z = kMagic + static_cast<float>(zero_at(w, from + group));
      left = run;
      ++group;
    }
    const int64_t at = k / kBlock * kBlock + k % 8 * 8 + k / 8 % 8;
    scale[at] = s;
    zero[at] = z;
  }
}

// --- scratch ------------------------------------------------------------------------------------

// Hands out 64-byte aligned pieces of the caller's scratch; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    char* piece = base != nullptr ? base + used : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
};

// Working memory of one thread, whatever the path; a path uses the parts that it names.
struct Scratch {
  uint8_t* expanded;
  TileRows* rows;
  double* group_scale;
  float* group_zero;
  float* column_scale;
  float* column_zero;
  float* panel;
  double* total;
  int32_t* lane_zero;
  uint8_t* bytes;
  int64_t used;

  Scratch(void* memory, const PackedMatrix& w, Path path, int64_t rows_of_x) {
    Arena arena{static_cast<char*>(memory)};
    const bool columns = path == Path::kScaled || path == Path::kDoubleColumns;
    const bool groups = path == Path::kIntegerGroups;
    const int64_t blocks = blocks_of(w), rows_of_w = kPanelTiles * kTile;
    const int64_t grouped =  // rows of W whose scales are kept
        path == Path::kBlocks || path == Path::kIntegerBlocks ? rows_of_w
        : groups                                              ? kIntegerTiles * kTile
                                                              : 0;
    const bool plain = groups || path == Path::kPlain;
    const int64_t plain_rows = groups ? 8 * (round_up(w.cols, kBlock) + kBlock) : 0;
    expanded = arena.take<uint8_t>(plain ? plain_rows : rows_of_w * expanded_row_bytes(w));
    rows = arena.take<TileRows>(plain ? 0 : kPanelTiles);
    group_scale = arena.take<double>(grouped * groups_of(w));
    group_zero = arena.take<float>(grouped * groups_of(w));
    // Groups along the rows share their scales; otherwise each row of the panel has its own.
    column_scale = arena.take<float>(columns ? rows_of_w * blocks * kBlock : 0);
    column_zero = arena.take<float>(columns ? rows_of_w * blocks * kBlock : 0);
    const int64_t depth = path == Path::kDoubleColumns ? blocks : rows_of_w / kTile * kPanelBlocks;
    panel = arena.take<float>(path == Path::kIntegerBlocks || groups ? 0 : depth * kTile * kBlock);
    total = arena.take<double>(rows_of_x * rows_of_w);
    const int64_t unpacked = path == Path::kIntegerBlocks || groups ? kIntegerTiles * kTile : 0;
    lane_zero = arena.take<int32_t>(unpacked * groups_of(w));
    // Groups that are no whole blocks are filled up to four columns there.
    const int64_t group = w.group_size < w.cols ? w.group_size : w.cols;
    const int64_t width = groups ? groups_of(w) * round_up(group, 4) : blocks * kBlock;
    bytes = arena.take<uint8_t>(unpacked * (width + kBlock) * (bits_of(w) == 8 ? 2 : 1));
    used = arena.used;
  }
};

}  // namespace
}  // namespace pyrobust::matmul
