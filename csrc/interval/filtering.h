// Convolutions with windows of 3 x 3 by minimal filtering (Winograd 1980) along rows: two
// neighbouring outputs of three weights cost four products instead of six. The pixels d0 ... d3 of
// a tile and the weights g0, g1, g2 of a row of the window become
//
//   V = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),   U = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2,
//   g2),
//
// M_i = sum of U_i V_i over channels and rows of the window, and the outputs are M_0 + M_1 + M_2
// and M_1 - M_2 - M_3. Centres are multiplied with the filters of W, radii with those of |W|.
//
// Proof of the bounds. The identity is exact in real numbers; each term U_i V_i of an output passes
// at most n = filter_depth(terms) roundings (2 of U, 1 of V, those of the sum, 2 of the outputs).
// So a computed output differs from the exact one by at most gamma_n T and what underflows, where T
// is the same expression with magnitudes for all terms, |g| for g and |d| for d: of the first
// output
//   |g0| (|d0| + |d2|) + (|g0| + |g1| + |g2|) (|d1| + |d2|),
// which meets the weights with d0, d1, d2, and of the second
//   (|g0| + |g1| + |g2|) (|d1| + |d2|) + |g2| (|d1| + |d3|),
// which meets them with d1, d2, d3. Sorted by weights, T is at most the convolution of |W| with
//   e0 = |d0| + |d1| + 2 |d2|,   e1 = e2 = |d1| + |d2|,   e3 = 2 |d1| + |d2| + |d3|
// in place of the tile's pixels. A tile has its own radii, so the centre's error joins them tile by
// tile: with S(v) the convolution of |W| with the pixels v of the tile that an output meets,
//   |yc - sum W c| <= gamma_n S(e(c)),   S(v) - yr(v) <= gamma_n S(e(v)) <= 4 gamma_n S(max v)
// take the place of (1) and (2) in interval.h: r' has gamma_n e(c), times 1 + H in deployed mode,
// in place of gamma_D |c|, and then all radii of a tile get the product's own error,
//   r'' = r' + g t,   t = max r' of the tile,   g = 4 gamma_n / (1 - 4 gamma_n),
// as yr(r'') >= S(r') + g t S(1) - 4 gamma_n (1 + g) t S(1) = S(r'). Zeros beside a row are pixels
// like others: their r'' is not zero. What underflows is below K 2^-148 (1 + max |x|), which the
// offset of interval.h has to spare; sums beyond the range of float, which may be reached earlier
// than by the plain sum, give infinite ends.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace interval {

struct Constants;

constexpr int64_t kFilters = 4;        // products of a tile
constexpr int64_t kTileGroup = 16;     // tiles of a register
constexpr int64_t kGroupsOfBlock = 4;  // of a block, whose products share a pass over W
constexpr int64_t kBlockTiles = kTileGroup * kGroupsOfBlock;
constexpr int64_t kFilterRun = 32;   // terms of a sum in registers
constexpr int64_t kLineMargin = 16;  // zeros before a line
constexpr int64_t kLineEnd = 64;     // and after its tiles

// Roundings that a term passes on its way; `terms` counts channels times rows of the window.
constexpr int64_t filter_depth(int64_t terms) {
  return kFilterRun + (terms + kFilterRun - 1) / kFilterRun + 8;
}

// Rows of a channel as tiles. Lines hold pixel m at [m], with zeros around it as above. A few rows
// at once: loads wait where they straddle stores just made.
constexpr int64_t kRowsAtOnce = 8;
struct FilterRows {
  int64_t rows;  // at most kRowsAtOnce
  int64_t line;  // from one line to the next
  const float* centre;
  const float* radius;
  int64_t tiles;        // of a row
  float centre_error;   // gamma_n, times 1 + H in deployed mode; 0: radii stay as they are
  float radius_error;   // g
  float input_floor;    // of r'
  float* centre_tiles;  // (kFilters, rows, tiles), `plane` apart; up to 15 floats more are written
  float* radius_tiles;
  int64_t plane;
};

// U of whole rows of W and of |W|.
struct FilterWeights {
  const float* weight;  // (rows, terms, 3)
  int64_t count;        // rows times terms
  float* centre;        // (kFilters, `plane` apart)
  float* radius;
  int64_t plane;
};

// M of up to kGroupsOfBlock groups of tiles.
struct FilterProduct {
  const float* tiles;  // at the first tile; planes as above
  int64_t plane;
  const int64_t* places;  // (terms) from there
  const float* weight;    // (kFilters, rows, terms), `weight_plane` apart
  int64_t weight_plane;
  int64_t rows;
  int64_t terms;
  int64_t groups;
  float* sums;  // (kFilters, rows, kBlockTiles)
};

// Ends of the first `pixels` pixels of the tiles: out[n * row_stride + pixel].
struct FilterEnds {
  const float* centre;  // sums
  const float* radius;
  const float* bias;  // (rows) or null
  float offset;
  int64_t rows;
  int64_t pixels;
  int64_t row_stride;
  float* out_lower;
  float* out_upper;
};

struct FilterKernels {
  void (*tiles)(const FilterRows& work) = nullptr;
  void (*weights)(const FilterWeights& work) = nullptr;
  void (*product)(const FilterProduct& work) = nullptr;
  bool (*ends)(const FilterEnds& work, const Constants& constants) = nullptr;  // whether all finite
};

}  // namespace interval
}  // namespace pyrobust
