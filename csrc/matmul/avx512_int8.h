// Included by avx512.cpp alone: the product with activations rounded to 8 bits, for groups of whole
// blocks, on the dot-product instruction of AVX-512 VNNI (unsigned codes times signed x).
//
// One or two rows of x: codes are unpacked in registers and used once; 16 sums over lanes are taken
// together. More rows: 32 rows of W are unpacked into a panel whose register holds 4 columns of 16
// rows, so that sums need no lanes added; x is broadcast, 8 rows at a time:
//
//   panel   block 0, columns 0..3: rows 0..15, rows 16..31; columns 4..7: ...     64 bytes each
//
// Both give the integer sums and the double epilogue of matmul.h, hence the same bits.
#pragma once

#include "matmul/avx2_tile.h"
#include "matmul/avx512_decode.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kWideTiles = 2;        // of 16 rows of W in a panel
constexpr int64_t kWideBlocks = 8;       // 512 columns: 16 KiB of panel stay in L1
constexpr int64_t kWideRows = 8;         // rows of x at a time: 16 accumulators
constexpr int64_t kUnpackedInPlace = 2;  // rows of x up to which no panel is made

// Prepared x: rows of bytes in wide_order(), then the sums per row and group.
struct WideRows {
  int8_t* q;
  int32_t* q_sum;
  int64_t stride;

  WideRows(void* data, const PackedMatrix& w, int64_t rows)
      : q(static_cast<int8_t*>(data)), stride(blocks_of(w) * kBlock) {
    q_sum = reinterpret_cast<int32_t*>(q + rows * stride);
  }
  static int64_t bytes(const PackedMatrix& w, int64_t rows) {
    return rows * (blocks_of(w) * kBlock + groups_of(w) * static_cast<int64_t>(sizeof(int32_t)));
  }
};

int64_t wide_chunk(const PackedMatrix& w) {  // blocks of a panel: whole groups
  const int64_t group = group_blocks(w);
  if (group == 0) return 1;  // no columns
  return group >= kWideBlocks ? group : kWideBlocks / group * group;
}

struct WideScratch {
  uint8_t* expanded;
  TileRows* rows;  // of four rows of W each
  float* scale;    // per group, for each lane of each tile
  int32_t* zero;
  int32_t* q_lane;  // per group, sums of x for each lane
  uint8_t* panel;
  double* total;  // (rows of x, 32)
  int64_t used;

  WideScratch(void* memory, const PackedMatrix& w, int64_t rows_of_x) {
    Arena arena{static_cast<char*>(memory)};
    const int64_t width = kWideTiles * kLanes, groups = groups_of(w);
    expanded = arena.take<uint8_t>(width * expanded_row_bytes(w));
    rows = arena.take<TileRows>(width / kTile);
    scale = arena.take<float>(width * groups);
    zero = arena.take<int32_t>(width * groups);
    q_lane = arena.take<int32_t>(kLanes * groups);
    panel = arena.take<uint8_t>(width * wide_chunk(w) * kBlock);
    total = arena.take<double>(rows_of_x * width);
    used = arena.used;
  }
};

// Rows [first, first + count) of W, count a multiple of four, and their scales and zeros, group by
// group: lane c * count + i of a group's lanes belongs to row first + i. Zeros of a symmetric
// weight are written for the first rows of a call only (`fresh`).
void load_wide(const PackedMatrix& w, int64_t first, int64_t count, int64_t copies, bool fresh,
               const WideScratch& s) {
  constexpr int64_t kChunk = 64;
  const int64_t groups = groups_of(w), width = count * copies;
  PackedMatrix codes = w;  // entries of a codebook are looked up in registers
  codes.codebook = nullptr;
  for (int64_t t = 0; t < count / kTile; ++t) {
    load_tile(codes, first + t * kTile, s.expanded + t * kTile * expanded_row_bytes(w), s.rows + t);
  }
  if (fresh && w.zero == nullptr) {
    const int zero = symmetric_zero(w);
    for (int64_t i = 0; i < groups * width; ++i) s.zero[i] = zero;
  }
  float row[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    const int64_t from = scale_row(w, n);
    for (int64_t g = 0; g < groups; g += kChunk) {
      const int64_t some = groups - g < kChunk ? groups - g : kChunk;
      load_scales(w, from + g, some, row);
      for (int64_t lane = g * width + i; lane < g * width + width; lane += count) {
        for (int64_t j = 0; j < some; ++j) s.scale[lane + j * width] = row[j];
        if (w.zero == nullptr) continue;
        const uint8_t* zero = w.zero + from + g;
        for (int64_t j = 0; j < some; ++j) s.zero[lane + j * width] = zero[j];
      }
    }
  }
}

// 64 codes, or with kBook the entries of the codebook in `table` that they name.
template <int kBits, bool kBook>
inline __m512i wide_values(const uint8_t* codes, __m512i table) {
  const __m512i bytes = wide_bytes<kBits>(codes);
  return kBook ? _mm512_shuffle_epi8(table, bytes) : bytes;
}

__m512i codebook_table(const PackedMatrix& w) {
  uint8_t entries[16] = {};
  if (w.codebook != nullptr) {
    __builtin_memcpy(entries, w.codebook, static_cast<size_t>(w.levels));
  }
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}

// total += scale * (multiplier sums - zero q), all lanes; the products are exact.
template <bool kDouble>
inline void add_group(__m512i sums, const float* scale, const int32_t* zero, __m512i q,
                      __m512d* low, __m512d* high) {
  if constexpr (kDouble) sums = _mm512_add_epi32(sums, sums);
  const __m512i offset = _mm512_mullo_epi32(_mm512_loadu_si512(zero), q);
  const __m512i exact = _mm512_sub_epi32(sums, offset);
  *low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(exact)),
                         _mm512_cvtps_pd(_mm256_loadu_ps(scale)), *low);
  *high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, 1)),
                          _mm512_cvtps_pd(_mm256_loadu_ps(scale + 8)), *high);
}

// --- one or two rows of x
// -------------------------------------------------------------------------

template <int kBits, bool kBook, int kRows>
void multiply_wide_rows(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                        int64_t end, const Output& out, const WideScratch& s) {
  constexpr int kWide = kLanes / kRows;  // rows of W at a time
  constexpr int kBytes = 8 * kBits;
  const __m512i table = codebook_table(w);
  const int64_t groups = groups_of(w), per_group = group_blocks(w), blocks = blocks_of(w);
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      s.q_lane[g * kLanes + lane] = x.q_sum[lane / kWide * groups + g];
    }
  }
  for (int64_t first = begin; first < end; first += kWide) {
    load_wide(w, first, kWide, kRows, first == begin, s);
    const uint8_t* row[kWide];
    for (int i = 0; i < kWide; ++i) row[i] = s.rows[i / kTile].row[i % kTile];
    const int64_t whole = s.rows[0].whole;
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t g = 0, b = 0; g < groups; ++g) {
      const int64_t stop = blocks - b < per_group ? blocks : b + per_group;
      __m512i sum[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = _mm512_setzero_si512();
      for (; b < stop; ++b) {
        __m512i q[kRows];
        for (int m = 0; m < kRows; ++m) q[m] = _mm512_loadu_si512(x.q + m * x.stride + b * kBlock);
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) {
          const uint8_t* at = b < whole ? row[i] + b * kBytes : s.rows[i / kTile].tail[i % kTile];
          const __m512i codes = wide_values<kBits, kBook>(at, table);
          // The same block of the next rows, as in avx2_exact.h.
          _mm_prefetch(reinterpret_cast<const char*>(row[i] + kWide * row_bytes + b * kBytes),
                       _MM_HINT_T0);
#pragma GCC unroll 2
          for (int m = 0; m < kRows; ++m) {
            sum[m * kWide + i] = _mm512_dpbusd_epi32(sum[m * kWide + i], codes, q[m]);
          }
        }
      }
      add_group<kBits == 1 && !kBook>(sums_of_16(sum), s.scale + g * kLanes, s.zero + g * kLanes,
                                      _mm512_loadu_si512(s.q_lane + g * kLanes), &low, &high);
    }
    double value[kLanes];
    _mm512_storeu_pd(value, low);
    _mm512_storeu_pd(value + 8, high);
    for (int m = 0; m < kRows; ++m) {
      for (int64_t i = 0; i < kWide && first + i < end; ++i) {
        store_result(out, m, first + i, value[m * kWide + i], block.step[m]);
      }
    }
  }
}

// --- many rows of x
// -------------------------------------------------------------------------------

// Blocks [from, to) of 32 rows of W to the panel.
template <int kBits, bool kBook>
void unpack_wide(const WideScratch& s, __m512i table, int64_t from, int64_t to) {
  for (int64_t b = from; b < to; ++b) {
    for (int64_t t = 0; t < kWideTiles; ++t) {
      __m512i v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = wide_values<kBits, kBook>(s.rows[t * 4 + i / kTile].block(i % kTile, b, 8 * kBits),
                                         table);
      }
      transpose_16(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        uint8_t* out = s.panel + (((b - from) * kLanes + j) * kWideTiles + t) * kBlock;
        _mm512_storeu_si512(out, v[j]);
      }
    }
  }
}

// kRows rows of x from row m on, times the panel of blocks [from, to), onto their totals.
template <int kBits, bool kBook, int kRows>
void panel_wide(const PackedMatrix& w, const WideRows& x, int64_t m, int64_t from, int64_t to,
                const WideScratch& s) {
  constexpr int64_t kWidth = kWideTiles * kLanes;
  const int64_t groups = groups_of(w), per_group = group_blocks(w);
  for (int64_t b = from; b < to;) {
    const int64_t g = b / per_group;
    const int64_t stop = to - b < per_group ? to : b + per_group;
    __m512i sum[kRows][kWideTiles];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    }
    const uint8_t* panel = s.panel + (b - from) * kLanes * kWideTiles * kBlock;
    const int8_t* q = x.q + m * x.stride + b * kBlock;
    for (int64_t j = 0; j < (stop - b) * kLanes; ++j, panel += kWideTiles * kBlock, q += 4) {
      const __m512i left = _mm512_loadu_si512(panel);
      const __m512i right = _mm512_loadu_si512(panel + kBlock);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, q + i * x.stride, sizeof(four));
        const __m512i value = _mm512_set1_epi32(four);
        sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], left, value);
        sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], right, value);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i all = _mm512_set1_epi32(x.q_sum[(m + i) * groups + g]);
#pragma GCC unroll 2
      for (int t = 0; t < kWideTiles; ++t) {
        double* total = s.total + (m + i) * kWidth + t * kLanes;
        __m512d low = _mm512_loadu_pd(total), high = _mm512_loadu_pd(total + 8);
        const int64_t at = g * kWidth + t * kLanes;
        add_group<kBits == 1 && !kBook>(sum[i][t], s.scale + at, s.zero + at, all, &low, &high);
        _mm512_storeu_pd(total, low);
        _mm512_storeu_pd(total + 8, high);
      }
    }
    b = stop;
  }
}

// 16 results of row m from row n of W on, as store_result() would; floats without a remainder.
void store_16(const Output& out, int64_t m, int64_t n, const double* total, double step) {
  auto* y = static_cast<float*>(out.data) + (out.row + m) * out.stride + n - out.first;
  for (int i = 0; i < 16; i += 8) {
    __m512d value = _mm512_loadu_pd(total + i);
    if (out.row_scale != nullptr) {
      value = _mm512_mul_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n + i)));
    }
    value = _mm512_mul_pd(value, _mm512_set1_pd(step));
    if (out.bias != nullptr) {
      value = _mm512_add_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n + i)));
    }
    _mm256_storeu_ps(y + i, _mm512_cvtpd_ps(value));
  }
}

template <int kBits, bool kBook>
void multiply_wide_panel(const PackedMatrix& w, const WideRows& x, const Block& block,
                         int64_t begin, int64_t end, const Output& out, const WideScratch& s) {
  constexpr int64_t kWidth = kWideTiles * kLanes;
  const int64_t blocks = blocks_of(w), chunk = wide_chunk(w), rows = block.rows;
  const __m512i table = codebook_table(w);
  const bool plain = out.type == FloatType::kFloat32 && out.remainder == nullptr;
  for (int64_t first = begin; first < end; first += kWidth) {
    load_wide(w, first, kWidth, 1, first == begin, s);
    __builtin_memset(s.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += chunk) {
      const int64_t to = blocks - from < chunk ? blocks : from + chunk;
      unpack_wide<kBits, kBook>(s, table, from, to);
      int64_t m = 0;
      for (; m + kWideRows <= rows; m += kWideRows)
        panel_wide<kBits, kBook, 8>(w, x, m, from, to, s);
      for (; m + 4 <= rows; m += 4) panel_wide<kBits, kBook, 4>(w, x, m, from, to, s);
      for (; m < rows; ++m) panel_wide<kBits, kBook, 1>(w, x, m, from, to, s);
    }
    const int64_t count = end - first < kWidth ? end - first : kWidth;
    for (int64_t m = 0; m < rows; ++m) {
      const double* total = s.total + m * kWidth;
      int64_t i = 0;
      for (; plain && i + kLanes <= count; i += kLanes) {
        store_16(out, m, first + i, total + i, block.step[m]);
      }
      for (; i < count; ++i) store_result(out, m, first + i, total[i], block.step[m]);
    }
  }
}

template <int kBits, bool kBook>
void multiply_wide(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* memory) {
  const WideRows x(const_cast<void*>(block.data), w, block.rows);
  const WideScratch scratch(memory, w, block.rows);
  if (block.rows == 1) {
    multiply_wide_rows<kBits, kBook, 1>(w, x, block, begin, end, out, scratch);
  } else if (block.rows == kUnpackedInPlace) {
    multiply_wide_rows<kBits, kBook, 2>(w, x, block, begin, end, out, scratch);
  } else {
    multiply_wide_panel<kBits, kBook>(w, x, block, begin, end, out, scratch);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
