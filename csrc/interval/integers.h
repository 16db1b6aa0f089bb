// Bounds of few inputs under a packed weight by integer sums.
//
// The weight of a group is scale w, w an integer in [-255, 255] (matmul/weights.h). Centre and
// radius become integers too, with a step for each group of each input, so that all sums over a
// group are exact and every instruction set gives the same bits:
//
//   c_k = s (q_k + m)     0 <= q_k < 2^16, m an integer of the group, 0 where no centre is below 0
//   r_k = t p_k           0 <= p_k < 2^15
//
//   C = sum over groups of scale s (sum w q + m sum w)      R = sum of |scale| t sum |w| p
//
// in double, groups ascending, products before sums.
//
// Proof, continuing interval.h, where any (c, r) with [c - r, c + r] containing the box will do.
// - s has 8 significant bits and |q + m| < 2^16 (s is at least the largest |midpoint| / 65535, and
// q
//   at least 1 where m is not 0), so c_k is a float and the centre is where the kernel takes it to
//   be; how it was found does not matter. What [c - r, c + r] needs beyond the
//   box is at most s / 2 on either side, s / 4 on average. No rounding of the centre is left: the
//   box's distance from c is rounded up with everything else in r'.
// - t p_k >= r'_k: p is the whole part of r'/t, computed within 2^-20, plus 1.
// - A sum over at most kMostColumns = 2^16 columns of bytes up to 255 with signed bytes stays below
//   255 * 128 * 2^16 < 2^31; sums of 16-bit numbers are widened after 256 columns, 255 * 2^15 * 2^8
//   < 2^31. The sums of a group are below 2^45: doubles, exactly. scale s and |scale| t have at
//   most 32 bits. So each group costs one rounding for its product and one for its sum, and with U
//   = 2^-53, n groups and a row scale |C - sum W c| <= gamma_{n+3}(U) S(|c|), which takes the place
//   of gamma_D S(|c|) + K 2^-149 in interval.h; and S(r') <= R / (1 - gamma_{n+3}(U)).
// - Ends are made in double: y = C + b, and the radius of interval.h with slack for its roundings
//   and for that of y; then rounded to float and stepped over a neighbour.
//
// The price is wider steps: an input whose box is so narrow that they would widen it by more than
// kMostWidening of its radii on average is left to the float kernels, as are infinite inputs.
#pragma once

#include <cstdint>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "matmul/weights.h"

namespace pyrobust {
namespace interval {

constexpr int64_t kMostColumns = int64_t{1} << 16;  // of a group
constexpr double kMostWidening = 1.0 / 1024.0;
// Rows that meet the input before their ends are made: a multiple of a panel's.
constexpr int64_t kIntegerRows = 64;
constexpr int64_t kIntegerBlock = 64;  // groups of an input begin at multiples of it

PYROBUST_HD int64_t columns_of_group(const matmul::PackedMatrix& w) {
  return w.group_size < w.cols ? w.group_size : w.cols;
}

// Whether sums of a group are integers with one scale.
PYROBUST_HD bool integer_format(const matmul::PackedMatrix& w) {
  return w.group_dim == 1 && w.remainder.offsets == nullptr && w.cols > 0 &&
         columns_of_group(w) <= kMostColumns && (w.levels < 256 || w.codebook == nullptr);
}

// The numbers of kernels.h for sums in double.
struct IntegerConstants {
  float centre_gain, radius_gain, input_floor;
  double inflate, bias_gain, value_gain, limit;
  float least;
};

// One input as integers. Columns past a group's last are 0 in every array; `groups` arrays have an
// entry a group.
struct IntegerInput {
  int64_t columns;  // of the weight
  int64_t group;    // columns of all groups but the last
  int64_t stride;   // from a group's first column to the next one's
  int64_t groups;
  int16_t* centre;      // q - 2^15
  int16_t* radius;      // p
  double* step;         // s
  double* radius_step;  // t
  int32_t* shift;       // m
  int64_t* spread;      // sum of p
  float* largest;       // |x|, infinite or NaN where an end is: then nothing else is there
  int64_t* total;       // sum of q
  uint8_t* quads;       // for panels: see order_quads
  uint8_t* ones;        // for panels: 1 where there is a column
  bool shifted;         // whether any m is not 0

  int64_t count(int64_t g) const {
    const int64_t left = columns - g * group;
    return left < group ? left : group;
  }
};

// Groups [first, last) of an input.
struct IntegerPrepare {
  Ends ends;
  IntegerConstants constants;
  float* scratch;  // stride() floats
  IntegerInput* out;
  int64_t first, last;
};

// yc and yr of rows [first, first + rows) for one input, without bias.
struct IntegerDots {
  const matmul::PackedMatrix* weight;
  const IntegerInput* input;
  int64_t first, rows;
  uint8_t* scratch;     // row_scratch() bytes
  double* centre_sums;  // with room for kIntegerRows rows, as the next
  double* radius_sums;
};

struct IntegerEnds {
  const double* centre_sums;
  const double* radius_sums;
  const float* bias;  // or null
  double offset;
  int64_t count;
  float* out_lower;
  float* out_upper;
};

struct IntegerKernels {
  void (*prepare)(const IntegerPrepare& work);
  void (*rows)(const IntegerDots& work);
  bool (*finish)(const IntegerEnds& work, const IntegerConstants& constants);
  // With a weight in panel order, [first, first + rows) whole panels or up to the last row; null
  // where the set has no such order.
  void (*order)(IntegerInput* input, int64_t first_group, int64_t last_group);
  void (*panels)(const IntegerDots& work);
};

// Bytes of IntegerDots::scratch: a row's codes.
inline int64_t row_scratch(const matmul::PackedMatrix& w) { return w.cols + kIntegerBlock; }

// Of layers one after another (interval_chain), as many as their inputs suit: returns how many were
// served. Nothing is written for the next one, which is left to the float kernels.
int64_t integer_chain(const Call* layers, int64_t count, int num_threads);

}  // namespace interval
}  // namespace pyrobust
