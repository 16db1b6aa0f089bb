// Included by avx512.cpp alone: activations in 8 bits and groups along the rows of W (group_dim 0),
// with a weight in panel order, which then holds codes alone. Scales of columns join x: with 2^e
// the last place of the smallest scale of a group of rows,
//
//   u_k = q_k scale_k / 2^e     an integer, written as digits of 8 bits: u_k = sum of 256^p d_pk
//   t   = 2^e (sum over p of 256^p sum_k d_pk code_k  -  sum_k u_k zero_k)
//
// Every number here is an integer below 2^53, and so are the partial sums in double that matmul.h
// fixes, over 2^e: none of those rounds, hence the same bits. A weight whose scales of a group
// differ too much for that has no panels (takes_columns()), and double sums serve it.
#pragma once

#include "matmul/avx512_panels.h"

namespace pyrobust::matmul {
namespace {

constexpr int kMostDigits = 4;
// The largest integers that one, two, three and four digits in [-128, 127] write.
constexpr double kLargestDigits[kMostDigits] = {127.0, 32639.0, 8355711.0, 2139062143.0};
constexpr int64_t kLeastColumnGroup = 32;  // rows: fewer would multiply most of a panel in vain

// 16 scales of row `group` of the scales, from column k on; 0 past the last.
inline __m512 column_scales(const PackedMatrix& w, int64_t group, int64_t k) {
  const __mmask16 mask = first_lanes(w.cols - k);
  const int64_t at = group * w.cols + k;
  if (w.row_scale == nullptr) return load_floats(w.scale, w.scale_type, at, mask);
  const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(w.scale) + at);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// What integers of a group are multiples of, and how many digits they take; 0 where none will do.
struct ColumnUnit {
  float inverse = 1.0f;
  double unit = 1.0;
  int digits = 0;

  ColumnUnit(const PackedMatrix& w, int64_t group) {
    constexpr int32_t kLargest = 0x7f7fffff;  // the bits of the largest float
    __m512i least = _mm512_set1_epi32(kLargest), most = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.cols; k += kLanes) {
      const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(column_scales(w, group, k)));
      most = _mm512_max_epi32(most, bits);
      least = _mm512_mask_min_epi32(least, _mm512_test_epi32_mask(bits, bits), least, bits);
    }
    const int32_t low = _mm512_reduce_min_epi32(least), high = _mm512_reduce_max_epi32(most);
    if (high > kLargest) return;  // not finite
    if (w.row_scale == nullptr) {
      const int significant = w.scale_type == FloatType::kFloat16    ? 11
                              : w.scale_type == FloatType::kBFloat16 ? 8
                                                                     : 15;
      const int exponent = (low >> 23) - 127 - (significant - 1);
      if (exponent < -120 || exponent > 120) return;  // 2^e and its inverse must be normal
      unit = power(exponent);
      inverse = static_cast<float>(power(-exponent));
    }
    float largest;
    __builtin_memcpy(&largest, &high, sizeof(largest));
    const double magnitude = 127.0 * static_cast<double>(largest) * static_cast<double>(inverse);
    // Twice the largest |sum of u (code - zero)|.
    if (magnitude * 2.0 * 255.0 * static_cast<double>(w.cols) > 0x1p53) return;
    int count = 1;
    while (count < kMostDigits && magnitude > kLargestDigits[count - 1]) ++count;
    if (magnitude <= kLargestDigits[count - 1]) digits = count;
  }

  static double power(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }

  __m512 multiples(const PackedMatrix& w, int64_t group, int64_t k) const {
    return _mm512_mul_ps(column_scales(w, group, k), _mm512_set1_ps(inverse));
  }

  bool divides_all(const PackedMatrix& w, int64_t group) const {
    constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    for (int64_t k = 0; k < w.cols; k += kLanes) {
      const __m512 own = multiples(w, group, k);
      const __m512 whole = _mm512_roundscale_ps(own, kToNearest);
      if (_mm512_cmp_ps_mask(own, whole, _CMP_NEQ_UQ) != 0) return false;
    }
    return true;
  }
};

// Whether sums of integers serve every group.
bool takes_columns(const PackedMatrix& w) {
  if (w.group_dim != 0 || w.cols == 0 || w.cols > kMaxIntegerRun) return false;
  if (w.group_size < kLeastColumnGroup && w.group_size < w.rows) return false;
  for (int64_t group = 0; group * w.group_size < w.rows; ++group) {
    const ColumnUnit unit(w, group);
    if (unit.digits == 0 || !unit.divides_all(w, group)) return false;
  }
  return true;
}

bool by_columns(const PackedMatrix& w, Mode mode) {
  return mode == Mode::kInt8 && w.group_dim == 0 && w.panels != nullptr;
}

// --- x ------------------------------------------------------------------------------------------

int64_t column_row_bytes(const PackedMatrix& w) { return blocks_of(w) * kBlock; }

// Rows `part` of the block [first, first + rows) of x to 8 bits, in plain order.
void prepare_column_rows(const PackedMatrix& w, const Activations& x, int64_t first, RowRange part,
                         void* prepared, double* step) {
  const int64_t row_bytes = w.cols * float_type_bytes(x.type);
  for (int64_t m = part.begin; m < part.end; ++m) {
    const auto* row = static_cast<const char*>(x.data) + (first + m) * row_bytes;
    auto* out = static_cast<int8_t*>(prepared) + m * column_row_bytes(w);
    step[m] = step_of(row, x.type, 0, w.cols, 127.0);
    const bool some = step[m] > 0.0;
    const Divisor by(step[m]);
    for (int64_t k = 0; k < w.cols; k += kBlock) {
      _mm512_storeu_si512(out + k,
                          some ? quantize_64(row, x.type, k, w.cols, by) : _mm512_setzero_si512());
    }
  }
}

struct ColumnScratch {
  int8_t* tile;   // digits of some rows of x, as a tile of PanelRows
  int32_t* sums;  // (rows of bytes, 32)
  double* total;  // (rows of x, 32)
  int64_t used;

  ColumnScratch(void* memory, const PackedMatrix& w) {
    Arena arena{static_cast<char*>(memory)};
    tile = arena.take<int8_t>(kTileRows * column_row_bytes(w));
    sums = arena.take<int32_t>(kTileRows * kPanelRows);
    total = arena.take<double>(kTileRows * kPanelRows);
    used = arena.used;
  }
};

// A tile: `count` rows of x times the scales of a group of rows of W.
struct ColumnTile {
  const int8_t* q;  // the first row
  int64_t group, count;
  ColumnUnit unit;

  int64_t width() const {  // rows of bytes
    const int64_t all = count * unit.digits;
    return all == 5 || all == 7 ? all + 1 : all;
  }
};

// Zeros of 64 columns from k on.
inline __m512i column_zeros(const PackedMatrix& w, int64_t group, int64_t k) {
  if (w.zero == nullptr) return _mm512_set1_epi8(static_cast<char>(symmetric_zero(w)));
  const uint64_t mask = w.cols - k >= kBlock ? ~uint64_t{0} : (uint64_t{1} << (w.cols - k)) - 1;
  return _mm512_maskz_loadu_epi8(mask, w.zero + group * w.cols + k);
}

// Digits of 64 columns of one row, the lowest first, `apart` registers from one another.
inline void column_digits(const int8_t* q, const __m512i* multiple, int digits, int64_t apart,
                          __m512i* out) {
  __m512i u[4], digit[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + kLanes * i));
    u[i] = _mm512_mullo_epi32(_mm512_cvtepi8_epi32(bytes), multiple[i]);
  }
  for (int p = 0; p < digits; ++p) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      digit[i] = _mm512_srai_epi32(_mm512_slli_epi32(u[i], 24), 24);
      u[i] = _mm512_srai_epi32(_mm512_sub_epi32(u[i], digit[i]), 8);
    }
    out[p * apart] = narrow_64(digit);
  }
}

// Writes the tile and, for each row of x, the sum of u times the zeros.
void write_column_tile(const PackedMatrix& w, const ColumnTile& t, int8_t* tile, double* zeros) {
  const int64_t stride = column_row_bytes(w), width = t.width(), all = t.count * t.unit.digits;
  __m512i v[kTileRows], sum[kTileRows];
  for (int i = 0; i < kTileRows; ++i) v[i] = sum[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < stride; k += kBlock) {
    const __m512i zero = column_zeros(w, t.group, k);
    __m512i multiple[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      multiple[i] = _mm512_cvtps_epi32(t.unit.multiples(w, t.group, k + kLanes * i));
    }
    for (int64_t i = 0; i < t.count; ++i) {
      column_digits(t.q + i * stride + k, multiple, t.unit.digits, t.count, v + i);
    }
    for (int64_t i = 0; i < all; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], zero, v[i]);
    store_tile_block(v, width, tile + k * width);
  }
  for (int64_t i = 0; i < t.count; ++i) {
    zeros[i] = 0.0;
    for (int p = t.unit.digits - 1; p >= 0; --p) {
      zeros[i] = 256.0 * zeros[i] + _mm512_reduce_add_epi32(sum[p * t.count + i]);
    }
  }
}

// --- products -----------------------------------------------------------------------------------

// sums (kRows, 32) = codes of a panel times a tile.
template <int kBits, bool kBook, int kRows>
__attribute__((noinline)) void column_sums(const uint8_t* codes, const int8_t* q, int64_t quads,
                                           __m512i table, int32_t* sums) {
  constexpr int kChains = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1, kSums = 2 * kRows * kChains;
  const int64_t ahead = panel_ahead();
  __m512i sum[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t j = 0; j < quads; ++j, codes += kBits * kLineBytes, q += kQuadColumns * kRows) {
    add_quad<kBits, kBook, kRows, kChains>(codes, q, table, ahead, sum);
  }
#pragma GCC unroll 16
  for (int i = 2 * kRows; i < kSums; ++i) {
    sum[i % (2 * kRows)] = _mm512_add_epi32(sum[i % (2 * kRows)], sum[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) {
    constexpr unsigned kShift = PanelQuad<kBits, kBook>::kShift;
    const __m512i own = i % 2 == 0 ? sum[i] : _mm512_srai_epi32(sum[i], kShift);
    _mm512_store_si512(sums + kLanes * i, own);
  }
}

template <int kBits, bool kBook>
void column_sums_of(int64_t width, const uint8_t* codes, const int8_t* q, int64_t quads,
                    __m512i table, int32_t* sums) {
  for_width(width, [&](auto rows) {
    column_sums<kBits, kBook, decltype(rows)::kNumber>(codes, q, quads, table, sums);
  });
}

// total (count, 32) = 2^e (sums of u times codes, less `zeros`); every sum is exact.
void join_digits(const PackedMatrix& w, const ColumnTile& t, const int32_t* sums,
                 const double* zeros, double* total) {
  const __m512d base = _mm512_set1_pd(256.0), unit = _mm512_set1_pd(t.unit.unit);
  const __m512d multiplier = _mm512_set1_pd(code_multiplier(w));
  for (int64_t i = 0; i < t.count; ++i) {
    for (int64_t l = 0; l < kPanelRows; l += 8) {
      __m512d sum = _mm512_setzero_pd();
      for (int p = t.unit.digits - 1; p >= 0; --p) {
        const __m256i own = eight_sums(sums + (p * t.count + i) * kPanelRows + l);
        sum = _mm512_fmadd_pd(sum, base, _mm512_cvtepi32_pd(own));
      }
      sum = _mm512_fmsub_pd(sum, multiplier, _mm512_set1_pd(zeros[i]));
      _mm512_store_pd(total + i * kPanelRows + l, _mm512_mul_pd(sum, unit));
    }
  }
}

// Rows [begin, end) of W, all of one group.
template <int kBits, bool kBook>
void multiply_column_group(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                           const Output& out, void* scratch) {
  const PanelLayout layout(w);
  const ColumnScratch s(scratch, w);
  const __m512i table = codebook_table(w);
  const int64_t group = begin / w.group_size;
  const ColumnUnit unit(w, group);
  const int64_t some = unit.digits > 0 ? kTileRows / unit.digits : kTileRows;
  for (int64_t m = 0; m < block.rows; m += some) {
    const int64_t count = block.rows - m < some ? block.rows - m : some;
    const auto* q = static_cast<const int8_t*>(block.data) + m * column_row_bytes(w);
    const ColumnTile tile{q, group, count, unit};
    double zeros[kTileRows];
    write_column_tile(w, tile, s.tile, zeros);
    Output own = out;
    own.row += m;
    if (own.remainder != nullptr) own.remainder += m;
    for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
      const int64_t first = p * kPanelRows, stop = first + kPanelRows;
      column_sums_of<kBits, kBook>(tile.width(), w.panels + p * layout.panel_bytes, s.tile,
                                   layout.columns / kQuadColumns, table, s.sums);
      join_digits(w, tile, s.sums, zeros, s.total);
      store_panel_rows(own, count, block.step + m, first, first > begin ? first : begin,
                       stop < end ? stop : end, s.total);
    }
  }
}

template <int kBits, bool kBook>
void multiply_columns(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                      const Output& out, void* scratch) {
  while (begin < end) {
    const int64_t next = (begin / w.group_size + 1) * w.group_size;
    const int64_t stop = next < end ? next : end;
    multiply_column_group<kBits, kBook>(w, block, begin, stop, out, scratch);
    begin = stop;
  }
}

}  // namespace
}  // namespace pyrobust::matmul
