// Included by avx512.cpp alone: one to four rows of x rounded to 8 bits. Codes are unpacked in
// registers and used at once; the sums over lanes of 16 pairs of a row of W and a row of x are
// taken together. This is bound by reading W where memory is the slower part.
#pragma once

#include "matmul/avx512_trits.h"

namespace pyrobust::matmul {
namespace {

// Some rows of W, at equal distances, against kRows rows of x: 16 sums, of two groups with one row
// (and 12 with three). Not 16 rows of W: rows of 4096 bytes fall into the same sets of the cache,
// which have 12 places; 8 bits took 311 us against 299 (4096 x 4096, Zen 5).
template <int kRows>
struct FewRows {
  static constexpr int kWide = kRows <= 2 ? 8 : 4;  // rows of W at a time
  static constexpr int kGroups = kRows == 1 ? 2 : 1;

  const uint8_t* base;  // of row 0 of W
  int64_t pitch;        // from one row to the next
  const TileRows* rows;
  const int8_t* q;
  int64_t stride;
  __m512i table;
  const int16_t* trits;  // of group 0 and row 0 of x
  int64_t trit_steps, row_trits, per_group;
};

// 4 bits: the bytes of a row of x that meet two blocks of W at once, to the order of nibble_pair().
inline void zip_pairs(const PackedMatrix& w, int8_t* row) {
  const int64_t whole = packed_row_bytes(w.cols, w.levels) / 32;
  const int64_t blocks = blocks_of(w), per_group = group_blocks(w);
  for (int64_t begin = 0; begin < blocks; begin += per_group) {
    const int64_t end = whole - begin < per_group ? whole : begin + per_group;
    for (int64_t b = begin; b + 2 <= end; b += 2) {
      int8_t *first = row + b * kBlock, *second = first + kBlock;
      const IntegerPair x = zip_halves(_mm512_loadu_si512(first), _mm512_loadu_si512(second));
      _mm512_storeu_si512(first, x.low);
      _mm512_storeu_si512(second, x.high);
    }
  }
}

// Blocks of a group of 128 columns, the usual one: without tails (kWhole) its code has no loops,
// which takes a tenth off one row of x at 4 bits.
constexpr int64_t kUsualBlocks = 2;

// sum[m * kWide + i] over blocks [b, stop) of row i of W and row m of x. Plain loops, since gcc 12
// keeps the sums in memory where lambdas or members take part.
template <int kBits, bool kBook, int kRows, bool kWhole>
__attribute__((always_inline)) inline void few_sums(const FewRows<kRows>& from, int64_t b,
                                                    int64_t stop,
                                                    __m512i (&sum)[kRows * FewRows<kRows>::kWide]) {
  constexpr int kWide = FewRows<kRows>::kWide, kBytes = 8 * width_of(kBits);
  constexpr int64_t kAhead = 512;  // bytes of each row
  if (kWhole) stop = b + kUsualBlocks;
  const int64_t whole = kWhole || stop < from.rows->whole ? stop : from.rows->whole;
  const int64_t pitch = from.pitch;
  // Past the end of its row, the same columns of the rows that come next.
  int64_t ahead = kAhead;
  if (b * kBytes + kAhead >= pitch) ahead += (kWide - 1) * pitch;
  const __m512i table = from.table;
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kWide; ++i) sum[i] = _mm512_setzero_si512();
  if constexpr (kBits == kFiveToAByte) {
    if (b == stop) return;
    const int64_t g = kWhole ? b / kUsualBlocks : b / from.per_group;
    const int64_t steps = kWhole ? 1 : from.trit_steps, at = b * kBlock / kTritsPerByte;
    const int64_t next = at + (at + kAhead >= pitch ? kAhead + (kWide - 1) * pitch : kAhead);
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(from.base + i * pitch + next), _MM_HINT_T0);
    }
    add_trits<kRows, kWide>(from.base, from.pitch, at, steps, from.trits + g * steps * kStepFactors,
                            from.row_trits, sum);
    return;
  }
  if constexpr (kBits == 4) {
    for (; b + 2 <= whole; b += 2) {
      __m512i low[kRows], high[kRows];
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const int8_t* at = from.q + m * from.stride + b * kBlock;
        low[m] = _mm512_loadu_si512(at);
        high[m] = _mm512_loadu_si512(at + kBlock);
      }
      const uint8_t* at = from.base + b * kBytes;
#pragma GCC unroll 16
      for (int i = 0; i < kWide; ++i, at += pitch) {
        const IntegerPair codes = nibble_pair<kBook>(at, table);
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          add_dots(sum[m * kWide + i], codes.low, low[m]);
          add_dots(sum[m * kWide + i], codes.high, high[m]);
        }
      }
    }
  }
  for (; b < stop; ++b) {
    __m512i x[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      x[m] = _mm512_loadu_si512(from.q + m * from.stride + b * kBlock);
    }
    const bool tail = !kWhole && b >= whole;
    const uint8_t* at = tail ? from.rows->tail[0] : from.base + b * kBytes;
    const int64_t step = tail ? kBlock : pitch;
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i, at += step) {
      if (i % kTile == 0 && tail) at = from.rows[i / kTile].tail[0];
      const __m512i codes = wide_values<kBits, kBook>(at, table);
      _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) add_dots(sum[m * kWide + i], codes, x[m]);
    }
  }
}

// sums_of_16() of one group or two; a second group that is not there has sums of 0.
template <int kBits, bool kBook, int kRows, bool kWhole>
__attribute__((always_inline)) inline __m512i lane_sums_of(const FewRows<kRows>& from, int64_t b,
                                                           int64_t per_group, int64_t blocks) {
  constexpr int kSums = kRows * FewRows<kRows>::kWide;
  const auto end_of = [&](int64_t at) { return blocks - at < per_group ? blocks : at + per_group; };
  __m512i sum[kLanes], part[kSums];
  few_sums<kBits, kBook, kRows, kWhole>(from, b, end_of(b), part);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = i < kSums ? part[i] : _mm512_setzero_si512();
  if constexpr (FewRows<kRows>::kGroups == 2) {
    const int64_t next = end_of(b);
    few_sums<kBits, kBook, kRows, kWhole>(from, next, end_of(next), part);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sum[kSums + i] = part[i];
  }
  // Eight products in each lane: at most 8 * 15 * 128, and twice that is below 2^15.
  constexpr bool kSmall = kWhole && kBits <= 4 && kBits != kFiveToAByte && !kBook;
  return sums_of_16<kSmall>(sum);
}

// The rows [first, first + count) of W, copied where W has fewer rows than a tile.
template <int kBits, bool kWhole, typename Rows>
void point_to_rows(const PackedMatrix& w, int64_t first, const WideScratch& s, Rows* rows) {
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  const bool in_place = kBits == kFiveToAByte || (kWhole && w.levels != kTernaryLevels);
  if (in_place && first + Rows::kWide <= w.rows) {
    rows->pitch = row_bytes;
    rows->base = code_row(w, first);
    return;
  }
  if (kBits == kFiveToAByte) {
    for (int i = 0; i < Rows::kWide && row_bytes > 0; ++i) {
      const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
      __builtin_memcpy(s.expanded + i * row_bytes, code_row(w, n), static_cast<size_t>(row_bytes));
    }
    rows->pitch = row_bytes;
    rows->base = s.expanded;
    return;
  }
  load_wide_codes(w, first, Rows::kWide, s);
  rows->pitch = w.levels == kTernaryLevels ? expanded_row_bytes(w) : row_bytes;
  rows->base = s.rows->row[0];
  if (first + Rows::kWide <= w.rows || w.levels == kTernaryLevels || row_bytes == 0) return;
  for (int i = 0; i < Rows::kWide; ++i) {
    __builtin_memcpy(s.expanded + i * row_bytes, s.rows[i / kTile].row[i % kTile],
                     static_cast<size_t>(row_bytes));
  }
  rows->base = s.expanded;
}

// total += scale * (sums - zero q) of two groups of eight rows, the earlier group first.
inline void add_two_groups(__m512i sums, const float* scale, const int32_t* zero, __m512i q,
                           bool second, __m512d* total) {
  __m512d low = *total, high = _mm512_setzero_pd();
  const __m512i offset = _mm512_mullo_epi32(_mm512_loadu_si512(zero), q);
  const __m512i exact = _mm512_sub_epi32(sums, offset);
  low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(exact)),
                        _mm512_cvtps_pd(_mm256_loadu_ps(scale)), low);
  high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, 1)),
                         _mm512_cvtps_pd(_mm256_loadu_ps(scale + 8)), low);
  *total = second ? high : low;
}

// Sums of x, and steps of 16-bit activations, for the lanes of every group.
template <int kRows>
void load_x_lanes(const WideRows& x, int64_t groups, int64_t width, const WideScratch& s) {
  constexpr int kWide = FewRows<kRows>::kWide;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t row = lane / kWide, m = row % x.rows, part = row / x.rows;
      s.q_lane[g * width + lane] = row < kRows ? x.q_sum[(m * x.parts + part) * groups + g] : 0;
    }
    for (int64_t lane = 0; x.parts == 2 && lane < kLanes / 2; ++lane) {
      s.step_lane[g * kLanes / 2 + lane] = x.step[lane / kWide * groups + g];
    }
  }
}

// kRows rows of bytes, of kRows / kParts rows of x.
template <int kBits, bool kBook, int kRows, int kParts, bool kWhole>
void multiply_few(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                  int64_t end, const Output& out, const WideScratch& s) {
  using Rows = FewRows<kRows>;
  constexpr int kWide = Rows::kWide, kStep = kLanes / Rows::kGroups;
  const int64_t groups = groups_of(w), per_group = group_blocks(w), blocks = blocks_of(w);
  load_x_lanes<kRows>(x, groups, kStep, s);
  Rows rows{nullptr,
            0,
            s.rows,
            x.q,
            x.stride,
            codebook_table(w),
            x.trits,
            x.trit_steps,
            groups * x.trit_steps * kStepFactors,
            per_group};
  for (int64_t next = begin; next < end; next += kWide) {
    // The last rows once more where fewer are left than a tile holds.
    const int64_t last = w.rows - kWide > 0 ? w.rows - kWide : 0;
    const int64_t first = next < last ? next : last;
    point_to_rows<kBits, kWhole>(w, first, s, &rows);
    load_lanes<kWide>(w, first, kStep, 0, next == begin, s);
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t g = 0, b = 0; g < groups; g += Rows::kGroups, b += Rows::kGroups * per_group) {
      __m512i sums = lane_sums_of<kBits, kBook, kRows, kWhole>(rows, b, per_group, blocks);
      if constexpr (kBits == 1 && !kBook) sums = _mm512_add_epi32(sums, sums);
      const float* scale = s.scale + g * kStep;
      const int32_t* zero = s.zero + g * kStep;
      const __m512i q = _mm512_loadu_si512(s.q_lane + g * kStep);
      if constexpr (kParts == 2) {
        add_parts(sums, scale, zero, q, s.step_lane + g * kLanes / 2, &low);
      } else if constexpr (Rows::kGroups == 2) {
        add_two_groups(sums, scale, zero, q, g + 1 < groups, &low);
      } else {
        add_group(sums, scale, zero, q, &low, &high);
      }
    }
    double value[kLanes];
    _mm512_storeu_pd(value, low);
    _mm512_storeu_pd(value + 8, high);
    for (int m = 0; m < kRows / kParts; ++m) {
      const double step = kParts == 2 ? 1.0 : block.step[m];
      for (int64_t i = next - first; i < kWide && first + i < end; ++i) {
        store_result(out, m, first + i, value[m * kWide + i], step);
      }
    }
  }
}

template <int kBits, bool kBook, int kRows, int kParts = 1>
void multiply_few_rows(const PackedMatrix& w, const WideRows& x, const Block& block, int64_t begin,
                       int64_t end, const Output& out, const WideScratch& s) {
  const bool usual = w.group_size == kUsualBlocks * kBlock && w.cols % w.group_size == 0 &&
                     groups_of(w) % FewRows<kRows>::kGroups == 0;
  if (usual) {
    multiply_few<kBits, kBook, kRows, kParts, true>(w, x, block, begin, end, out, s);
  } else {
    multiply_few<kBits, kBook, kRows, kParts, false>(w, x, block, begin, end, out, s);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
