// Included by avx2_paths.h: activations in 8 bits and groups along the rows that are no whole
// blocks of 64 columns, or too long for one integer sum. Codes are bytes in plain order
// (avx2_plain.h); x has zeros behind each group, which meet the codes of the next one:
//
//   codes   c0 c1 c2 c3 c4 | c5 c6 c7 c8 c9 | ...         groups of five columns
//   x       x0 x1 x2 x3 x4 0 0 0 | x5 x6 ...              a group each, times 8 codes from c0, c5
//   on
#pragma once

#include "core/activation_int8.h"
#include "matmul/avx2_int8.h"
#include "matmul/avx2_plain.h"

namespace pyrobust::matmul {
namespace {

// Groups up to this many columns are added up four columns of four rows of W at a time, longer ones
// 32 of a row: below it, adding up lanes would cost more than bringing four rows together.
constexpr int64_t kShortGroup = 8;

// More rows of x than kFusedRows take panels (avx2_group_panel.h), whose steps are of four columns.
constexpr int64_t kGroupStep = 4;
bool takes_group_panels(const PackedMatrix& w, int64_t rows) {
  return rows > kFusedRows && w.group_size <= kMaxIntegerRun;
}

// Products of codes above 4 bits do not fit in pairs in 16 bits: x then has 16 bits too.
bool takes_words(const PackedMatrix& w) { return bits_of(w) == 8; }

// Rows of x with zeros behind each group, and the sums of each run (a group, or 65536 columns of a
// longer one).
struct GroupRows {
  char* q;
  int32_t* q_sum;     // (rows, runs)
  int64_t row_bytes;  // of q
  int64_t runs;       // of a row
  int64_t unit;       // columns to a multiple of which runs are filled up
  int64_t used;

  GroupRows(void* data, const PackedMatrix& w, int64_t rows) {
    const int64_t group = w.group_size < w.cols ? w.group_size : w.cols;
    unit = group <= kShortGroup || takes_group_panels(w, rows) ? kGroupStep : 32;
    row_bytes = groups_of(w) * round_up(group, unit) * (takes_words(w) ? 2 : 1);
    runs = groups_of(w) * ceil_div(group, kMaxIntegerRun);
    Arena arena{static_cast<char*>(data)};
    q = arena.take<char>(rows * row_bytes);
    q_sum = arena.take<int32_t>(rows * runs);
    used = arena.used;
  }
};

// body(k, count, first): the runs of a row; `first` where a group begins with it.
template <typename Body>
inline void for_runs(const PackedMatrix& w, const Body& body) {
  for (int64_t k = 0; k < w.cols;) {
    const int64_t stop = w.cols - k < w.group_size ? w.cols : k + w.group_size;
    for (bool first = true; k < stop; first = false) {
      const int64_t count = stop - k < kMaxIntegerRun ? stop - k : kMaxIntegerRun;
      body(k, count, first);
      k += count;
    }
  }
}

// Row m; `q` holds its activations.
void prepare_group_row(const PackedMatrix& w, const int8_t* q, int64_t m, const GroupRows& x) {
  char* row = x.q + m * x.row_bytes;
  auto* words = reinterpret_cast<int16_t*>(row);
  int32_t* q_sum = x.q_sum + m * x.runs;
  const bool wide = takes_words(w);
  __builtin_memset(row, 0, static_cast<size_t>(x.row_bytes));
  for_runs(w, [&](int64_t k, int64_t count, bool) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += q[k + i];
    *q_sum++ = sum;
    if (wide) {
      for (int64_t i = 0; i < count; ++i) words[i] = q[k + i];
    } else {
      __builtin_memcpy(row, q + k, static_cast<size_t>(count));
    }
    row += round_up(count, x.unit);
    words += round_up(count, x.unit);
  });
}

// Codes of a tile in plain order.
struct PlainTile {
  const uint8_t* row[kTile];
};

// The sums of `count` columns from k on of each row of a tile, for kRows rows of x: 32 columns of a
// row at a time.
template <bool kWords>
struct LongSums {
  static constexpr int64_t kUnit = 32;

  template <int kRows>
  static void of_run(const PlainTile& tile, int64_t k, int64_t count, const char* q,
                     int64_t row_bytes, __m128i* out) {
    __m256i sum[kRows][kTile];
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) sum[m][n] = _mm256_setzero_si256();
    }
    for (const int64_t end = k + count; k < end; k += kUnit, q += kUnit * (kWords ? 2 : 1)) {
#pragma GCC unroll 4
      for (int n = 0; n < kTile; ++n) {
#pragma GCC unroll 2
        for (int m = 0; m < kRows; ++m) {
          sum[m][n] = _mm256_add_epi32(sum[m][n], dot_32(tile.row[n] + k, q + m * row_bytes));
        }
      }
    }
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      out[m] = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    }
  }

 private:
  static __m256i dot_32(const uint8_t* codes, const char* q) {
    if constexpr (!kWords) {
      return _mm256_madd_epi16(_mm256_maddubs_epi16(load_256(codes), load_256(q)),
                               _mm256_set1_epi16(1));
    }
    const auto sixteen = [](const uint8_t* from) { return _mm256_cvtepu8_epi16(load_128(from)); };
    return _mm256_add_epi32(_mm256_madd_epi16(sixteen(codes), load_256(q)),
                            _mm256_madd_epi16(sixteen(codes + 16), load_256(q + 32)));
  }
};

// The same, four columns of all four rows at a time.
template <bool kWords>
struct ShortSums {
  static constexpr int64_t kUnit = 4;

  template <int kRows>
  static void of_run(const PlainTile& tile, int64_t k, int64_t count, const char* q,
                     int64_t row_bytes, __m128i* out) {
    __m256i wide[kRows];
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      out[m] = _mm_setzero_si128();
      wide[m] = _mm256_setzero_si256();
    }
    for (const int64_t end = k + count; k < end; k += kUnit, q += kUnit * (kWords ? 2 : 1)) {
      const __m128i codes = _mm_setr_epi32(four(tile.row[0] + k), four(tile.row[1] + k),
                                           four(tile.row[2] + k), four(tile.row[3] + k));
#pragma GCC unroll 2
      for (int m = 0; m < kRows; ++m) {
        if constexpr (kWords) {
          int64_t x;
          __builtin_memcpy(&x, q + m * row_bytes, sizeof(x));
          const __m256i pairs =
              _mm256_madd_epi16(_mm256_cvtepu8_epi16(codes), _mm256_set1_epi64x(x));
          wide[m] = _mm256_add_epi32(wide[m], pairs);
        } else {
          const __m128i x = _mm_set1_epi32(four(q + m * row_bytes));
          const __m128i pairs = _mm_maddubs_epi16(codes, x);
          out[m] = _mm_add_epi32(out[m], _mm_madd_epi16(pairs, _mm_set1_epi16(1)));
        }
      }
    }
    if constexpr (!kWords) return;
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      out[m] =
          _mm_hadd_epi32(_mm256_castsi256_si128(wide[m]), _mm256_extracti128_si256(wide[m], 1));
    }
  }

 private:
  static int32_t four(const void* from) {
    int32_t value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
};

// Totals of a tile for the rows of x from m on: group after group as matmul.h says.
template <typename Sums, int kRows>
void group_totals(const PackedMatrix& w, const PlainTile& tile, const Scratch& scratch,
                  const GroupRows& x, int64_t m, __m256d* total) {
  const int64_t groups = groups_of(w), step = takes_words(w) ? 2 : 1;
  const __m128i shift = _mm_cvtsi32_si128(code_multiplier(w) - 1);
  const char* q = x.q + m * x.row_bytes;
  const int32_t* q_sum = x.q_sum + m * x.runs;
  const float* zero = scratch.group_zero - 1;
  const double* scale = scratch.group_scale - kTile;
  for_runs(w, [&](int64_t k, int64_t count, bool first) {
    zero += first ? 1 : 0;
    scale += first ? kTile : 0;
    const __m128 zeros = _mm_setr_ps(zero[0], zero[groups], zero[2 * groups], zero[3 * groups]);
    const __m128i offset = _mm_cvtps_epi32(_mm_sub_ps(zeros, _mm_set1_ps(kMagic)));
    __m128i sums[kRows];
    Sums::template of_run<kRows>(tile, k, count, q, x.row_bytes, sums);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      const __m128i all = _mm_set1_epi32(q_sum[i * x.runs]);
      const __m128i exact =
          _mm_sub_epi32(_mm_sll_epi32(sums[i], shift), _mm_mullo_epi32(offset, all));
      // 46 bits: the product is exact, so a fused add rounds like a separate one.
      total[i] = _mm256_fmadd_pd(_mm256_cvtepi32_pd(exact), _mm256_loadu_pd(scale), total[i]);
    }
    q += round_up(count, Sums::kUnit) * step;
    ++q_sum;
  });
}

template <typename Sums>
void multiply_groups(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                     const Output& out, const Scratch& scratch) {
  const GroupRows x(const_cast<void*>(block.data), w, block.rows);
  for (int64_t first = begin; first < end; first += kTile) {
    PlainTile tile;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
      uint8_t* row = scratch.bytes + i * plain_row_bytes(w);
      plain_row(w, n, row);
      tile.row[i] = row;
    }
    load_group_scales(w, first, scratch.group_scale, scratch.group_zero);
    for (int64_t m = 0; m < block.rows; m += 2) {
      const int64_t count = block.rows - m > 1 ? 2 : 1;
      __m256d total[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
      if (count == 2) {
        group_totals<Sums, 2>(w, tile, scratch, x, m, total);
      } else {
        group_totals<Sums, 1>(w, tile, scratch, x, m, total);
      }
      for (int64_t i = 0; i < count; ++i) {
        double value[kTile];
        _mm256_storeu_pd(value, total[i]);
        for (int64_t n = 0; n < kTile && first + n < end; ++n) {
          store_result(out, m + i, first + n, value[n], block.step[m + i]);
        }
      }
    }
  }
}

void multiply_integer_groups(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                             const Output& out, const Scratch& scratch) {
  const bool is_short = w.group_size <= kShortGroup;
  if (takes_words(w)) {
    if (is_short) return multiply_groups<ShortSums<true>>(w, block, begin, end, out, scratch);
    return multiply_groups<LongSums<true>>(w, block, begin, end, out, scratch);
  }
  if (is_short) return multiply_groups<ShortSums<false>>(w, block, begin, end, out, scratch);
  multiply_groups<LongSums<false>>(w, block, begin, end, out, scratch);
}

}  // namespace
}  // namespace pyrobust::matmul
