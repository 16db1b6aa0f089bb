// Convolutions with windows of 3 x 3 by minimal filtering (Winograd 1980) along rows, and along
// columns where "Squares" below says so. F(2, 3) makes
// two neighbouring outputs of three weights from four products instead of six: the pixels d0 ... d3
// of a tile and the weights g0, g1, g2 of a row of the window become
//
//   V = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),   U = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2,
//   g2),
//
// M_i = sum of U_i V_i over channels and rows of the window, and the outputs are M_0 + M_1 + M_2
// and M_1 - M_2 - M_3. F(4, 3) makes four from six products instead of twelve, with
//
//   V = (4 d0 - 5 d2 + d4, -4 d1 - 4 d2 + d3 + d4, 4 d1 - 4 d2 - d3 + d4, -2 d1 - d2 + 2 d3 + d4,
//        2 d1 - d2 - 2 d3 + d4, 4 d1 - 5 d3 + d5),
//   24 U = (6 g0, -4 (g0 + g1 + g2), -4 (g0 - g1 + g2), g0 + 2 g1 + 4 g2, g0 - 2 g1 + 4 g2, 24 g2),
//
// and the outputs M_0 + M_1 + M_2 + M_3 + M_4, M_1 - M_2 + 2 (M_3 - M_4), M_1 + M_2 + 4 (M_3 + M_4)
// and M_1 - M_2 + 8 (M_3 - M_4) + M_5. It loses more digits, which the small radii can bear:
// centres are multiplied with the filters of W by F(2, 3); radii with those of |W| by F(4, 3) where
// rows are a multiple of 16 outputs, else by F(2, 3).
//
// Convolutions of stride 2 meet every second pixel with g0 and g2, and the others with g1: two
// outputs of five pixels take
//
//   V = (d0 - d2, d2, d2 - d4, d1, d3),   U = (g0, g0 + g2, g2, g1, g1),
//
// five products instead of six, and are M_0 + M_1 + M_3 and M_1 - M_2 + M_4, of centres and of
// radii.
//
// Proof of the bounds. The identities are exact in real numbers; each term U_i V_i of an output
// passes at most n roundings: 2 of U, 1 of V (F(4, 3): 3), those of the sum, 2 of the outputs (5).
// Of centres n is counted for each channel, as a sum runs over channels.
// So a computed output differs from the exact one by at most gamma_n T and what underflows, where T
// is the same expression with magnitudes for all terms, |g| for g and |d| for d. For F(2, 3) it is
//   |g0| (|d0| + |d2|) + (|g0| + |g1| + |g2|) (|d1| + |d2|),
// of the first output, which meets the weights with d0, d1, d2, and of the second, which meets them
// with d1, d2, d3,
//   (|g0| + |g1| + |g2|) (|d1| + |d2|) + |g2| (|d1| + |d3|).
// Sorted by weights, T is at most the convolution of |W| with
//   e0 = |d0| + |d1| + 2 |d2|,   e1 = e2 = |d1| + |d2|,   e3 = 2 |d1| + |d2| + |d3|
// in place of the tile's pixels. In the same way, for F(4, 3), with p = 4 |d0| + 5 |d2| + |d4|,
// q = 4 |d1| + 4 |d2| + |d3| + |d4|, s = 2 |d1| + |d2| + 2 |d3| + |d4|, t = 4 |d1| + 5 |d3| + |d5|
// the weight g_k of output o has p / 4 (of output 0 for g0) and q / 3 and 2^o 2^k s / 12 and t (of
// output 3 for g2), so that T is at most the convolution with
//   f0 = p / 4 + q / 3 + s / 12,   fm = q / 3 + 2^m s / 12 (m = 1 ... 4),   f5 = q / 3 + 8 s / 3 +
//   t.
// And with stride 2 T is at most the convolution with
//   e0 = |d0| + 2 |d2|,   ei = |di| (i = 1, 2, 3),   e4 = 2 |d2| + |d4|,   e(e(v)) <= 2 e(v).
// Tiles have their own radii, so errors join them tile by tile: with S(v) the convolution of |W|
// with the pixels v of the tile that an output meets,
//   |yc - sum W c| <= gamma_n S(e(c)),   S(v) - yr(v) <= gamma_n S(e(v)), or f for e,
// take the place of (1) and (2) in interval.h: r' has gamma_n e(c) in place of gamma_D |c|, times
// 1 + H in deployed mode (of both tiles of a shared pixel the larger), and then the product's own
// error, r'' = r' + g e(r'), g = gamma_n / (1 - 256 gamma_n). As the entries of e, and of f, are
// sums of few of one another's pixels, errors of errors are small:
//   e(e(v)) <= 4 e(v),   f(f(v)) <= 256 f(v)
// (f1 ... f4 have the pixels d1 ... d4 alone, are within a factor 8 of f1, and sum to 20 at most
// for ones; f0 >= f1 / 2 has d0 with the factor 1 besides, and d2, d4; f5 >= f1 has d5 with the
// factor 1). Hence yr(r'') >= S(r'') - gamma_n S(e(r'')) >= S(r') + (g - gamma_n (1 + 256 g))
// S(e(r')) = S(r'). Zeros beside a row are pixels like others: their r'' is not zero. What
// underflows is below K 2^-148 (1 + max |x|), which the offset of interval.h has to spare; sums
// beyond the range of float, which may be reached earlier than by the plain sum, give infinite
// ends.
//
// Squares. Where output rows are a multiple of kPartPixels and few enough, and even in number, the
// columns of a tile are filtered as well as its rows: two output rows of four lines (stride 2:
// five) by F(2, 3) (stride 2: F(2, 2)), of centres and of radii, whose rows keep F(4, 3). With By,
// Gy, Ay for the columns V = By D Bx', U = Gy G Gx' and the outputs Ay M Ax', so an output meets a
// weight and a pixel with a product of a factor for rows and one for columns, and the magnitudes
// that T sums up are such products too. Each factor is at most the entry of its own e, or f, by
// which T is at most the convolution of |W| with ey(ex(v)): ex along each line, then ey down each
// column. As such functions of rows and of columns commute and have entries >= 0,
//   ey(ex(ey(ex(v)))) = ey(ey(ex(ex(v)))) <= 4 * 256 ey(ex(v)),
// of which 1024 takes the place of 256 in g. Each form rounds as often as before, one after the
// other: a term passes those of rows, those of columns and those of the sum, which runs over
// channels alone.
//
// Radii on tiles. Where they may be multiplied in bfloat16 on AMX, radii of rows of a multiple of
// 16 outputs are not filtered: their product as it is takes a sixteenth of an FMA's time. A pixel
// then has one radius for all of its tiles: r' takes the largest of its e, from the tile that
// begins with it or its left neighbour and the one before, and the coarse bound of interval.h takes
// the place of r''.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace interval {

struct Constants;
struct Ends;

constexpr int64_t kQuadFilters = 6;     // of a tile of four outputs
constexpr int64_t kFilters = 4;         // products of a tile
constexpr int64_t kStridedFilters = 5;  // of a tile of a convolution of stride 2
constexpr int64_t kTileGroup = 16;      // tiles of a register
constexpr int64_t kGroupsOfBlock = 4;   // of a block, whose products share a pass over W
constexpr int64_t kBlockTiles = kTileGroup * kGroupsOfBlock;
constexpr int64_t kFilterRun = 32;  // terms of a sum in registers
// the same of squares: 32 would save 3% of time (128 channels) for half as much widening again
constexpr int64_t kSquareRun = 16;
constexpr double kSquareGrowth = 1024.0;
constexpr int64_t kLineMargin = 16;  // zeros before a line
constexpr int64_t kLineEnd = 64;     // and after its tiles

// Roundings that a term passes on its way; `terms` counts channels times rows of the window.
constexpr int64_t kPairRoundings = 5;   // outside of the sum: F(2, 3)
constexpr int64_t kQuadRoundings = 10;  // and F(4, 3)
constexpr int64_t filter_depth(int64_t terms, bool quads) {
  return kFilterRun + (terms + kFilterRun - 1) / kFilterRun +
         (quads ? kQuadRoundings : kPairRoundings);
}

// Rows of a channel as tiles. Lines hold pixel m at [m], with zeros around it as above. A few rows
// at once: loads wait where they straddle stores just made.
constexpr int64_t kRowsAtOnce = 8;
struct FilterRows {
  int64_t rows;  // at most kRowsAtOnce
  int64_t line;  // from one line to the next
  const float* centre;
  const float* radius;
  int64_t tiles;       // of a row, of two outputs
  bool quads;          // whether radii have tiles of four outputs: of rows of 16 outputs a multiple
  bool strided;        // whether the convolution has stride 2: of rows of 8 outputs a multiple
  float centre_error;  // gamma_n, times 1 + H in deployed mode; 0: radii stay as they are
  float radius_error;  // g
  float input_floor;   // of r'
  // (kFilters or kStridedFilters, rows, tiles), `plane` apart; up to 15 floats more are written
  float* centre_tiles;
  int64_t plane;
  float* radius_tiles;  // the same, or (kQuadFilters, rows, tiles / 2); null: not filtered
  int64_t radius_plane;
};

// U of whole rows of W and of |W|.
struct FilterWeights {
  const float* weight;  // (rows, terms, 3)
  int64_t count;        // rows times terms
  bool quads;
  bool strided;
  float* centre;  // (kFilters or kStridedFilters, `plane` apart)
  float* radius;  // the same, or kQuadFilters; null: not filtered
  int64_t plane;
};

// M of up to kGroupsOfBlock groups of tiles.
struct FilterProduct {
  int64_t filters;
  const float* tiles;  // at the first tile; planes as above
  int64_t plane;
  const int64_t* places;  // (terms) from there
  const float* weight;    // (filters, rows, terms), `weight_plane` apart
  int64_t weight_plane;
  int64_t rows;
  int64_t terms;
  int64_t run;  // terms of a sum in registers
  int64_t groups;
  float* sums;  // (filters, rows, sum_stride)
  int64_t sum_stride;
};

// Ends of the first `pixels` pixels of the tiles: out[n * row_stride + pixel].
struct FilterEnds {
  bool quads;
  bool strided;
  bool tiled;           // radii are sums of pixels, (rows, kTiledPixels)
  const float* centre;  // sums, of kBlockTiles tiles, twice as many with quads
  const float* radius;  // sums of kBlockTiles tiles
  const float* bias;    // (rows) or null
  float offset;
  int64_t rows;          // of the sums
  int64_t first, count;  // of the rows whose ends are asked for; bias and out begin with the first
  int64_t pixels;
  int64_t row_stride;
  float* out_lower;
  float* out_upper;
  bool past_cache;  // whether ends go to memory directly
};

// r' of rows of a channel in bfloat16, in words of two channels.
struct FilterRadii {
  int64_t rows;
  int64_t line;  // lines as in FilterRows
  const float* centre;
  const float* radius;
  bool strided;
  bool second;  // whether the channel is the second of its pair, or makes words with zeros
  float centre_error;
  float input_floor;
  uint32_t*
      words;  // (rows, row_size): pixels, or with stride 2 the even ones and then the odd ones
  int64_t row_size;
};

// Sums of |W| times such radii for groups of 16 neighbouring pixels.
constexpr int64_t kTiledPixels = 2 * kBlockTiles;
struct RadiusProduct {
  const uint32_t* words;
  const int64_t* bases;   // (groups) where their first pixels are
  const int64_t* places;  // (taps) from there
  int64_t taps;
  int64_t plane;          // words of a pair of channels
  int64_t pairs;          // of channels, whole tiles
  const uint32_t* sizes;  // as round_channels of the same set orders them
  int64_t size_stride;
  int64_t rows;
  int64_t groups;
  float* sums;  // (coarse_rows(rows), kTiledPixels)
};

struct TiledFilterKernels {
  void (*radii)(const FilterRadii& work) = nullptr;
  void (*product)(const RadiusProduct& work) = nullptr;
};

// Some lines of a channel as tiles of two output rows, J products down a column: 4, with stride 2
// kStridedFilters. Outputs are parts, sixteen pixels of both rows, which go along rows and then
// down.
constexpr int64_t kPartPixels = 16;  // of a row
constexpr int64_t kSquareParts = 8;  // at most
struct SquareRows {
  int64_t parts;
  int64_t of_row;
  int64_t line;  // lines as in FilterRows
  const float* centre;
  const float* radius;
  bool strided;
  float centre_error;  // as in FilterRows
  float radius_error;
  float input_floor;
  // (J, products along a row, tiles), `plane` apart; whole registers are written
  float* centre_tiles;
  int64_t plane;
  float* radius_tiles;  // along rows of kQuadFilters, with stride 2 as of centres
  int64_t radius_plane;
};

// Ends of such parts, which begin with a row: out[n * row_stride + pixel].
struct SquareEnds {
  bool strided;
  const float* centre;  // sums of 8 kSquareParts tiles
  const float* radius;  // of 4 kSquareParts, with stride 2 as of centres
  const float* bias;    // (rows) or null
  float offset;
  int64_t rows;          // of the sums
  int64_t first, count;  // as in FilterEnds
  int64_t parts;
  int64_t of_row;
  int64_t row_stride;
  float* out_lower;
  float* out_upper;
  bool past_cache;
};

struct SquareKernels {
  // adds 1 where an input may be other than zero, as nonzero_terms counts
  void (*count)(const Ends& ends, int32_t* counts) = nullptr;
  void (*tiles)(const SquareRows& work) = nullptr;
  // of (count, 3, 3) kernels, to (J, products along a row) planes
  void (*weights)(const FilterWeights& work) = nullptr;
  bool (*ends)(const SquareEnds& work, const Constants& constants) = nullptr;
};

struct FilterKernels {
  void (*tiles)(const FilterRows& work) = nullptr;
  void (*weights)(const FilterWeights& work) = nullptr;
  void (*product)(const FilterProduct& work) = nullptr;
  bool (*ends)(const FilterEnds& work, const Constants& constants) = nullptr;  // whether all finite
  SquareKernels squares = {};
};

}  // namespace interval
}  // namespace pyrobust
