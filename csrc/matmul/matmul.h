// Packed low-bit matmul: y = x W^T + bias, with W in 1, 1.58, 2, 3, 4 or 8 bits. Read this first.
//
// The weight. W is (rows, cols) = (out_features, in_features), stored as codes with one scale and
// one zero per group:
//
//     W[n, k] = scale * (code[n, k] - zero)                       2, 3, 4, 8 bits
//     W[n, k] = scale * (code[n, k] - 2^(bits-1))                 the same, symmetric (zero ==
//     null) W[n, k] = scale * (code[n, k] - 1)                          1.58 bits, codes 0, 1, 2
//     W[n, k] = scale * (2 code[n, k] - 1)                        1 bit
//
//     group_dim 1, group_size 4          group_dim 0, group_size 2
//     k ->  0 1 2 3 | 4 5 6 7 | 8 9      k ->  0 1 2 3 4 5 6 7 8 9
//     n=0   s00     | s01     | s02      n=0   s  s  s  ...            scale (ceil(rows/g), cols):
//     n=1   s10     | s11     | s12      n=1   0k, one per column      one per column and row group
//     scale (rows, ceil(cols/g))         ------------------------
//     the last group may be shorter      n=2   1k
//
// Three optional parts extend this; a weight may have any of them together:
//
//   codebook (levels bytes), not at 8 bits   code[n, k] is an index: its entry of the codebook, 0
//   to
//         255, stands where the code stands above; symmetric means a zero of 128
//   row_scale (rows)   two-level scales: `scale` then holds small integers (bytes) and W[n, k] is
//         row_scale[n] times the above, so that sums over a row stay integers
//   remainder          a sparse matrix in compressed rows that is added:
//
//         W = dense + S      values  v0 v1 v2 ...        S[n, columns[i]] = values[i]
//                            columns c0 c1 c2 ...        for i in [offsets[n], offsets[n + 1])
//
// codes: the canonical layout of core/bit_layout.h, (rows, packed_row_bytes(cols)). `levels` names
// the format by its number of code values: 2, 3, 4, 8, 16, 256.
//
// Preconditions on the data: a float scale has at most 15 significant bits (any float16 or bfloat16
// does), an integer scale times the largest |code - zero| is at most 511, columns of a remainder
// ascend, and dense + S is a float32 of at least 4/5 of the dense value in magnitude (a dense
// kernel keeps that margin to the bound below). Then W[n, k] is a float32 without rounding;
// dequantize() returns the stored weight exactly. Data that break them give wrong numbers but never
// a fault: columns and offsets out of range are skipped.
//
// The activations x are (M, cols), float32, float16 or bfloat16; y is (M, rows) of the same type.
//   exact   y = x W^T + bias, with |error| <= 1e-6 (sum_k |x||W| + |bias|) against real numbers,
//           plus, for float16 and bfloat16, the final rounding to that type. (Overflow and
//           underflow of intermediate products excepted: |x scale| within 2^-126 .. 2^127
//           suffices.) On AVX-512, float16 and bfloat16 with group_dim 1, groups, or whole rows, of
//           up to 65536 columns and at least 16 rows of W: x is first rounded to 16 bits, one step
//           a row and group g (two groups that meet within 64 columns, where groups are filled up
//           to whole 32, have one step and are one g, and so are all groups of 64 where those of up
//           to 16 columns are filled up to 4, 8 or 16; avx512_parts.h); sums are integers. This
//           adds sum over groups g of max_{k in g} |x| / 32512 sum_{k in g, x small} |W|, where
//           x is small below 1/63 of that maximum in bfloat16 and below 1/7 in float16.
//           There, with 32 rows of W, a row of float32 of 64 columns or more has 24 or 32 bits if
//           its roundings r are small enough (avx512_float_rows.h), and |error| is at most
//             sum_k |r_k| |W| + 2^-23 |y|,   |r_k| < max_{k in g} |x| / 8355711,
//             sum_k |r_k| <= 2^-21 (sum_k |x_k| without the eight largest of each group),
//           less than 1e-6 sum_k |x||W| but where weights are all but zero wherever x is large
//   int8    x is first replaced by its 8-bit rounding (core/activation_int8.h, one step a row); the
//           product of that with W is then computed with integer sums per group (group_dim 1), or
//           double sums of exact products (group_dim 0), in an order that this page fixes:
//             group_dim 1   t = sum over groups g ascending of (double) S_g * scale_g, where S_g is
//                           the int32 sum of q (code - zero) over the group (groups of more than
//                           65536 columns count as several of 65536); 46 bits: no product rounds
//             group_dim 0   t = lanes ((0+1)+(2+3)) + ((4+5)+(6+7)), lane l = sum over the columns
//             k
//                           with (k / 8) mod 8 = l, ascending, of q scale (code - zero) in double;
//                           no product rounds (integer sums where none of these rounds either)
//           Two-level scales, either direction: t = (double) T * row_scale, T the exact integer sum
//           of q scale (code - zero). With a remainder, t + r stands for t, where r is the double
//           sum over the row's entries i, ascending, of q[columns[i]] values[i] (exact products).
//             y = (float) (t * step + bias)
// In both modes a row of y depends on its row of x alone, not on M or the other rows. In int8 mode
// it has the same bits on every instruction set and for any number of threads; in exact mode, the
// same bits for any number of threads on one instruction set.
//
// NaN and infinity: exact mode propagates them as the float product does. In int8 mode, and where
// 16-bit x is rounded, a row of x that holds one gives a row of NaN.
//
// Sizes may be anything from 0; nothing need divide anything. Inputs are contiguous, do not
// overlap `out`, and are checked in dispatch.cpp (std::invalid_argument). No buffer is read past
// its end.
#pragma once

#include <cstdint>

#include "core/float_types.h"

namespace pyrobust::matmul {

// Compressed sparse rows; absent where `offsets` is null.
struct Remainder {
  const void* values = nullptr;      // (count)
  const int32_t* columns = nullptr;  // (count)
  const int64_t* offsets = nullptr;  // (rows + 1)
  FloatType type = FloatType::kFloat32;
  int64_t count = 0;
};

struct PackedMatrix {
  const uint8_t* codes = nullptr;
  const void* scale = nullptr;        // floats of scale_type; bytes where row_scale is set
  const uint8_t* zero = nullptr;      // shape of scale; null: symmetric
  const float* row_scale = nullptr;   // (rows) or null
  const uint8_t* codebook = nullptr;  // (levels) or null
  Remainder remainder;
  const uint8_t* panels = nullptr;  // what make_panels() wrote for this weight, or null
  FloatType scale_type = FloatType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 1;
  int group_dim = 1;
  int levels = 16;
};

struct Activations {
  const void* data = nullptr;
  FloatType type = FloatType::kFloat32;
  int64_t rows = 0;  // M
};

// Parts: what kExact may become inside the library, rows of x as that many 8-bit parts.
enum class Mode : int { kExact, kInt8, kTwoParts, kThreeParts, kFourParts };

// Rows of W, [begin, end): a product or a decoding may concern a part of them.
struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// The columns `rows` of the product. `bias` holds W.rows floats or is null; `out` holds
// (x.rows, rows.end - rows.begin) values of x.type.
void packed_linear(const Activations& x, const PackedMatrix& weight, RowRange rows,
                   const float* bias, Mode mode, void* out, int num_threads);

// The gradient to x of the product above: out (g.rows, weight.cols) = g W, with g (g.rows,
// rows.end - rows.begin) over the rows of W in `rows`; out is of g.type. Against real numbers,
//   |error| <= 65 2^-24 sum_n |g||W|      (sums of 64 float products, totals in double)
// plus, for float16 and bfloat16, the final rounding. On AVX-512, g of these types with group_dim 1
// and groups of a multiple of 128 columns, of 64 or 32, or whole rows, is first multiplied by the
// scales s of W and rounded to 16 bits, one step for each 64 rows of W from rows.begin on and each
// group; sums are integers and totals float. That adds
//   sum over blocks of 64 rows of max_n |g s| / 32512 sum_n |W / s|   and   terms / 64 2^-24 sum
//   |g||W|
// and a row of g that is not finite gives NaN. (A tile of 128 columns that is not whole, lies in
// two groups of other sizes, or is of a weight with a remainder keeps to floats.) A row of `out`
// depends on its row of g alone: the same bits for any number of rows and threads on one
// instruction set.
void packed_linear_transpose(const Activations& g, const PackedMatrix& weight, RowRange rows,
                             void* out, int num_threads);

// The panel order of a weight: a second copy of codes, scales and zeros that products with int8
// activations, and with those that are rounded to 8-bit parts, read in place of the canonical
// layout where `panels` points to it. The results have the same bits, sooner. panel_bytes() is 0
// where the instruction set in use takes none for this format; `out` of make_panels() holds that
// many bytes.
int64_t panel_bytes(const PackedMatrix& weight);
void make_panels(const PackedMatrix& weight, uint8_t* out, int num_threads);

// The same without checks, on the calling thread, for a weight that has such an order.
void write_panels(const PackedMatrix& weight, uint8_t* out);

// Rows [first, first + count) as a weight of their own, without panels; groups along rows, no
// remainder.
PackedMatrix part_of(const PackedMatrix& weight, int64_t first, int64_t count);

// out: (rows.end - rows.begin, cols), those rows of the exact weight.
void dequantize(const PackedMatrix& weight, RowRange rows, float* out, int num_threads);

// A matrix to add to: dense rows that do not overlap, `row_stride` elements apart.
struct AddTarget {
  void* data = nullptr;
  FloatType type = FloatType::kFloat32;
  int64_t row_stride = 0;
  void* saved = nullptr;  // (rows, cols), contiguous, of `type`: receives what was there; or null
};

// target (rows, cols) += alpha * weight, in one pass over `target`; the decoded weight never lies
// in memory. float32: the product and the sum are each rounded. float16, bfloat16: alpha and the
// weight are rounded to that type, and the sum to float32 and then to that type (their product is
// exact but where it leaves float32's range). Equal bits on every instruction set.
void add_dequantized(const PackedMatrix& weight, float alpha, const AddTarget& target,
                     int num_threads);

// Codes that index a table of floats instead of standing for integers.
struct LevelCodes {
  const uint8_t* codes = nullptr;  // (rows, packed_row_bytes(cols)), the canonical layout
  int64_t rows = 0;
  int64_t cols = 0;
  int levels = 16;
};

// target (rows, cols) += alpha * table[code], table (levels), rounded as add_dequantized.
void add_levels(const LevelCodes& codes, const float* table, float alpha, const AddTarget& target,
                int num_threads);

// target (rows, cols) += alpha * values (rows, cols; contiguous; float32 or of the target's type),
// rounded as add_dequantized.
void add_values(const void* values, FloatType values_type, int64_t rows, int64_t cols, float alpha,
                const AddTarget& target, int num_threads);

// dequantize on the calling thread and without checks: for kernels that decode block by block.
void dequantize_rows(const PackedMatrix& weight, int64_t begin, int64_t end, float* out);

// The codes of row n, or their entries of the codebook, one a byte, on the calling thread and
// without checks. They are written to `scratch`, cols + 64 bytes, or stand in the weight itself.
const uint8_t* code_bytes(const PackedMatrix& weight, int64_t n, uint8_t* scratch);

// Rows `indices` of it, each in [0, rows): out (count, cols).
void gather_rows(const PackedMatrix& weight, const int64_t* indices, int64_t count, float* out,
                 int num_threads);

// Codes (rows, cols), one a byte, to and from the canonical layout. pack_codes throws where a code
// is not below `levels`.
void unpack_codes(const uint8_t* packed, int64_t rows, int64_t cols, int levels, uint8_t* codes,
                  int num_threads);
void pack_codes(const uint8_t* codes, int64_t rows, int64_t cols, int levels, uint8_t* packed,
                int num_threads);

}  // namespace pyrobust::matmul
