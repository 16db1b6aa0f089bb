// Differs from portable.cpp in working on tiles of four rows of W and up to three rows of x, 64
// columns at a time, in the order of k of avx2_decode.h.
//
// Exact mode, groups of whole blocks (group_size a multiple of 64, or one group): per block of 64
// columns eight float lanes take eight FMAs of x (code - zero) each, are added as a tree (the
// relative error is at most 11 float roundings), and go into a double total, times the scale. Other
// groupings decode the exact scaled weight first and use a scale of 1. One or two rows of x decode
// in registers; more rows decode a panel once and reuse it; the sums are the same to the bit.
//
// int8 mode: bytes times bytes to int32 (at 8 bits 16 times 16), which is exact in any order, and
// the double epilogue of matmul.h.
#include <immintrin.h>

#include "core/activation_int8.h"
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

enum class Path { kBlocks, kScaled, kIntegerBlocks, kIntegerGroups, kDoubleColumns };

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t blocks_of(const PackedMatrix& w) { return round_up(w.cols, kBlock) / kBlock; }

Path path_of(const PackedMatrix& w, Mode mode) {
  const bool whole_blocks =
      w.group_dim == 1 && (w.group_size % kBlock == 0 || w.group_size >= w.cols);
  if (mode == Mode::kExact) return whole_blocks ? Path::kBlocks : Path::kScaled;
  if (w.group_dim == 0) return Path::kDoubleColumns;
  const bool short_sums = w.group_size <= kMaxIntegerRun || w.cols <= kMaxIntegerRun;
  return whole_blocks && short_sums ? Path::kIntegerBlocks : Path::kIntegerGroups;
}

int bits_of(const PackedMatrix& w) { return w.levels == kTernaryLevels ? 2 : code_bits(w.levels); }

// Groups of w along k as the block paths see them, and blocks to a group.
int64_t groups_of(const PackedMatrix& w) { return scale_cols(w); }
int64_t group_blocks(const PackedMatrix& w) {
  return w.group_size >= w.cols ? blocks_of(w) : w.group_size / kBlock;
}

// --- rows of codes ------------------------------------------------------------------------------

// Code rows of one tile, readable in whole blocks: ternary rows are expanded to two bits, and the
// last partial block is copied. Rows past the end repeat the last one; their results are dropped.
struct TileRows {
  const uint8_t* row[kTile];
  uint8_t tail[kTile][kBlock];
  int64_t whole = 0;  // blocks that may be read in place

  const uint8_t* block(int64_t n, int64_t b, int bytes) const {
    return b < whole ? row[n] + b * bytes : tail[n];
  }
};

int64_t expanded_row_bytes(const PackedMatrix& w) { return blocks_of(w) * 16 + kBlock; }

void load_tile(const PackedMatrix& w, int64_t first, uint8_t* expanded, TileRows* rows) {
  const int bytes = 8 * bits_of(w);
  const int64_t blocks = blocks_of(w);
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    rows->row[i] = code_row(w, n);
    if (w.levels == kTernaryLevels) {
      uint8_t* out = expanded + i * expanded_row_bytes(w);
      ternary_to_two_bits(rows->row[i], row_bytes, out);
      rows->row[i] = out;
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
  if (w.scale_type == FloatType::kFloat16) {
    const auto* halves = static_cast<const uint16_t*>(w.scale) + from;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
    }
  }
  for (; i < count; ++i) out[i] = load_float(w.scale, from + i, w.scale_type);
}

// kMagic + zero of `count` groups from index `from` on.
void load_zeros(const PackedMatrix& w, int64_t from, int64_t count, float* out) {
  int64_t i = 0;
  const __m256 magic = _mm256_set1_ps(kMagic);
  if (w.zero == nullptr) {
    const __m256 constant = _mm256_set1_ps(kMagic + static_cast<float>(symmetric_zero(w.levels)));
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
void load_group_scales(const PackedMatrix& w, int64_t first, double* scale, float* zero) {
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
void load_column_scales(const PackedMatrix& w, int64_t n, float* scale, float* zero) {
  const int64_t columns = blocks_of(w) * kBlock, from = scale_row(w, n);
  const int64_t run = w.group_dim == 1 ? w.group_size : 1;
  float s = 0.0f, z = kMagic;
  for (int64_t k = 0, left = 0, group = 0; k < columns; ++k, --left) {
    if (k >= w.cols) {
      s = 0.0f;
    } else if (left == 0) {
      s = load_float(w.scale, from + group, w.scale_type);
      z = kMagic + static_cast<float>(zero_at(w, from + group));
      left = run;
      ++group;
    }
    const int64_t at = k / kBlock * kBlock + k % 8 * 8 + k / 8 % 8;
    scale[at] = s;
    zero[at] = z;
  }
}

// --- where the micro-kernels take their weights from
// ----------------------------------------------

// Codes decoded in registers; the zero is the group's.
template <int kBits>
struct PackedSource {
  const TileRows* rows;
  const float* zero;
  int64_t groups;
  Words<kBits> words;
  __m256 subtract;

  PackedSource(const TileRows* tile, const float* tile_zero, int64_t group_count)
      : rows(tile), zero(tile_zero), groups(group_count) {}

  void start(int64_t n, int64_t b, int64_t group) {
    words = load_words<kBits>(rows->block(n, b, 8 * kBits));
    subtract = _mm256_broadcast_ss(zero + n * groups + group);
  }
  __m256 get(int64_t, int j) const { return _mm256_sub_ps(magic_codes<kBits>(words, j), subtract); }
};

// Adds eight float lanes of four vectors: lanes ((0+1)+(2+3)) + ((4+5)+(6+7)) of each.
inline __m128 lane_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}

// total[m] (four doubles, one per row of the tile) += scale * sum over 64 columns, per block.
// x: block-ordered rows, `stride` floats apart. The sums of one output never depend on kRows.
template <int kBits, int kRows>
inline void fused_blocks(PackedSource<kBits> source, const double* scale, int64_t per_group,
                         int64_t blocks, const float* x, int64_t stride, __m256d* total) {
  int64_t group = 0, left = per_group;
  for (int64_t b = 0; b < blocks; ++b, --left) {
    if (left == 0) {
      ++group;
      left = per_group;
    }
    __m256 sum[kRows][kTile];
#pragma GCC unroll 4
    for (int n = 0; n < kTile; ++n) {
      source.start(n, b, group);
      __m256 partial[kRows];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m256 weight = source.get(n, j);
#pragma GCC unroll 2
        for (int m = 0; m < kRows; ++m) {
          const __m256 value = _mm256_loadu_ps(x + m * stride + b * kBlock + j * 8);
          partial[m] =
              j == 0 ? _mm256_mul_ps(value, weight) : _mm256_fmadd_ps(value, weight, partial[m]);
        }
      }
#pragma GCC unroll 2
      for (int m = 0; m < kRows; ++m) sum[m][n] = partial[m];
    }
    const __m256d scales = _mm256_loadu_pd(scale + group * kTile);
    for (int m = 0; m < kRows; ++m) {
      const __m128 sums = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      total[m] = _mm256_fmadd_pd(_mm256_cvtps_pd(sums), scales, total[m]);
    }
  }
}

// The same from a panel of floats: [block][step][row of the tile][lane]. `scale` null: 1.
template <int kRows>
inline void panel_blocks(const float* panel, const double* scale, int64_t first_block,
                         int64_t per_group, int64_t blocks, const float* x, int64_t stride,
                         double* total, int64_t total_stride) {
  __m256d totals[kRows];
  for (int m = 0; m < kRows; ++m) totals[m] = _mm256_loadu_pd(total + m * total_stride);
  for (int64_t b = 0; b < blocks; ++b) {
    __m256 sum[kRows][kTile];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256 value[kRows];
#pragma GCC unroll 3
      for (int m = 0; m < kRows; ++m) {
        value[m] = _mm256_loadu_ps(x + m * stride + b * kBlock + j * 8);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
        const __m256 weight = _mm256_loadu_ps(panel + ((b * 8 + j) * kTile + n) * 8);
#pragma GCC unroll 3
        for (int m = 0; m < kRows; ++m) {
          sum[m][n] = j == 0 ? _mm256_mul_ps(value[m], weight)
                             : _mm256_fmadd_ps(value[m], weight, sum[m][n]);
        }
      }
    }
    const __m256d scales = scale != nullptr
                               ? _mm256_loadu_pd(scale + (first_block + b) / per_group * kTile)
                               : _mm256_set1_pd(1.0);
#pragma GCC unroll 3
    for (int m = 0; m < kRows; ++m) {
      const __m128 sums = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      totals[m] = _mm256_fmadd_pd(_mm256_cvtps_pd(sums), scales, totals[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) _mm256_storeu_pd(total + m * total_stride, totals[m]);
}

void panel_rows(int64_t rows, const float* panel, const double* scale, int64_t first_block,
                int64_t per_group, int64_t blocks, const float* x, int64_t stride, double* total,
                int64_t total_stride) {
  switch (rows) {
    case 1:
      return panel_blocks<1>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
    case 2:
      return panel_blocks<2>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
    default:
      return panel_blocks<3>(panel, scale, first_block, per_group, blocks, x, stride, total,
                             total_stride);
  }
}

// Decodes blocks [from, to) of a tile to a panel: code - zero, or the exact weight.
template <int kBits>
void decode_panel(const TileRows& rows, const float* zero, int64_t groups, int64_t per_group,
                  int64_t from, int64_t to, float* panel) {
  PackedSource<kBits> source(&rows, zero, groups);
  for (int64_t b = from; b < to; ++b) {
    for (int64_t n = 0; n < kTile; ++n) {
      source.start(n, b, b / per_group);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        _mm256_storeu_ps(panel + (((b - from) * 8 + j) * kTile + n) * 8, source.get(n, j));
      }
    }
  }
}

// `scale` and `zero`: block-ordered columns of each row of the tile.
template <int kBits>
void decode_scaled(const TileRows& rows, const float* const* scale, const float* const* zero,
                   int64_t from, int64_t to, float* panel) {
  for (int64_t b = from; b < to; ++b) {
    for (int64_t n = 0; n < kTile; ++n) {
      const Words<kBits> words = load_words<kBits>(rows.block(n, b, 8 * kBits));
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int64_t at = b * kBlock + j * 8;
        const __m256 code =
            _mm256_sub_ps(magic_codes<kBits>(words, j), _mm256_loadu_ps(zero[n] + at));
        _mm256_storeu_ps(panel + (((b - from) * 8 + j) * kTile + n) * 8,
                         _mm256_mul_ps(code, _mm256_loadu_ps(scale[n] + at)));
      }
    }
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
  uint8_t* bytes;
  int16_t* integers;
  int64_t used;

  Scratch(void* memory, const PackedMatrix& w, Path path, int64_t rows_of_x) {
    Arena arena{static_cast<char*>(memory)};
    const bool columns = path == Path::kScaled || path == Path::kDoubleColumns;
    const bool grouped = path == Path::kBlocks || path == Path::kIntegerBlocks;
    const int64_t blocks = blocks_of(w), rows_of_w = kPanelTiles * kTile;
    const int64_t ternary = w.levels == kTernaryLevels ? 1 : 0;
    expanded = arena.take<uint8_t>(ternary * rows_of_w * expanded_row_bytes(w));
    rows = arena.take<TileRows>(kPanelTiles);
    group_scale = arena.take<double>(grouped ? rows_of_w * groups_of(w) : 0);
    group_zero = arena.take<float>(grouped ? rows_of_w * groups_of(w) : 0);
    // Groups along the rows share their scales; otherwise each row of the panel has its own.
    column_scale = arena.take<float>(columns ? rows_of_w * blocks * kBlock : 0);
    column_zero = arena.take<float>(columns ? rows_of_w * blocks * kBlock : 0);
    const int64_t depth = path == Path::kDoubleColumns ? blocks : rows_of_w / kTile * kPanelBlocks;
    panel = arena.take<float>(path == Path::kIntegerBlocks ? 0 : depth * kTile * kBlock);
    total = arena.take<double>(rows_of_x * rows_of_w);
    bytes = arena.take<uint8_t>(
        path == Path::kIntegerBlocks ? kIntegerTiles * kTile * blocks * kBlock : 0);
    integers = arena.take<int16_t>(path == Path::kIntegerGroups ? blocks * kBlock : 0);
    used = arena.used;
  }
};

// --- results ------------------------------------------------------------------------------------

void store(const Output& out, int64_t m, int64_t n, double value) {
  const double bias = out.bias != nullptr ? out.bias[n] : 0.0;
  store_float(out.data, (out.row + m) * out.stride + n, out.type, static_cast<float>(value + bias));
}

// --- exact mode ---------------------------------------------------------------------------------

template <int kBits, int kRows>
void multiply_fused(const PackedMatrix& w, const float* x, int64_t stride, int64_t begin,
                    int64_t end, const Output& out, const Scratch& scratch) {
  for (int64_t first = begin; first < end; first += kTile) {
    load_tile(w, first, scratch.expanded, scratch.rows);
    load_group_scales(w, first, scratch.group_scale, scratch.group_zero);
    __m256d total[kRows];
    for (int m = 0; m < kRows; ++m) total[m] = _mm256_setzero_pd();
    fused_blocks<kBits, kRows>({scratch.rows, scratch.group_zero, groups_of(w)},
                               scratch.group_scale, group_blocks(w), blocks_of(w), x, stride,
                               total);
    for (int m = 0; m < kRows; ++m) {
      double value[kTile];
      _mm256_storeu_pd(value, total[m]);
      for (int64_t i = 0; i < kTile && first + i < end; ++i) store(out, m, first + i, value[i]);
    }
  }
}

// Column scales of one tile; rows of W that share a group share the vectors.
void tile_column_scales(const PackedMatrix& w, int64_t first, int64_t tile, int64_t* loaded,
                        const Scratch& scratch, const float** scale, const float** zero) {
  const int64_t columns = blocks_of(w) * kBlock;
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    const int64_t group = w.group_dim == 1 ? n : n / w.group_size;
    const int64_t slot = w.group_dim == 1 ? tile * kTile + i : group % (kPanelTiles * kTile);
    if (loaded[slot] != group) {
      load_column_scales(w, n, scratch.column_scale + slot * columns,
                         scratch.column_zero + slot * columns);
      loaded[slot] = group;
    }
    scale[i] = scratch.column_scale + slot * columns;
    zero[i] = scratch.column_zero + slot * columns;
  }
}

template <int kBits>
void multiply_panel(const PackedMatrix& w, Path path, const float* x, int64_t stride, int64_t rows,
                    int64_t begin, int64_t end, const Output& out, const Scratch& scratch) {
  const int64_t blocks = blocks_of(w), groups = groups_of(w), width = kPanelTiles * kTile;
  const int64_t per_group = path == Path::kBlocks ? group_blocks(w) : 1;
  const float* scale[kPanelTiles][kTile];
  const float* zero[kPanelTiles][kTile];
  int64_t loaded[kPanelTiles * kTile];
  for (int64_t& slot : loaded) slot = -1;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = end - first < width ? end - first : width;
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      load_tile(w, first + t * kTile, scratch.expanded + t * kTile * expanded_row_bytes(w),
                scratch.rows + t);
      if (path == Path::kBlocks) {
        load_group_scales(w, first + t * kTile, scratch.group_scale + t * kTile * groups,
                          scratch.group_zero + t * kTile * groups);
      } else {
        tile_column_scales(w, first + t * kTile, t, loaded, scratch, scale[t], zero[t]);
      }
    }
    __builtin_memset(scratch.total, 0, static_cast<size_t>(rows * width) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += kPanelBlocks) {
      const int64_t to = blocks - from < kPanelBlocks ? blocks : from + kPanelBlocks;
      for (int64_t t = 0; t < tiles; ++t) {
        float* panel = scratch.panel + t * kPanelBlocks * kTile * kBlock;
        if (path == Path::kBlocks) {
          decode_panel<kBits>(scratch.rows[t], scratch.group_zero + t * kTile * groups, groups,
                              per_group, from, to, panel);
        } else {
          decode_scaled<kBits>(scratch.rows[t], scale[t], zero[t], from, to, panel);
        }
      }
      for (int64_t m = 0; m < rows; m += 3) {
        for (int64_t t = 0; t < tiles; ++t) {
          panel_rows(rows - m, scratch.panel + t * kPanelBlocks * kTile * kBlock,
                     path == Path::kBlocks ? scratch.group_scale + t * kTile * groups : nullptr,
                     from, per_group, to - from, x + m * stride + from * kBlock, stride,
                     scratch.total + m * width + t * kTile, width);
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < count; ++i) store(out, m, first + i, scratch.total[m * width + i]);
    }
  }
}

template <int kBits>
void multiply_exact(const PackedMatrix& w, Path path, const Block& block, int64_t begin,
                    int64_t end, const Output& out, const Scratch& scratch) {
  const auto* x = static_cast<const float*>(block.data);
  const int64_t stride = blocks_of(w) * kBlock;
  if (path == Path::kBlocks && block.rows == 1) {
    multiply_fused<kBits, 1>(w, x, stride, begin, end, out, scratch);
  } else if (path == Path::kBlocks && block.rows == kFusedRows) {
    multiply_fused<kBits, 2>(w, x, stride, begin, end, out, scratch);
  } else {
    multiply_panel<kBits>(w, path, x, stride, block.rows, begin, end, out, scratch);
  }
}

// --- int8 mode ----------------------------------------------------------------------------------

inline __m256i load_256(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

// Where 64 codes come from: packed, or a panel of bytes in byte_order().
template <int kBits>
struct PackedBytes {
  static Bytes get(const uint8_t* codes) { return load_bytes<kBits>(codes); }
};
struct PanelBytes {
  static Bytes get(const uint8_t* codes) { return {load_256(codes), load_256(codes + 32)}; }
};

// Eight int32 partial sums of 64 products. At most 15 * 127 * 4 in 16 bits: no saturation.
inline __m256i dot_bytes(const Bytes& codes, __m256i even, __m256i odd) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes.even, even),
                                         _mm256_maddubs_epi16(codes.odd, odd));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline __m256i dot_wide(const uint8_t* codes, const int16_t* q) {
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i code =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(code, load_256(q + 16 * i)));
  }
  return sum;
}

inline __m128i lane_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i quads = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
}

// Block b of row n of a tile: in place, or in a panel of bytes with `pitch` bytes a row.
struct CodeBlocks {
  const TileRows* rows;
  const uint8_t* panel;
  int64_t pitch;

  const uint8_t* at(int64_t n, int64_t b, int bytes) const {
    return panel != nullptr ? panel + n * pitch + b * kBlock : rows->block(n, b, bytes);
  }
};

// Group sums of q (multiplier code - zero), their product with the scales, in ascending order.
// q_sum: per row of x and group the sum of q; zero: kMagic + zero per row of W and group.
template <typename Source, int kBits, int kRows>
inline void integer_blocks(const CodeBlocks& codes, const double* scale, const float* zero,
                           int64_t groups, int64_t per_group, int64_t blocks, const void* q,
                           int64_t stride, const int32_t* q_sum, __m256d* total) {
  constexpr int kStep = kBits == 8 ? 2 : 1;  // bytes an activation takes
  const auto* x = static_cast<const char*>(q);
  for (int64_t g = 0, b = 0; g < groups; ++g) {
    const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
    __m256i sum[kRows][kTile];
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kTile; ++n) sum[m][n] = _mm256_setzero_si256();
    }
    for (; b < stop; ++b) {
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
        const uint8_t* block = codes.at(n, b, 8 * kBits);
        if constexpr (kBits == 8) {
          for (int m = 0; m < kRows; ++m) {
            const char* row = x + (m * stride + b * kBlock) * kStep;
            sum[m][n] =
                _mm256_add_epi32(sum[m][n], dot_wide(block, reinterpret_cast<const int16_t*>(row)));
          }
        } else {
          const Bytes bytes = Source::get(block);
          for (int m = 0; m < kRows; ++m) {
            const char* row = x + m * stride + b * kBlock;
            sum[m][n] =
                _mm256_add_epi32(sum[m][n], dot_bytes(bytes, load_256(row), load_256(row + 32)));
          }
        }
      }
    }
    const __m128 zeros =
        _mm_setr_ps(zero[g], zero[groups + g], zero[2 * groups + g], zero[3 * groups + g]);
    const __m128i offset = _mm_cvtps_epi32(_mm_sub_ps(zeros, _mm_set1_ps(kMagic)));
    const __m256d scales = _mm256_loadu_pd(scale + g * kTile);
    for (int m = 0; m < kRows; ++m) {
      __m128i products = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      if constexpr (kBits == 1) products = _mm_add_epi32(products, products);
      const __m128i all = _mm_set1_epi32(q_sum[m * groups + g]);
      const __m128i exact = _mm_sub_epi32(products, _mm_mullo_epi32(offset, all));
      // 46 bits: the product is exact, so a fused add rounds like a separate one.
      total[m] = _mm256_fmadd_pd(_mm256_cvtepi32_pd(exact), scales, total[m]);
    }
  }
}

// Prepared int8 rows of the block path: q in byte_order (int16 in plain order at 8 bits), then the
// sums of q per row and group.
struct IntegerRows {
  char* q;
  int32_t* q_sum;
  int64_t stride;  // activations a row
  int64_t step;    // bytes an activation takes

  IntegerRows(void* data, const PackedMatrix& w, int64_t rows)
      : q(static_cast<char*>(data)), stride(blocks_of(w) * kBlock), step(bits_of(w) == 8 ? 2 : 1) {
    q_sum = reinterpret_cast<int32_t*>(q + rows * stride * step);
  }
};

template <typename Source, int kBits>
void integer_tile(const PackedMatrix& w, const CodeBlocks& codes, const Scratch& scratch,
                  const IntegerRows& x, const Block& block, int64_t from, int64_t to, int64_t first,
                  int64_t end, const Output& out, int64_t tile) {
  const int64_t groups = groups_of(w);
  const double* scale = scratch.group_scale + tile * kTile * groups;
  const float* zero = scratch.group_zero + tile * kTile * groups;
  for (int64_t m = from; m < to; m += 2) {
    const int count = to - m > 1 ? 2 : 1;
    __m256d total[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    const char* q = x.q + m * x.stride * x.step;
    if (count == 2) {
      integer_blocks<Source, kBits, 2>(codes, scale, zero, groups, group_blocks(w), blocks_of(w), q,
                                       x.stride, x.q_sum + m * groups, total);
    } else {
      integer_blocks<Source, kBits, 1>(codes, scale, zero, groups, group_blocks(w), blocks_of(w), q,
                                       x.stride, x.q_sum + m * groups, total);
    }
    for (int i = 0; i < count; ++i) {
      double value[kTile];
      _mm256_storeu_pd(value, total[i]);
      for (int64_t n = 0; n < kTile && first + n < end; ++n) {
        store(out, m + i, first + n, value[n] * block.step[m + i]);
      }
    }
  }
}

template <int kBits>
void unpack_tile(const TileRows& rows, int64_t blocks, uint8_t* panel) {
  for (int64_t n = 0; n < kTile; ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* out = panel + (n * blocks + b) * kBlock;
      const Bytes bytes = load_bytes<kBits>(rows.block(n, b, 8 * kBits));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes.even);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), bytes.odd);
    }
  }
}

template <int kBits>
void multiply_integer_blocks(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const IntegerRows x(const_cast<void*>(block.data), w, block.rows);
  const int64_t blocks = blocks_of(w), groups = groups_of(w), pitch = blocks * kBlock;
  const bool in_place = kBits == 8 || block.rows <= kFusedRows;
  const int64_t width = kIntegerTiles * kTile;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = end - first < width ? end - first : width;
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      load_tile(w, first + t * kTile, scratch.expanded + t * kTile * expanded_row_bytes(w),
                scratch.rows + t);
      load_group_scales(w, first + t * kTile, scratch.group_scale + t * kTile * groups,
                        scratch.group_zero + t * kTile * groups);
      if constexpr (kBits < 8) {
        if (!in_place)
          unpack_tile<kBits>(scratch.rows[t], blocks, scratch.bytes + t * kTile * pitch);
      }
    }
    for (int64_t m = 0; m < block.rows; m += 2) {
      const int64_t stop = block.rows - m < 2 ? block.rows : m + 2;
      for (int64_t t = 0; t < tiles; ++t) {
        const CodeBlocks codes{scratch.rows + t,
                               in_place ? nullptr : scratch.bytes + t * kTile * pitch, pitch};
        if (in_place) {
          integer_tile<PackedBytes<kBits>, kBits>(w, codes, scratch, x, block, m, stop,
                                                  first + t * kTile, end, out, t);
        } else {
          integer_tile<PanelBytes, kBits>(w, codes, scratch, x, block, m, stop, first + t * kTile,
                                          end, out, t);
        }
      }
    }
  }
}

int32_t integer_dot(const int16_t* a, const int16_t* b, int64_t count) {
  __m256i sum = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(load_256(a + k), load_256(b + k)));
  }
  const __m256i zero = _mm256_setzero_si256();
  int32_t total = _mm_cvtsi128_si32(lane_sums(sum, zero, zero, zero));
  for (; k < count; ++k) total += a[k] * b[k];
  return total;
}

// Groups that are not whole blocks: one row of W as int16, each group a short integer product.
void multiply_integer_groups(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const auto* q = static_cast<const int16_t*>(block.data);
  for (int64_t n = begin; n < end; ++n) {
    integer_row(w, n, scratch.integers);
    const int64_t scales = scale_row(w, n);
    for (int64_t m = 0; m < block.rows; ++m) {
      double total = 0.0;
      for (int64_t from = 0, group = 0; from < w.cols; ++group) {
        const int64_t stop = w.cols - from < w.group_size ? w.cols : from + w.group_size;
        const double scale = load_float(w.scale, scales + group, w.scale_type);
        while (from < stop) {
          const int64_t to = stop - from < kMaxIntegerRun ? stop : from + kMaxIntegerRun;
          total += scale * integer_dot(q + m * w.cols + from, scratch.integers + from, to - from);
          from = to;
        }
      }
      store(out, m, n, total * block.step[m]);
    }
  }
}

// Groups along the rows of W: double sums of the exact products q * weight.
template <int kBits>
void multiply_double_columns(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const auto* x = static_cast<const float*>(block.data);
  const int64_t blocks = blocks_of(w), stride = blocks * kBlock;
  int64_t loaded[kPanelTiles * kTile];
  for (int64_t& slot : loaded) slot = -1;
  for (int64_t first = begin; first < end; first += kTile) {
    const float *scale[kTile], *zero[kTile];
    load_tile(w, first, scratch.expanded, scratch.rows);
    tile_column_scales(w, first, 0, loaded, scratch, scale, zero);
    decode_scaled<kBits>(*scratch.rows, scale, zero, 0, blocks, scratch.panel);
    for (int64_t m = 0; m < block.rows; ++m) {
      __m256d low[kTile], high[kTile];
      for (int n = 0; n < kTile; ++n) low[n] = high[n] = _mm256_setzero_pd();
      for (int64_t s = 0; s < blocks * 8; ++s) {
        const __m256d x_low = _mm256_cvtps_pd(_mm_loadu_ps(x + m * stride + s * 8));
        const __m256d x_high = _mm256_cvtps_pd(_mm_loadu_ps(x + m * stride + s * 8 + 4));
#pragma GCC unroll 4
        for (int n = 0; n < kTile; ++n) {
          const float* weight = scratch.panel + (s * kTile + n) * 8;
          low[n] = _mm256_fmadd_pd(x_low, _mm256_cvtps_pd(_mm_loadu_ps(weight)), low[n]);
          high[n] = _mm256_fmadd_pd(x_high, _mm256_cvtps_pd(_mm_loadu_ps(weight + 4)), high[n]);
        }
      }
      for (int64_t n = 0; n < kTile && first + n < end; ++n) {
        double lane[8];
        _mm256_storeu_pd(lane, low[n]);
        _mm256_storeu_pd(lane + 4, high[n]);
        const double total = ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
                             ((lane[4] + lane[5]) + (lane[6] + lane[7]));
        store(out, m, first + n, total * block.step[m]);
      }
    }
  }
}

// --- preparation of x
// -----------------------------------------------------------------------------

// Plain order to block order; columns past the end get 0.
void to_block_order(const float* row, int64_t cols, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < 8; ++i) {
      for (int64_t j = 0; j < 8; ++j) {
        const int64_t k = b * kBlock + 8 * i + j;
        out[b * kBlock + j * 8 + i] = k < cols ? row[k] : 0.0f;
      }
    }
  }
}

void prepare_integer_row(const PackedMatrix& w, const int8_t* q, int64_t m, const IntegerRows& x) {
  const int bits = bits_of(w);
  const int64_t groups = groups_of(w), columns = x.stride;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t from = g * w.group_size;
    const int64_t to = w.cols - from < w.group_size ? w.cols : from + w.group_size;
    int32_t sum = 0;
    for (int64_t k = from; k < to; ++k) sum += q[k];
    x.q_sum[m * groups + g] = sum;
  }
  if (bits == 8) {
    auto* out = reinterpret_cast<int16_t*>(x.q) + m * x.stride;
    for (int64_t k = 0; k < columns; ++k) out[k] = k < w.cols ? q[k] : int16_t{0};
    return;
  }
  uint8_t order[kBlock];
  for (int p = 0; p < kBlock; ++p) order[p] = static_cast<uint8_t>(byte_order(bits, p));
  char* out = x.q + m * x.stride;
  for (int64_t b = 0; b < columns; b += kBlock) {
    for (int64_t p = 0; p < kBlock; ++p) {
      const int64_t k = b + order[p];
      out[b + p] = k < w.cols ? q[k] : char{0};
    }
  }
}

void load_row(const Activations& x, int64_t row, int64_t cols, float* out) {
  if (x.type == FloatType::kFloat32) {
    __builtin_memcpy(out, static_cast<const float*>(x.data) + row * cols,
                     static_cast<size_t>(cols) * sizeof(float));
    return;
  }
  const int64_t from = row * cols;
  for (int64_t k = 0; k < cols; ++k) out[k] = load_float(x.data, from + k, x.type);
}

// --- the table
// ------------------------------------------------------------------------------------

int64_t prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t columns = blocks_of(w) * kBlock;
  switch (path_of(w, mode)) {
    case Path::kIntegerBlocks:
      return rows * (columns * (bits_of(w) == 8 ? 2 : 1) +
                     groups_of(w) * static_cast<int64_t>(sizeof(int32_t)));
    case Path::kIntegerGroups:
      return rows * w.cols * static_cast<int64_t>(sizeof(int16_t));
    default:
      return rows * columns * static_cast<int64_t>(sizeof(float));
  }
}

int64_t scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t prepare = blocks_of(w) * kBlock * 5 + 64;  // one row as floats and as bytes
  const int64_t multiply = Scratch(nullptr, w, path_of(w, mode), rows).used;
  return prepare > multiply ? prepare : multiply;
}

void prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first, int64_t rows,
             void* prepared, double* step, void* scratch) {
  const Path path = path_of(w, mode);
  const int64_t blocks = blocks_of(w), columns = blocks * kBlock;
  auto* row = static_cast<float*>(scratch);
  auto* q = reinterpret_cast<int8_t*>(row + columns);
  for (int64_t m = 0; m < rows; ++m) {
    load_row(x, first + m, w.cols, row);
    if (mode == Mode::kInt8) {
      step[m] = activation_step(row, w.cols);
      quantize_activations(row, w.cols, step[m], q);
    }
    if (path == Path::kIntegerBlocks) {
      prepare_integer_row(w, q, m, IntegerRows(prepared, w, rows));
    } else if (path == Path::kIntegerGroups) {
      auto* out = static_cast<int16_t*>(prepared) + m * w.cols;
      for (int64_t k = 0; k < w.cols; ++k) out[k] = q[k];
    } else {
      if (path == Path::kDoubleColumns) {
        for (int64_t k = 0; k < w.cols; ++k) row[k] = q[k];
      }
      to_block_order(row, w.cols, blocks, static_cast<float*>(prepared) + m * columns);
    }
  }
}

template <int kBits>
void multiply_bits(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* memory) {
  const Path path = path_of(w, mode);
  const Scratch scratch(memory, w, path, block.rows);
  switch (path) {
    case Path::kBlocks:
    case Path::kScaled:
      return multiply_exact<kBits>(w, path, block, begin, end, out, scratch);
    case Path::kIntegerBlocks:
      return multiply_integer_blocks<kBits>(w, block, begin, end, out, scratch);
    case Path::kIntegerGroups:
      return multiply_integer_groups(w, block, begin, end, out, scratch);
    case Path::kDoubleColumns:
      return multiply_double_columns<kBits>(w, block, begin, end, out, scratch);
  }
}

void multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
              const Output& out, void* scratch) {
  switch (bits_of(w)) {
    case 1:
      return multiply_bits<1>(w, mode, block, begin, end, out, scratch);
    case 2:
      return multiply_bits<2>(w, mode, block, begin, end, out, scratch);
    case 3:
      return multiply_bits<3>(w, mode, block, begin, end, out, scratch);
    case 4:
      return multiply_bits<4>(w, mode, block, begin, end, out, scratch);
    default:
      return multiply_bits<8>(w, mode, block, begin, end, out, scratch);
  }
}

constexpr MatmulKernels kKernels = {prepared_bytes, scratch_bytes, prepare,
                                    multiply,       nullptr,       kTile};

}  // namespace

const MatmulKernels* avx2_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
