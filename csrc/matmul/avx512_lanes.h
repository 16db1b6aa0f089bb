// Included by avx512.cpp alone: what the 8-bit kernels for few and for many rows of x share.
// Sixteen sums stand in the lanes of a register; scales and zeros are brought into the same lanes.
#pragma once

#include "matmul/avx512_panel_quad.h"
#include "matmul/avx512_prepare.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kWideTiles = 2;   // of 16 rows of W in a panel
constexpr int64_t kWideBlocks = 8;  // 512 columns: 16 KiB of panel stay in L1

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
  int32_t* q_lane;    // per group, sums of x for each lane
  double* step_lane;  // per group, steps of x for each of eight lanes (Mode::kParts)
  uint8_t* panel;
  double* total;  // (rows of x, 32)
  int64_t used;

  WideScratch(void* memory, const PackedMatrix& w, int64_t rows_of_x) {
    Arena arena{static_cast<char*>(memory)};
    const int64_t width = kWideTiles * kLanes, groups = groups_of(w);
    const int64_t few = w.rows < kLanes ? packed_row_bytes(w.cols, w.levels) : 0;
    expanded = arena.take<uint8_t>(width * (expanded_row_bytes(w) + few));
    rows = arena.take<TileRows>(width / kTile);
    scale = arena.take<float>(width * (groups + 1));
    zero = arena.take<int32_t>(width * (groups + 1));
    q_lane = arena.take<int32_t>(kLanes * (groups + 1));
    step_lane = arena.take<double>(kLanes / 2 * groups);
    panel = arena.take<uint8_t>(width * wide_chunk(w) * kBlock);
    total = arena.take<double>(rows_of_x * width);
    used = arena.used;
  }
};

// The code rows [first, first + count) of W; entries of a codebook are looked up later.
void load_wide_codes(const PackedMatrix& w, int64_t first, int64_t count, const WideScratch& s) {
  if (w.levels == kTernaryLevels) {
    const int64_t row_bytes = packed_row_bytes(w.cols, w.levels), pitch = expanded_row_bytes(w);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
      uint8_t* expanded = s.expanded + i * pitch;
      wide_ternary_to_two_bits(w.codes + n * row_bytes, row_bytes, expanded);
      s.rows[i / kTile].row[i % kTile] = expanded;
      s.rows[i / kTile].whole = blocks_of(w);
    }
    return;
  }
  PackedMatrix codes = w;
  codes.codebook = nullptr;
  for (int64_t t = 0; t < count / kTile; ++t) {
    load_tile(codes, first + t * kTile, s.expanded + t * kTile * expanded_row_bytes(w), s.rows + t);
  }
}

// The same as transpose_groups at a width of 8 where up to four groups of eight whole rows lie side
// by side: two loads. For 256 columns the transpositions took twice the time of the product.
template <typename Load>
inline void spread_few_groups(const Load& load, int64_t groups, void* out) {
  auto* to = static_cast<int32_t*>(out);
  const int64_t count = 8 * groups;
  const __m512i early = load(0, 0, first_lanes(count)), late = load(0, 16, first_lanes(count - 16));
  const __m512i p = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i row = _mm512_and_si512(p, _mm512_set1_epi32(7));
  __m512i from = _mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(groups)));
  from = _mm512_add_epi32(from, _mm512_srli_epi32(p, 3));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(early, from, late));
  if (groups <= 2) return;
  from = _mm512_add_epi32(from, _mm512_set1_epi32(2));  // the third group and the fourth
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi32(early, from, late));
}

// load(l, g, mask): 16 dwords of lane l from group g on, those of `mask`; out: lane l of group g at
// g * width + l. At a width of 8, lanes 8 to 15 of what is transposed are the next 16 groups.
template <typename Load>
inline void transpose_groups(const Load& load, int64_t groups, int64_t width, void* out) {
  auto* to = static_cast<int32_t*>(out);
  if (width == kLanes / 2) {
    for (int64_t g = 0; g < groups; g += 2 * kLanes) {
      const __mmask16 low = first_lanes(groups - g), high = first_lanes(groups - g - kLanes);
      __m512i v[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        v[l] = l < 8 ? load(l, g, low) : load(l, g + kLanes, high);
      }
      transpose_16(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const auto store = [&](int64_t at, __m256i half) {
          if (at < groups) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at * width), half);
        };
        store(g + j, _mm512_castsi512_si256(v[j]));
        store(g + kLanes + j, _mm512_extracti64x4_epi64(v[j], 1));
      }
    }
    return;
  }
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int64_t count = groups - g < kLanes ? groups - g : kLanes;
    const __mmask16 mask = first_lanes(count);
    __m512i v[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) v[l] = load(l, g, mask);
    transpose_16(v);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      if (j < count) _mm512_storeu_si512(to + (g + j) * width, v[j]);
    }
  }
}

// Scales and zeros of every group, lanes [at, at + 16) of `width`: lane l belongs to row
// first + l % kRows of W (the last one where there are fewer). Zeros of a symmetric weight are
// written for the first rows of a call only (`fresh`).
template <int kRows>
void load_lanes(const PackedMatrix& w, int64_t first, int64_t width, int64_t at, bool fresh,
                const WideScratch& s) {
  const int64_t groups = groups_of(w), last = w.rows - 1 - first;
  const bool adjacent = kRows == 8 && width == 8 && groups <= 4 && last >= 7;
  const auto transpose = [&](const auto& load, void* out) {
    if (adjacent) return spread_few_groups(load, groups, out);
    transpose_groups(load, groups, width, out);
  };
  int64_t start[kRows];  // of each row's groups
  for (int64_t i = 0; i < kRows; ++i) start[i] = (first + (i < last ? i : last)) * groups;
  const auto bytes = [&](const void* data) {
    return [&, data](int64_t l, int64_t g, __mmask16 mask) {
      const auto* from = static_cast<const uint8_t*>(data) + start[l % kRows] + g;
      return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
    };
  };
  const auto floats = [&](auto type) {
    return [&, type](int64_t l, int64_t g, __mmask16 mask) {
      return _mm512_castps_si512(load_floats(w.scale, type, start[l % kRows] + g, mask));
    };
  };
  struct Float16 {
    constexpr operator FloatType() const { return FloatType::kFloat16; }
  };
  if (w.row_scale != nullptr) {
    const auto integers = bytes(w.scale);
    const auto load = [&](int64_t l, int64_t g, __mmask16 mask) {
      return _mm512_castps_si512(_mm512_cvtepi32_ps(integers(l, g, mask)));
    };
    transpose(load, s.scale + at);
  } else if (w.scale_type == FloatType::kFloat16) {
    transpose(floats(Float16()), s.scale + at);
  } else {
    transpose(floats(w.scale_type), s.scale + at);
  }
  if (w.zero != nullptr) {
    transpose(bytes(w.zero), s.zero + at);
  } else if (fresh) {
    const __m512i zero = _mm512_set1_epi32(symmetric_zero(w));
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t l = 0; l < kLanes && at + l < width; l += 8) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.zero + g * width + at + l),
                            _mm512_castsi512_si256(zero));
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

// Low half at 0..31, high at 32..63, of a pair of registers: (a low, b low), (a high, b high).
struct IntegerPair {
  __m512i low, high;
};
inline IntegerPair zip_halves(__m512i a, __m512i b) {
  return {_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee)};
}

// Two blocks of 4-bit codes at once: the first registers of both blocks, and the second ones, as
// zip_halves() orders x.
template <bool kBook>
inline IntegerPair nibble_pair(const uint8_t* codes, __m512i table) {
  const __m512i all = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(15);
  const IntegerPair pair = {_mm512_and_si512(all, mask),
                            _mm512_and_si512(_mm512_srli_epi16(all, 4), mask)};
  if constexpr (!kBook) return pair;
  return {_mm512_shuffle_epi8(table, pair.low), _mm512_shuffle_epi8(table, pair.high)};
}

// total += scale * (sums - zero q), all lanes; the products are exact.
inline void add_group(__m512i sums, const float* scale, const int32_t* zero, __m512i q,
                      __m512d* low, __m512d* high) {
  const __m512i offset = _mm512_mullo_epi32(_mm512_loadu_si512(zero), q);
  const __m512i exact = _mm512_sub_epi32(sums, offset);
  *low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(exact)),
                         _mm512_cvtps_pd(_mm256_loadu_ps(scale)), *low);
  *high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, 1)),
                          _mm512_cvtps_pd(_mm256_loadu_ps(scale + 8)), *high);
}

}  // namespace
}  // namespace pyrobust::matmul
