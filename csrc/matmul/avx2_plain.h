// Included by avx2_paths.h: groups along the rows that are no whole blocks of 64 columns. Rows of W
// become codes in plain order, one a byte, where a group may begin anywhere; this file multiplies
// them in float, avx2_groups.h in integers.
//
//   codes   c0 c1 c2 | c3 c4 c5 | c6 ...        groups of three columns
//   floats  w0 w1 w2 . . . . .                  eight at a time, with the scale of one group;
//                    w3 w4 w5 . . . . .         the next group writes over what lies behind it
#pragma once

#include "matmul/avx2_exact.h"
#include "matmul/avx2_rows.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kPlainColumns = kPanelBlocks * kBlock;  // at once
constexpr int64_t kLanesOfPanel = 8;

// The codes of columns [begin, end) of row n, or their entries of the codebook, one a byte: the
// result lies in `out`, which has room for kSpanSlack bytes on both sides of them. Where five codes
// share a byte, up to four columns before `begin` are expanded too.
inline const uint8_t* plain_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                                 uint8_t* out) {
  const uint8_t* row = code_row(w, n);
  if (w.levels == 256) {  // not in place: a row may end where the memory does
    __builtin_memcpy(out, row + begin, static_cast<size_t>(end - begin));
    return out;
  }
  const int64_t before = w.levels == kTernaryLevels ? begin % kTritsPerByte : 0;
  expand<Avx2Codes>(row, begin - before, end, w.levels, w.codebook, out);
  return out + before;
}

// A whole row, and bytes that may be read behind it.
int64_t plain_row_bytes(const PackedMatrix& w) { return round_up(w.cols, kBlock) + kSpanSlack; }
void plain_row(const PackedMatrix& w, int64_t n, uint8_t* out) {
  __builtin_memset(out + w.cols, 0, static_cast<size_t>(plain_row_bytes(w) - w.cols));
  for (int64_t k = 0; k < w.cols; k += kSpan) {
    plain_span(w, n, k, w.cols - k < kSpan ? w.cols : k + kSpan, out + k);
  }
}

// Weights without row scale of columns [begin, end) of row n, `begin` a multiple of 8: eight floats
// of columns 8 j .. 8 j + 7 at out + 8 j kApart, kApart 1 where groups are no multiples of 8.
// Writes up to 7 more.
template <int64_t kApart>
void plain_weights(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float* out) {
  float scale[kPlainColumns + 1], zero[kPlainColumns + 1];
  uint8_t expanded[kPlainColumns + 2 * kSpanSlack] = {};
  const uint8_t* code = plain_span(w, n, begin, end, expanded);
  const int64_t first = begin / w.group_size, groups = (end - 1) / w.group_size - first + 1;
  load_scales(w, scale_row(w, n) + first, groups, scale);
  load_zeros(w, scale_row(w, n) + first, groups, zero);
  const __m256 multiplier = _mm256_set1_ps(static_cast<float>(code_multiplier(w)));
  int64_t stop = (first + 1) * w.group_size - begin;
  for (int64_t g = 0, k = 0; g < groups; ++g, stop += w.group_size) {
    const __m256 by = _mm256_set1_ps(scale[g]), less = _mm256_set1_ps(zero[g] - kMagic);
    const int64_t last = stop < end - begin ? stop : end - begin;
    for (; k < last; k += kLanesOfPanel) {
      const __m256i eight =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + k)));
      const __m256 value = _mm256_fmsub_ps(_mm256_cvtepi32_ps(eight), multiplier, less);
      _mm256_storeu_ps(out + k * kApart, _mm256_mul_ps(value, by));
    }
    k = last;
  }
}

// Blocks [from, to) of a tile to a panel: [block][step][row of the tile][lane], where lane i of
// step j is column 8 j + i. Columns past the last are 0.
void plain_panel(const PackedMatrix& w, int64_t first, int64_t from, int64_t to, float* panel) {
  const int64_t begin = from * kBlock, columns = (to - from) * kBlock;
  const int64_t end = begin + columns < w.cols ? begin + columns : w.cols;
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t n = first + i < w.rows ? first + i : w.rows - 1;
    float* own = panel + i * kLanesOfPanel;
    const auto at = [own](int64_t k) { return own + k * kTile; };
    const int64_t done = round_up(end - begin, kLanesOfPanel);
    if (w.group_size % kLanesOfPanel == 0) {
      plain_weights<kTile>(w, n, begin, end, own);
    } else {
      float row[kPlainColumns + kLanesOfPanel];
      plain_weights<1>(w, n, begin, end, row);
      for (int64_t k = 0; k < done; k += kLanesOfPanel) {
        _mm256_storeu_ps(at(k), _mm256_loadu_ps(row + k));
      }
    }
    for (int64_t k = end - begin; k < columns; ++k) {
      at(k / kLanesOfPanel * kLanesOfPanel)[k % kLanesOfPanel] = 0.0f;
    }
  }
}

// x: rows in plain order, whole blocks.
void multiply_plain(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                    const Output& out, const Scratch& scratch) {
  constexpr int64_t kWidth = kPanelTiles * kTile, kPanel = kPanelBlocks * kTile * kBlock;
  const auto* x = static_cast<const float*>(block.data);
  const int64_t blocks = blocks_of(w), stride = blocks * kBlock, rows = block.rows;
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t count = end - first < kWidth ? end - first : kWidth;
    const int64_t tiles = (count + kTile - 1) / kTile;
    __builtin_memset(scratch.total, 0, static_cast<size_t>(rows * kWidth) * sizeof(double));
    for (int64_t from = 0; from < blocks; from += kPanelBlocks) {
      const int64_t to = blocks - from < kPanelBlocks ? blocks : from + kPanelBlocks;
      for (int64_t t = 0; t < tiles; ++t) {
        plain_panel(w, first + t * kTile, from, to, scratch.panel + t * kPanel);
      }
      const FloatPanels product{nullptr, 0, from, 1, to - from};
      meet_panels(product, tiles, scratch.panel, x + from * kBlock, stride, rows, scratch.total);
    }
    store_totals(out, rows, first, count, scratch.total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
