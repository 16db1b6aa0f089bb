// Internal to the interval family: what an instruction set supplies.
#pragma once

#include <cstdint>

#include "core/rounding.h"
#include "interval/curves.h"
#include "interval/filtering.h"
#include "interval/pairs.h"
#include "matmul/matmul.h"

namespace pyrobust {
namespace interval {

// How every kernel sums: runs of at most kRun terms, kRunsOfChunk runs make a chunk, chunks are
// added in a row. Products, lanes and the last reduction cost at most 8 roundings more. Runs of 64
// are no faster (128 x 1024 x 1024, convolutions), runs of 16 cost 5% of time.
constexpr int64_t kRun = 32;
constexpr int64_t kRunsOfChunk = 8;
constexpr int64_t kChunk = kRun * kRunsOfChunk;
PYROBUST_HD constexpr int64_t sum_depth(int64_t terms) {
  return (terms < kRun ? terms : kRun) + kRunsOfChunk + (terms + kChunk - 1) / kChunk + 8;
}

// Additions that the sum of part `index` passes when `count` parts are added in a row, from zero.
constexpr int64_t additions_after(int64_t index, int64_t count) {
  return count - (index > 0 ? index : 1);
}

// And those that the sum of a term's run passes, of `total` terms in a row.
constexpr int64_t additions_after_run(int64_t term, int64_t total) {
  const int64_t chunk = term / kChunk, left = total - chunk * kChunk;
  const int64_t runs = left < kChunk ? (left + kRun - 1) / kRun : kRunsOfChunk;
  return additions_after(term % kChunk / kRun, runs) +
         additions_after(chunk, (total + kChunk - 1) / kChunk);
}

// Inputs side by side: a panel holds, for every term, kLanes centres and then kLanes radii.
constexpr int64_t kLanes = 8;
constexpr int64_t kPanelWidth = 2 * kLanes;
// How many panels share one pass over a block of W, with radii in bfloat16 and without, and how
// many are packed and finished together.
constexpr int64_t kPanelsOfTile = 4;
constexpr int64_t kPanelsOfCoarseTile = 4;
constexpr int64_t kMaxPanels = 8;

// Pairs of neighbouring terms; the last may be half empty.
constexpr int64_t pairs_of(int64_t terms) { return (terms + 1) / 2; }

// The numbers of interval.h that depend on the mode and on K only.
struct Constants {
  float centre_gain;  // g_c, or A where radii are widened term by term
  float term_gain;    // of a term for each of its roundings, where they are counted
  float radius_gain;  // 1 + g_x
  float input_floor;  // 2^-100, or 0 in nearest mode
  float inflate;      // of the radius sum
  float bias_gain;    // of |b|: H in deployed mode, else 0
  float value_gain;   // of |yc + b|: H in deployed mode, else 0
  float limit;        // ends are infinite where R reaches it
  float least;        // in deployed mode 2^-126: an end between it and zero may be flushed, so it
                      // becomes zero; else 0
  bool outward;       // false in nearest mode
};

// (c, r') of `count` elements; returns the largest |c| + r, at least 0, infinite where an input is
// not finite.
struct Ends {
  const float* lower;
  const float* upper;
  int64_t count;
  float floor;  // ends below count as this: 0 after a ReLU, else -inf
};

// Rows (lanes, terms) of centres and radii side by side in one panel; absent lanes become zero.
struct PackRows {
  const float* centre;
  const float* radius;
  int64_t lanes;  // at most kLanes
  int64_t terms;
  int64_t stride;  // from one row to the next
  float* panel;
};

// Patches of a few panels of output pixels; absent lanes repeat the last.
struct PackPatches {
  const float* centre;  // images with their padding
  const float* radius;
  const int64_t* image;    // (panels) where the image of each starts
  const int64_t* first;    // (panels) its first output pixel, row-major
  int64_t panels;          // at most kMaxPanels
  const int64_t* rows;     // (channels * kernel_height) offsets within an image
  const int64_t* columns;  // (kernel_width)
  int64_t channels, kernel_height, kernel_width;
  int64_t row_size;           // floats of an image's row
  int64_t row_step;           // rows from an output row to the next
  int64_t out_width, pixels;  // of an output image
  float* packed;
  int64_t panel_stride;
};

// The columns of a row to their places by remainder modulo the stride.
struct SpreadColumns {
  const float* line;  // (width)
  int64_t width;
  int64_t pad;  // columns of padding on the left
  int64_t stride;
  int64_t phase_size;  // places of a remainder
  float* row;
};

// r' of a panel that holds plain radii: terms [begin, begin + terms) of sums of `total` terms.
struct WidenPanel {
  float* panel;
  int64_t begin, terms, total;     // `begin` is a multiple of kChunk
  const Constants* const* inputs;  // (kLanes)
};

// The same of one input, for `dots`.
struct WidenRow {
  const float* centre;
  float* radius;
  int64_t terms;
};

// yc and yr of `rows` weight rows for a few inputs: sums[b * sum_stride + n].
struct Dots {
  const float* centre;  // (batch, terms)
  const float* radius;  // (batch, terms)
  const float* weight;  // (rows, terms)
  int64_t batch;
  int64_t rows;
  int64_t terms;
  float* centre_sums;
  float* radius_sums;
  int64_t sum_stride;
};

// The same for one input and packed rows [first, first + rows), decoded on the way; the input is in
// the order of `fused_order`, with zeros past the last term.
struct PackedDots {
  const float* centre;
  const float* radius;
  const matmul::PackedMatrix* weight;
  int64_t first;
  int64_t rows;
  float* scratch;      // (2, rows, groups of a row)
  float* centre_sums;  // (rows)
  float* radius_sums;
};

// The same for a few panels: sums (rows, kPanelWidth) of each, centres then radii.
// Ends of the inputs of panels, from the first row of a tile on, that are written next: their lines
// may be fetched for writing meanwhile. None where null.
struct NextEnds {
  const float* lower = nullptr;
  const float* upper = nullptr;
  int64_t lanes = 0;
  int64_t lane_stride = 0;
};

struct Tiles {
  const float* panel;  // (terms, kPanelWidth) each
  int64_t panels;
  int64_t panel_stride;
  const float* weight;  // (rows, terms)
  int64_t weight_stride;
  int64_t rows;
  int64_t terms;
  float* sums;
  int64_t sum_stride;  // from one panel's to the next
  bool add;            // to the sums of whole chunks before these terms
  NextEnds next = {};  // of these panels
};

// Factors of rows by which runs of kRun terms of W are whole numbers of at most 255, as bfloat16
// holds exactly: the scales of a packed weight.
struct RunFactors {
  const float* values = nullptr;  // (rows, stride), 0 where W is; null where there are none
  int64_t stride = 0;
  int64_t of_group = 0;  // runs of a group, which share their factors
  int64_t first = 0;     // the first of these runs, counted from the first group

  RunFactors from(int64_t row, int64_t run) const {
    if (values == nullptr) return {};
    return {values + row * stride + run, stride, of_group, first + run};
  }
  // The end of the group that holds a run.
  int64_t group_end(int64_t run) const { return ((first + run) / of_group + 1) * of_group - first; }
};

// |W| rounded up to bfloat16, two terms in a word, the first in its low half. Kernels may read
// whole tiles of kCoarseRows rows and kCoarsePairs words, from any row on.
constexpr int64_t kCoarseRows = 16, kCoarsePairs = 16;
constexpr int64_t coarse_rows(int64_t rows) {
  return (rows + kCoarseRows - 1) / kCoarseRows * kCoarseRows;
}
constexpr int64_t coarse_pairs(int64_t pairs) {
  return (pairs + kCoarsePairs - 1) / kCoarsePairs * kCoarsePairs;
}
// Words for `rows` rows of them, of which tiles start at any row.
constexpr int64_t coarse_sizes(int64_t rows, int64_t stride) {
  return (rows + kCoarseRows - 1) * stride;
}
struct RoundSizes {
  const float* weight;  // (rows, terms)
  int64_t stride;
  int64_t rows;
  int64_t terms;
  uint32_t* sizes;          // (coarse_rows(rows), size_stride); zero where W has no terms
  int64_t size_stride;      // coarse_pairs(pairs_of(terms))
  RunFactors factors = {};  // where there are any, sizes are |W| divided by them
};

// Up to kPanelsOfCoarseTile panels side by side, as coarse_tiles of the same set reads them:
// centres and pairs of radii rounded up.
struct GatherPanels {
  const float* panel;
  int64_t panels;
  int64_t panel_stride;
  int64_t terms;
  float* to;  // coarse_gathered(terms) of them
};
constexpr int64_t coarse_gathered(int64_t terms) {
  return coarse_pairs(pairs_of(terms)) * 3 * kLanes * kPanelsOfCoarseTile;
}

// The same with radii and |W| rounded up to bfloat16.
struct CoarseTiles {
  Tiles tiles;  // without `panel`
  float* gathered;
  const uint32_t* sizes;  // (rows, pairs of terms): |W| as round_sizes gives it
  int64_t size_stride;
  float* scratch;           // coarse_scratch() of them
  RunFactors factors = {};  // sums of a group are multiplied by them as they join the others
};

// The same for groups of sixteen neighbouring output pixels of a convolution, without panels: every
// term is a place of a prepared image. The sums of a group are those of two panels.
constexpr int64_t kPixels = 2 * kLanes;
constexpr int64_t kGroupsAtOnce = 2;
struct Direct {
  const float* centre;
  const float* radius;
  int64_t bases[kGroupsAtOnce];  // where the groups start in the image
  int64_t groups;                // at most kGroupsAtOnce
  const int64_t* places;         // (terms) from there; coarse: of the first terms of pairs
  const float* weight;           // (rows, terms)
  int64_t rows;
  int64_t terms;
  float* sums;         // (groups, 2, rows, kPanelWidth)
  int64_t sum_stride;  // from one panel's to the next
};

// A channel of an image into its plane, whose rows follow one another at `row_size`. Up to kPixels
// floats after the last column of a row, or of either half of it, become zeros.
struct FillPlane {
  Ends ends;  // (rows, width)
  int64_t width;
  int64_t row_size;
  int64_t even;  // where the first column goes in a row, and every second one after it
  int64_t odd;   // and where the others; 0 where all are neighbours
  float* centre;
  float* radius;
};

// Ends of a convolution of one channel. kPixels floats past the plane may be read.
struct Plane {
  const float* centre;  // with its padding
  const float* radius;
  const int64_t* columns;  // (kernel_width) offsets within a row
  int64_t kernel_height, kernel_width;
  int64_t kernel_step;  // floats from a row of the kernel to the next
  int64_t row_step;     // and from an output row to the next
  int64_t out_height, out_width;
  const float* weight;  // (kernel_height, kernel_width)
  float shift;
  float offset;
  float* out_lower;  // (out_height, out_width)
  float* out_upper;
  bool past_cache;
};

// The most terms that are summed in one run: as sum_depth allows.
constexpr int64_t kMostTaps = 49;
static_assert(sum_depth(kMostTaps) >= kMostTaps, "a run rounds its first term kMostTaps times");

// The same with radii and |W| rounded up to bfloat16. The terms of a pair are the same place of two
// neighbouring channels; pairs run over (pair of channels, place of the window).
struct CoarseDirect {
  Direct direct;
  const uint32_t* radii;  // of pairs of channels, each plane as large as a channel's; zeros follow
  int64_t radius_bases[kGroupsAtOnce];
  const int64_t* radius_places;  // (terms / 2)
  int64_t plane;                 // from one channel to the next in the image
  int64_t taps;                  // places of the window
  const int64_t* weights;        // (terms / 2) of the first terms in a row of W
  const uint32_t* sizes;         // (rows, size_stride), as round_channels of the same set orders it
  int64_t size_stride;           // taps times coarse_pairs(pairs of channels)
  float* scratch;                // coarse_scratch() of them
};

// |W| rounded up, the terms paired as above.
struct RoundChannels {
  const float* weight;  // (rows, terms)
  int64_t rows;
  int64_t terms;
  int64_t taps;
  uint32_t* sizes;  // coarse_sizes(rows, size_stride) of them, zero before
  int64_t size_stride;
};

// Sums of radii of some rows of W times 32 inputs.
constexpr int64_t kCoarseBlock = 48;
constexpr int64_t coarse_scratch() { return kCoarseBlock * 32; }

// The most terms whose products with radii a kernel adds up before it adds the result to others.
constexpr int64_t kCoarseChain = 2 * kChunk;

// Ends of `count` outputs of one input from yc[n], yr[n], bias[n] (or null). Both functions that
// make ends return whether all of them are finite.
struct FinishRow {
  const float* centre_sums;
  const float* radius_sums;
  const float* bias;
  float offset;
  int64_t count;
  float* out_lower;
  float* out_upper;
};

// Ends of the first `lanes` inputs of a panel: out[n * row_stride + lane * lane_stride]; one of the
// strides is 1. Where that is lane_stride, `lanes` may count the lanes of several panels.
struct FinishPanel {
  const float* sums;
  const float* bias;
  const float* offsets;  // kLanes of them
  int64_t rows;
  int64_t lanes;
  int64_t row_stride;
  int64_t lane_stride;
  int64_t sum_stride;  // from one panel's sums to the next
  float* out_lower;
  float* out_upper;
  bool past_cache = false;  // whether ends go to memory directly
};

// Sums of the ends of two boxes.
struct SumLoop {
  const float *low_x, *high_x, *low_y, *high_y;
  float floor_x, floor_y;  // ends below count as these
  int64_t count;
  float least;  // as in Constants
  bool outward;
  float* out_lower;
  float* out_upper;
  bool past_cache = false;  // whether ends go to memory directly, where the set can
};

// (x - mean) scale + shift of the ends of a box, in float64.
struct AffineLoop {
  const float* first;  // the ends that give the lower ones: upper where the scale is negative
  const float* last;
  float floor;
  int64_t count;
  double mean, scale, shift;
  double value_error, input_error, error;  // times |(x - mean) scale|, times |x|, and the rest
  double limit;  // of |x|: beyond, an evaluation in float32 may overflow, and ends are not finite
  float least;
  float* out_lower;
  float* out_upper;
  bool past_cache = false;
};

// The same where every end is of another channel, and the numbers of end i's stand at i; they may
// be read up to kLanes further than `count`. No `input_error` and no `limit`: zero and none.
struct AffineColumns {
  const float *lower, *upper;
  float floor;
  int64_t count;
  const double *mean, *scale, *shift;
  double value_error;
  const double *input_error, *error, *limit;
  float least;
  float *out_lower, *out_upper;
};

// Gradients of the affine map for the ends of a channel: of the input's ends, unless null, and what
// is added to those of the scale and the shift.
struct AffineGradients {
  const float *of_lower, *of_upper;  // gradients of what `lower` and `upper` give
  const float *lower, *upper;
  float floor;  // ends that are not above give no gradient
  int64_t count;
  double mean, scale;
  float *to_lower, *to_upper;
  double *to_scale, *to_shift;
};

// The same where every end is of another channel.
struct AffineColumnGradients {
  const float *of_lower, *of_upper;  // gradients of the outputs' ends
  const float *lower, *upper;
  float floor;
  int64_t count;
  const double *mean, *scale;
  float *to_lower, *to_upper;
  double *to_scale, *to_shift;
};

// Numbers within `radius` of those of x, cut to [first, last].
struct BallLoop {
  const float* x;
  int64_t count;
  double radius;
  float first, last, least;
  bool outward;
  float* out_lower;
  float* out_upper;
};

// Those that make ends tell whether all are finite, of balls also whether all meet [first, last].
struct ElementLoops {
  bool (*sum)(const SumLoop& work) = nullptr;
  bool (*affine)(const AffineLoop& work) = nullptr;
  bool (*nearest_affine)(const AffineLoop& work) = nullptr;
  bool (*columns)(const AffineColumns& work) = nullptr;
  bool (*nearest_columns)(const AffineColumns& work) = nullptr;
  void (*gradients)(const AffineGradients& work) = nullptr;
  void (*column_gradients)(const AffineColumnGradients& work) = nullptr;
  bool (*ball)(const BallLoop& work) = nullptr;
};

// Ends of a box under a function of one number; what the numbers mean stands in curves.h.
struct CurveLoop {
  CurveOf of;
  const float *lower, *upper;
  int64_t count;
  Rounding rounding;
  CurveErrors deployed;
  float *out_lower, *out_upper;
};

struct CurveGradients {
  CurveOf of;
  const float *of_lower, *of_upper, *lower, *upper;
  int64_t count;
  float *to_lower, *to_upper;
};

struct CurveValues {
  CurveOf of;
  const float* x;
  int64_t count;
  double* out;
};

struct CurveLoops {
  bool (*ends)(const CurveLoop& work) = nullptr;  // whether all are finite
  void (*gradients)(const CurveGradients& work) = nullptr;
  void (*values)(const CurveValues& work) = nullptr;
};

struct PairLoops {
  bool (*ends)(const BoxPair& work) = nullptr;  // as bound_pair
  void (*gradients)(const PairBackward& work) = nullptr;
  bool (*constant)(const BoxConstant& work) = nullptr;  // as bound_constant
  void (*constant_gradients)(const ConstantBackward& work) = nullptr;
};

struct RadiusLoops {
  void (*panel)(const WidenPanel& work) = nullptr;
  void (*row)(const WidenRow& work, const Constants& constants) = nullptr;
  // Terms of each lane of a panel with plain radii that may be other than zero.
  void (*count)(const float* panel, int64_t terms, int32_t* nonzero) = nullptr;
};

// Inputs whose radii are all the same, in panels of kPanelWidth centres (uniform_inputs.h).
struct RadiusRange {
  float least, most;  // radii as `prepare` makes them; `least` is -inf where one is not finite
  float size;         // the largest |x|
};

// Bounds of the errors of the centres of terms [begin, begin + terms), of sums of `total` terms, as
// widen.panel adds to radii.
struct PanelErrors {
  const float* panel;
  int64_t begin, terms, total;     // `begin` is a multiple of kChunk
  const Constants* const* inputs;  // (kPanelWidth)
  bool counted;                    // whether roundings are counted by their places
  float* norms;                    // (runs, kPanelWidth): at least the root of the sum of squares
  float* most;                     // (kPanelWidth): grows to the largest error
};

// Bounds of the sums of |W| of a row and of the norms of its runs, for terms [begin, begin +
// terms).
constexpr int64_t kWeighedTerms = 16 * kRun;
struct WeighRows {
  const float* weight;
  int64_t stride;
  int64_t rows;
  int64_t begin, terms;  // `begin` a multiple of kRun, at most kWeighedTerms terms
  bool outward;          // or else sums in plain rounding, and no norms
  float* sizes;          // (rows, size_stride): the sum so far, then the norms of all runs
  int64_t size_stride;
};

// Sums of centres and radii (rows, kPanelWidth) become those of two panels, in the same memory. A
// radius is at most `top` times the sum of |W|.
struct JoinSums {
  float* centres;
  float* radii;
  int64_t rows;
  const float* top;    // (kPanelWidth)
  const float* sizes;  // (rows), size_stride apart
  int64_t size_stride;
};

struct UniformLoops {
  void (*tiles)(const Tiles& work) = nullptr;  // sums of W, not |W|, times all of a panel
  RadiusRange (*range)(const Ends& ends) = nullptr;
  void (*errors)(const PanelErrors& work) = nullptr;
  void (*weigh)(const WeighRows& work) = nullptr;
  void (*join)(const JoinSums& work) = nullptr;
};

struct IntegerKernels;  // integers.h

struct IntervalKernels {
  float (*prepare)(const Ends& ends, const Constants& constants, float* centre,
                   float* radius) = nullptr;
  void (*pack)(const PackRows& work) = nullptr;
  void (*patches)(const PackPatches& work) = nullptr;
  void (*spread)(const SpreadColumns& work) = nullptr;
  void (*dots)(const Dots& work) = nullptr;
  void (*tiles)(const Tiles& work) = nullptr;
  bool (*finish_row)(const FinishRow& work, const Constants& constants) = nullptr;
  bool (*finish_panel)(const FinishPanel& work, const Constants& constants) = nullptr;
  ElementLoops elements = {};  // all or none
  CurveLoops curves = {};      // all or none
  PairLoops pairs = {};        // all or none
  RadiusLoops widen = {};      // all or none
  UniformLoops uniform = {};   // all or none
  const IntegerKernels* integers = nullptr;
  // Null from here on: the set has no such path, nor does the portable one.
  void (*direct)(const Direct& work) = nullptr;
  // Both or none; the first returns the largest |x| as `prepare` does.
  float (*fill_plane)(const FillPlane& work, const Constants& constants) = nullptr;
  bool (*plane)(const Plane& work, const Constants& constants) = nullptr;
  // Packed weights without decoding to memory: how many columns an ordered input takes, 0 for a
  // format that must be decoded; and one row's order.
  int64_t (*fused_columns)(const matmul::PackedMatrix& weight) = nullptr;
  void (*fused_order)(const matmul::PackedMatrix& weight, const float* x, float* out) = nullptr;
  void (*fused_dots)(const PackedDots& work) = nullptr;
  FilterKernels filter = {};  // all or none
  // Products of bfloat16.
  void (*round_sizes)(const RoundSizes& work) = nullptr;
  void (*gather_panels)(const GatherPanels& work) = nullptr;
  void (*coarse_tiles)(const CoarseTiles& work) = nullptr;
  void (*round_channels)(const RoundChannels& work) = nullptr;
  // Radii of neighbouring channels, `plane` floats each, rounded up to pairs.
  void (*pair_channels)(const float* radius, int64_t channels, int64_t plane,
                        uint32_t* radii) = nullptr;
  void (*coarse_direct)(const CoarseDirect& work) = nullptr;
  int64_t coarse_channels = 2;           // the fewest of a group that coarse_direct takes
  TiledFilterKernels tiled_filter = {};  // all or none
};

// Another null entry means "use the portable one"; a null table, that the build has no such path.
extern const IntervalKernels kPortableKernels;
const IntervalKernels* avx2_kernels();
const IntervalKernels* avx512_kernels();
const IntervalKernels* avx512_bf16_kernels();
const IntervalKernels* amx_kernels();

}  // namespace interval
}  // namespace pyrobust
