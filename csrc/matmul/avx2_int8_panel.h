// Included by avx2_paths.h alone: many rows of x rounded to 8 bits, groups of whole blocks. 16 rows
// of W are unpacked once into a panel in which a lane is a row, so that no lanes are added up and x
// is broadcast, against four rows of x at a time:
//
//   panel     step 0 of rows 0..7 | step 0 of rows 8..15 | step 1 of rows 0..7 | ...  32 bytes each
//   a step    four columns as bytes, in the order of byte_order(); at 8 bits two, as words
//
// Pairs of products stay in 16 bits for as many steps as cannot overflow them.
#pragma once

#include "matmul/avx2_int8.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kLaneRows = 8;          // rows of W in a register
constexpr int64_t kLaneHalves = 2;        // registers of a step
constexpr int64_t kTogether = 4;          // rows of x
constexpr int64_t kNearPanel = 16 << 10;  // bytes of it that all rows of x meet before the next
constexpr int64_t kPanelWidth = kLaneRows * kLaneHalves;
static_assert(kPanelWidth == kIntegerTiles * kTile, "the panel holds the tiles of a product");

// Steps of a block, and steps whose pairs of products fit in 16 bits: at most 8 * 2 * 127 * 15, or
// 16 * 2 * 127 * 7.
template <int kBits>
constexpr int64_t kBlockSteps = kBits == 8 ? 32 : 16;
template <int kBits>
constexpr int kShortSteps = kBits == 4 ? 8 : 16;

// Lane i of each of eight registers to register i.
inline void transpose_lanes(__m256i* v) {
  __m256i pair[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    pair[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
    four[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
    four[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    four[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
  }
}

// Eight steps of eight rows.
inline void store_steps(__m256i* rows, uint8_t* out) {
  transpose_lanes(rows);
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + s * kLaneHalves * 32), rows[s]);
  }
}

// Block b of the eight rows of two tiles, whose steps lie from `out` on.
template <int kBits>
inline void unpack_panel_block(const TileRows* tiles, int64_t b, uint8_t* out) {
  constexpr int64_t kEight = 8 * kLaneHalves * 32;  // bytes of eight steps
  __m256i row[2][kLaneRows];
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i, out += kEight) {
      for (int n = 0; n < kLaneRows; ++n) {
        const uint8_t* codes = tiles[n / kTile].block(n % kTile, b, 8 * kBits) + 16 * i;
        row[0][n] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      }
      store_steps(row[0], out);
    }
  } else {
    for (int n = 0; n < kLaneRows; ++n) {
      const Bytes bytes = load_bytes<kBits>(tiles[n / kTile].block(n % kTile, b, 8 * kBits));
      row[0][n] = bytes.even;
      row[1][n] = bytes.odd;
    }
    store_steps(row[0], out);
    store_steps(row[1], out + kEight);
  }
}

// Zeros of every group for the 16 lanes.
inline void load_lane_zeros(const PackedMatrix& w, const Scratch& scratch) {
  const int64_t groups = groups_of(w);
  for (int64_t n = 0; n < kPanelWidth; ++n) {
    const float* zero = scratch.group_zero + n * groups;
    for (int64_t g = 0; g < groups; ++g) {
      scratch.lane_zero[g * kPanelWidth + n] = static_cast<int32_t>(zero[g] - kMagic);
    }
  }
}

// x, four bytes of a row, to all lanes.
inline __m256i broadcast_step(const char* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Where gcc 12 may not add in another order: it took all products of a run before the first sum
// otherwise, and left them in memory.
inline __m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// Sums of `steps` steps of a panel and kRows rows of x.
template <int kBits, int kRows>
inline void panel_sums(const uint8_t* panel, int64_t steps, const char* x, int64_t stride,
                       __m256i (*sum)[kLaneHalves]) {
  for (int m = 0; m < kRows; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  if constexpr (kBits == 8) {
    for (int64_t s = 0; s < steps; ++s, panel += 64) {
      const __m256i a = load_256(panel), b = load_256(panel + 32);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m256i q = broadcast_step(x + m * stride + 4 * s);
        sum[m][0] = in_order(_mm256_add_epi32(sum[m][0], _mm256_madd_epi16(a, q)));
        sum[m][1] = in_order(_mm256_add_epi32(sum[m][1], _mm256_madd_epi16(b, q)));
      }
    }
    return;
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t s = 0; s < steps;) {
    __m256i pairs[kRows][kLaneHalves];
    for (int m = 0; m < kRows; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
    const int64_t left = steps - s, some = left < kShortSteps<kBits> ? left : kShortSteps<kBits>;
#pragma GCC unroll 1
    for (const int64_t stop = s + some; s < stop; ++s, panel += 64) {
      const __m256i a = load_256(panel), b = load_256(panel + 32);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m256i q = broadcast_step(x + m * stride + 4 * s);
        pairs[m][0] = in_order(_mm256_add_epi16(pairs[m][0], _mm256_maddubs_epi16(a, q)));
        pairs[m][1] = in_order(_mm256_add_epi16(pairs[m][1], _mm256_maddubs_epi16(b, q)));
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kLaneHalves; ++v) {
        sum[m][v] = _mm256_add_epi32(sum[m][v], _mm256_madd_epi16(pairs[m][v], ones));
      }
    }
  }
}

// Rows of x as panels meet them, four bytes a step.
struct StepRows {
  const char* q;
  const int32_t* q_sum;  // (rows, groups)
  int64_t row_bytes;
};

// What some rows of x meet: the groups [from, to) of a panel.
struct PanelRun {
  const Scratch* scratch;
  int64_t groups;       // of a row
  int64_t group_steps;  // of all groups but the last
  int64_t steps;        // of a row
  int64_t from, to;
};

// totals of rows [m, m + kRows) += scale * (sums - zero * sum of q), in the order and to the bits
// of integer_blocks().
template <int kBits, int kRows>
void add_panel_groups(const PanelRun& run, const StepRows& x, int64_t m) {
  double* total = run.scratch->total + m * kPanelWidth;
  for (int64_t g = run.from; g < run.to; ++g) {
    const int64_t at = g * run.group_steps, left = run.steps - at;
    const int64_t steps = left < run.group_steps ? left : run.group_steps;
    __m256i sum[kRows][kLaneHalves];
    panel_sums<kBits, kRows>(run.scratch->bytes + 64 * at, steps, x.q + m * x.row_bytes + 4 * at,
                             x.row_bytes, sum);
    for (int i = 0; i < kRows; ++i) {
      const __m256i all = _mm256_set1_epi32(x.q_sum[(m + i) * run.groups + g]);
      for (int v = 0; v < kLaneHalves; ++v) {
        const __m256i zero = load_256(run.scratch->lane_zero + g * kPanelWidth + kLaneRows * v);
        __m256i products = sum[i][v];
        if constexpr (kBits == 1) products = _mm256_add_epi32(products, products);
        const __m256i exact = _mm256_sub_epi32(products, _mm256_mullo_epi32(zero, all));
        const __m128i half[2] = {_mm256_castsi256_si128(exact), _mm256_extracti128_si256(exact, 1)};
        for (int h = 0; h < 2; ++h) {
          const int64_t tile = 2 * v + h;
          double* to = total + i * kPanelWidth + tile * kTile;
          const double* scale = run.scratch->group_scale + (tile * run.groups + g) * kTile;
          _mm256_store_pd(to, _mm256_fmadd_pd(_mm256_cvtepi32_pd(half[h]), _mm256_loadu_pd(scale),
                                              _mm256_load_pd(to)));
        }
      }
    }
  }
}

// All rows of x against a panel, some groups of it at a time.
template <int kBits>
void add_panel_rows(PanelRun run, const StepRows& x, int64_t rows) {
  const int64_t some = kNearPanel / (64 * (run.group_steps > 0 ? run.group_steps : 1));
  const int64_t chunk = some > 0 ? some : 1;
  for (run.from = 0; run.from < run.groups; run.from = run.to) {
    run.to = run.groups - run.from < chunk ? run.groups : run.from + chunk;
    int64_t m = 0;
    for (; m + kTogether <= rows; m += kTogether) add_panel_groups<kBits, kTogether>(run, x, m);
    for (; m + 2 <= rows; m += 2) add_panel_groups<kBits, 2>(run, x, m);
    if (m < rows) add_panel_groups<kBits, 1>(run, x, m);
  }
}

// store_result() of 16 float32 results.
inline void store_panel_row(const Output& out, int64_t m, int64_t n, const double* total,
                            double step) {
  float* to = static_cast<float*>(out.data) + (out.row + m) * out.stride + n - out.first;
  for (int i = 0; i < kPanelWidth; i += kTile) {
    __m256d value = _mm256_load_pd(total + i);
    if (out.row_scale != nullptr) {
      value = _mm256_mul_pd(value, _mm256_cvtps_pd(_mm_loadu_ps(out.row_scale + n + i)));
    }
    value = _mm256_mul_pd(value, _mm256_set1_pd(step));
    if (out.bias != nullptr) {
      value = _mm256_add_pd(value, _mm256_cvtps_pd(_mm_loadu_ps(out.bias + n + i)));
    }
    _mm_storeu_ps(to + i, _mm256_cvtpd_ps(value));
  }
}

void store_panel(const Output& out, const Block& block, int64_t first, int64_t end,
                 const double* total) {
  const int64_t count = end - first < kPanelWidth ? end - first : kPanelWidth;
  const bool plain = count == kPanelWidth && out.remainder == nullptr;
  for (int64_t m = 0; m < block.rows; ++m, total += kPanelWidth) {
    if (plain && out.type == FloatType::kFloat32) {
      store_panel_row(out, m, first, total, block.step[m]);
      continue;
    }
    for (int64_t n = 0; n < count; ++n) {
      store_result(out, m, first + n, total[n], block.step[m]);
    }
  }
}

// Scales and zeros of the 16 rows of W from `first` on; totals of 0.
inline void begin_panel(const PackedMatrix& w, int64_t first, int64_t rows,
                        const Scratch& scratch) {
  const int64_t groups = groups_of(w);
  for (int64_t t = 0; t < kIntegerTiles; ++t) {
    load_group_scales(w, first + t * kTile, scratch.group_scale + t * kTile * groups,
                      scratch.group_zero + t * kTile * groups);
  }
  load_lane_zeros(w, scratch);
  __builtin_memset(scratch.total, 0, static_cast<size_t>(rows * kPanelWidth) * sizeof(double));
}

template <int kBits>
void multiply_integer_panels(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const IntegerRows x(const_cast<void*>(block.data), w, block.rows);
  const StepRows rows{x.q, x.q_sum, x.stride * x.step};
  const int64_t blocks = blocks_of(w);
  const PanelRun run{
      &scratch, groups_of(w), group_blocks(w) * kBlockSteps<kBits>, blocks * kBlockSteps<kBits>, 0,
      0};
  for (int64_t first = begin; first < end; first += kPanelWidth) {
    begin_panel(w, first, block.rows, scratch);
    for (int64_t t = 0; t < kIntegerTiles; ++t) {
      load_tile(w, first + t * kTile, scratch.expanded + t * kTile * expanded_row_bytes(w),
                scratch.rows + t);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t v = 0; v < kLaneHalves; ++v) {
        uint8_t* at = scratch.bytes + 64 * b * kBlockSteps<kBits> + 32 * v;
        unpack_panel_block<kBits>(scratch.rows + 2 * v, b, at);
      }
    }
    add_panel_rows<kBits>(run, rows, block.rows);
    store_panel(out, block, first, end, scratch.total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
