// The interval product of many inputs, and of convolutions, around matrix products of a library:
// a prologue that writes bfloat16 operands, products with float32 results, and an epilogue that
// rounds outward. The promises are interval.h's, the split into bfloat16 is cuda.h's.
//
//   centre = sum over chunks of W1 c_hi, + W1 c_lo, + W2 c_hi where W is float32
//   radius = |W|^ r^         both rounded up to one bfloat16
//
// The terms have to be cut into chunks only in W1 c_hi, the one product whose magnitudes are not
// small; chunk results and the other products meet by float32 additions in the epilogue. Where
// W1 c_lo and |W| r come in chunks too, so that all are one batch, each adds its own up first: a
// sum in parts, as the library may make it.
//
// What is assumed of the library: each result is a sum of all its products, exact ones, in any
// order and grouping, on tensor cores with float32 accumulators, parts of a split sum added in
// float32. In blocks of 4, 8 or 16 products such a sum of n is within 0.75 n 2^-22 of the sum of
// magnitudes (cuda.h), and adding parts of at least 16 products costs at most n / 16 * 2^-24 more,
// to second order below 0.77 (1 + 2^-4) n 2^-22 for n <= kMostTerms: n 2^-22 covers both. No result
// may be rounded to bfloat16 on the way; cuBLAS reduces in the type of the result or wider.
//
// Proof. With S as in interval.h and d(n) = n 2^-22: |W1| |c_hi| sums to at most 1.008 S(|c|), the
// products with c_lo and W2 to at most 2^-8 1.008 S(|c|) each. Before the last additions the centre
// is therefore off by 1.008 d(chunk) + 2 * 2^-8 * 1.008 d(K), the additions round a term at most
// chunks + 2 times, and W2 c_lo and the rest of float32 weights are left out. Those relative errors
// go into r' as g_c does in interval.h, and so does, exactly, what c_lo leaves of c. The radius
// needs no split: |W|^ >= |W| and r^ >= r', its sum is only divided by 1 - d(K).
// Underflow. |W|^ is at least 2^-100. Where a weight or a part of it is flushed or rounded as a
// denormal, which costs at most 4 * 2^-126 (|c| + r), |W| < 2^-101 and |W|^ r' exceeds |W| r' by
// 2^-101 (g_c |c| + r), which is more, since g_c >= 8 * 2^-22. Four products a term and a deployed
// evaluation lose at most 2^-126 each, together below 2^-123 (K + 8), whatever the inputs are.
// Where a packed weight's scale may be flushed, a deployed evaluation loses at most 511 2^-126 (|c|
// + r) of a term with |W| < 2^-117, and |W|^ r' exceeds |W| r' by 2^-101 (g_c |c| + r), g_c >=
// 2^-15; where the scale's product with x is, 511 2^-126, for which the absolute term counts 512
// times.
//
// Not finite. The radius of such an input becomes infinite, and with it, or as a NaN, the radius of
// every output that the term reaches, whatever its weight.
#pragma once

#include <cstdint>

#include "cuda/queue.h"
#include "interval/cuda_constants.h"
#include "interval/interval.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int64_t kMostTerms = int64_t{1} << 18;

// What the error bounds depend on. `padded` terms, with zeros past `terms`, in `chunks` equal
// parts; `two_parts`: the weight is W1 + W2.
struct LibrarySum {
  int64_t terms;
  int64_t padded;
  int64_t chunks;
  bool two_parts;
  Rounding rounding;
  bool packed;  // kDeployed speaks of the product with packed weights
};

// (rows, terms) float32 or bfloat16 to (rows, padded) bfloat16 each; null where not wanted.
struct SplitWeight {
  const void* weight;
  bool bfloat16;
  int64_t rows;
  int64_t terms;
  int64_t padded;  // a multiple of 8
  uint16_t* first;
  uint16_t* second;
  uint16_t* magnitude;
};
cuda::Status split_weight(const SplitWeight& work, const cuda::Queue& queue);

// Boxes (batch, terms) to planes (c_hi | c_lo | r^, batch, padded).
struct SplitRows {
  const float* lower;
  const float* upper;
  int64_t batch;
  LibrarySum sum;
  float* extra;  // (batch) scratch where the layer rounds inputs to 8 bits, else null
  uint16_t* planes;
};
cuda::Status split_rows(const SplitRows& work, const cuda::Queue& queue);

// Boxes of padded images to planes (c_hi | c_lo | r^, groups, padded, columns), a patch a column in
// the order (image, row, column), zeros past the last.
struct SplitPatches {
  const float* lower;  // (batch, channels, height, width)
  const float* upper;
  Images images;
  Window window;  // pads are not used
  LibrarySum sum;
  int64_t columns;   // at least the patches, a multiple of 8
  uint32_t* pixels;  // scratch, two words a value of `lower`, 16-byte aligned
  float* extra;      // (groups, columns) scratch, or null
  uint16_t* planes;
};
constexpr int64_t kTermsOfBlock = 16;
constexpr int64_t kMostBlocks = 65535;  // groups times blocks of terms: split_patches_fits
bool split_patches_fits(int64_t groups, int64_t padded);
cuda::Status split_patches(const SplitPatches& work, const cuda::Queue& queue);

// Sums to ends. A result has `outer` rows of `inner`; a row belongs to one of `groups`, and within
// a group the chunks' results follow one another: first (groups, chunks, outer / groups, inner),
// low, second (or null) and radius (outer, inner), or low and radius as first.
struct Finish {
  const float* first;
  const float* low;
  const float* second;
  const float* radius;
  const float* bias;  // one an output, or null
  LibrarySum sum;
  bool in_chunks;  // low and radius too
  int64_t groups;
  int64_t outer;
  int64_t inner;
  // 0: rows are inputs, to out (outer, stride). Else rows are outputs, columns are patches of
  // images of so many pixels, to out (images, outer, pixels); `patches` of the columns count.
  int64_t pixels;
  int64_t patches;
  int64_t stride;
  float* out_lower;
  float* out_upper;
};
cuda::Status finish(const Finish& work, const cuda::Queue& queue);

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
