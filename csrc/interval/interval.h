// Interval kernels: the image of a box under an affine map, rounded outward.
//
//   lower, upper (B, K), W (N, K), b (N)  ->  out_lower, out_upper (B, N)
//
// Promises, for every x with lower <= x <= upper, all inputs finite:
//   kReal      out_lower <= sum_k W[n,k] x_k + b[n] <= out_upper in real arithmetic, W and b as
//              stored.
//   kDeployed  the same, and also y for every float32 evaluation y of that sum: any order and
//              grouping, bias first or last, with or without FMA, denormals kept or flushed.
//   kNearest   the same formula in plain round to nearest: fast, NOT sound.
//
// Method (Rump 1999; Revol and Theveny 2014). Per element a centre and a radius with
// [c - r, c + r] containing [lower, upper]; then one pass over W computes two sums,
//   yc = fl(sum_k W c_k),      yr = fl(sum_k |W| r'_k),
// where the radius carries the rounding errors of the centre BEFORE its product:
//   r'_k = up(r_k (1 + g_x) + g_c |c_k| + 2^-100).
//
// Proof. Let u = 2^-24 and gamma_n = n u / (1 - n u) (core/rounding.h). Term k of the first sum
// passes d_k roundings, and no term of either more than D = sum_depth(K), as the sums are blocked.
// A product, fused or not, may also lose 2^-150 by underflow; sums of denormals are exact. So with
// S(v) = sum_k |W[n,k]| v_k and S_d the same with gamma_{d_k} v_k for v_k,
//   (1) |yc - sum W c| <= S_d(|c|) + K 2^-149,
//   (2) S(r') <= (yr + K 2^-149) / (1 - gamma_D)       (all terms are >= 0).
// kReal: sum W x lies within S(r) of sum W c, hence within S(r) + S_d(|c|) + K 2^-149 of yc;
// g_c = gamma_{d_k} and g_x = 0 make S(r') cover the first two terms. Every term may take D for
// d_k. But an addition rounds only what is summed before it, and an addition of zero rounds
// nothing: d_k counts the terms of k's run (of its lane, for few inputs) from k on whose centre is
// not zero, its product where that is rounded by itself, the runs of its chunk and the chunks that
// are added later, and the tree of lanes (radius_loops.h); gamma_d <= d gamma_D / D. Convolutions
// without panels take the most that a term of a channel passes; where groups have one channel, all
// terms are one run (plane_loops.h) and d_k = K, which is at most D.
//
// kDeployed. Let t_k = W[n,k] x_k and let n be the number of k whose box is not {0}: the others add
// an exact zero, which no order rounds. An evaluation is a tree of n additions over n + 1 leaves,
// the terms, each rounded at most once before, and b. A partial sum adds some of the leaves; with s
// the sum of their magnitudes and y that of their values it is at most (s + |y|) / 2, the larger of
// what the positive and what the negative leaves sum to. If E bounds the errors of all additions
// together, each errs by at most u ((s + |y|) / 2 + E), hence
//   E <= H (s + |y|),   H = gamma_{n+1} / 2,
// half the classical bound where terms cancel (gamma_{n+1} in place of gamma_n covers the rounding
// of the leaves in s and y). With u S(|x|) for the leaves and F for flushing, an evaluation lies
// within
//   A S(|x|) + H |b| + H |sum W x + b| + F of sum W x + b,   A = u + H.
// In the box |x| <= |c| + r and |sum W x + b| <= |yc + b| + S_d(|c|) + K 2^-149 + S(r), hence
//   g_x = A + H,   g_c = gamma_{d_k} (1 + H) + A,
// and H |b| + H |yc + b| joins the result. F is 2^-126 for every product and sum, 2^-126 |W| where
// an input is flushed (covered by the 2^-100 in r') and 2^-126 |x| where a weight is; together
// below kFlush (K + 8) (1 + max |x|), kFlush = 2^-124, which is added in both modes and covers the
// K 2^-149 as well. n is counted for each input, in convolutions by panels for each patch, and
// what joins results takes the largest, as filtered bands do; other convolutions n = K. Finally
//   R = fl(yr inflate + offset) with inflate >= (1 + 8u) / (1 - gamma_D) bounds the distance from
// yc + b, and the ends are below(below(yc + b) - R), above(above(yc + b) + R), where below and
// above step over at least one neighbour and so cover the rounding of each sum.
//
// Coarser arithmetic (TF32, bfloat16) rounds the operands of a product first, x to x (1 + d) and W
// to W (1 + d'), |d|, |d'| <= v, and sums in float32: leaves move by V |t| more, V = (1 + v)^2 - 1,
//   A = V + u (1 + V) + H (1 + 2 V).
// What flushing loses grows by (1 + v)^2 < 4 at most, which kFlush
// has to spare. An input from 2^126 on may round to infinity: its ends are infinite. So may such a
// weight: callers refuse them.
//
// Coarse radii. Where allowed and worth it, and the processor has products of bfloat16, r' and |W|
// are rounded up to bfloat16 first: S(r') can only grow, by 2^-7 an operand at most and some 0.28%
// on average. The products take a denormal for zero, so a |W| below 2^-126 counts as 2^-126; r' is
// at least 2^-100. What an instruction adds up, 2 products and a float32 (vdpbf16ps) or 32 and one
// (tdpbf16ps, on tiles), is a tree over terms >= 0; no order of it is relied upon, nor that it
// rounds to nearest: each of its additions, of which a term meets one for every other term of its
// chain at most, counts twice, with an error of 2u of its result, and where it or a product
// underflows to zero it loses at most 2^-125. A chain sums at most kCoarseChain terms, and chains
// are added in float32, no more of them than the chunks of D. So (2) becomes
//   S(r') <= (yr + K 2^-124) / (1 - gamma_{D + 2 kCoarseChain}),
// and the offset is doubled. Zeros that fill up a tile add nothing and round nothing. The centre's
// sum stays in float32, summed as before.
//   A packed weight of a linear layer whose groups are whole runs of kRun columns is f w, f the
// size of its group's scale and w a whole number of at most 255 in size, which bfloat16 holds: only
// r' is rounded up, and S(r') = sum over groups of f sum |w| r'. Products |w| r' are 0 or at least
// 2^-100, so that none underflows, whatever f. A chain ends with its group at the latest; f times
// its sum joins the others by one fused operation, which rounds once, as the addition does that it
// stands for (a chunk has at most kRunsOfChunk groups), and loses at most 2^-149 to underflow. A
// sum of |w| r' may overflow where r' is 2^111 or more: the ends are infinite then. Where a scale
// is not 0 and below 2^-100 or above 2^100, |f w| is rounded up as above.
//
// Uniform radii (uniform_inputs.h). Where the radii of every input, more than eight of them, are
// equal but for the rounding of its ends, as those of a ball are, one product is enough. Let rho'
// be at least r_k (1 + g_x) of an input and e_k = up(g_c |c_k| + 2^-100), with d_k as before: the
// centres are summed in the same order. So r'_k <= rho' + e_k, and by Cauchy and Schwarz in each
// run of kRun terms, ||.|| being the root of its sum of squares,
//   S(r') <= rho' sum_k |W[n,k]| + sum over runs of ||e|| ||W[n]||,
//   S(r') <= (rho' + max e) sum_k |W[n,k]|.
// The smaller one takes the place of S(r'). Sums of |W| and roots are rounded up (uniform_loops.h):
// a square that overflows makes the first bound infinite, and what squares lose by underflow is
// below the 2^-70 that is added to each root. The first has 1 + K / kRun (rounded up) terms >= 0,
// no more than K, and is summed as all others, so that (2) holds; the second rounds once. The path
// serves if 64 g max |x| <= min r for each input, g the most that g_c may be, so that S(r') grows
// by less than 1/40 (and by a third of what rounding takes where e and W are spread evenly), if r
// differs by at most 2^-20 max |x|, and if r is within [2^-40, 2^60], which keeps the squares of e
// from overflow and the 2^-70 from showing. Points, whose radii are rounding alone, keep both
// products. With int8 activations their half step joins rho'. kNearest takes the middle of the
// radii and no e.
//
// Overflow. An infinity or NaN in yc + b or in R (it never becomes finite again) gives the ends
// -inf and +inf, never NaN; so do infinite or NaN inputs. A deployed sum cannot overflow while
// R < H 2^126 (H of the least n), as S(|x|) + |b| <= R / H then; otherwise the ends are infinite.
// Large convolutions with windows of 3 x 3 have another sum, with its own bounds: filtering.h.
//
// Packed weights are the floats they stand for, exactly; few inputs meet their codes in integers,
// with a proof of its own (integers.h). The packed layer's own float product
// promises 1e-6 (sum |W x| + |b|) for float32 inputs, so kDeployed takes A and the factor of |b| no
// smaller than that. A weight is a scale (or a row's) times a whole number of at most 511 in size
// (matmul.h): where the scale is flushed, or its product with x, at most 511 2^-126 (1 + |x|) of
// the term is lost, so kFlush counts 512 times. With int8 activations the layer multiplies step q
// in place of x, |step q - x| <= step / 2, step = max |x| / 127 of that input: every mode adds the
// half step of the largest |x| in the box to r (panels.h). Limits. K <= kMaxTerms keeps gamma <=
// 1/7. Every kernel runs with the default floating-point environment (round to nearest, denormals
// kept) and restores the caller's.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/rounding.h"
#include "matmul/matmul.h"

namespace pyrobust {
namespace interval {

enum class Rounding : int { kNearest = 0, kReal = 1, kDeployed = 2 };

constexpr int64_t kMaxTerms = int64_t{1} << 21;

// Up to this many inputs, kernels read W once for all, or once an input in integers (integers.h);
// beyond, panels of inputs meet it.
constexpr int64_t kFewInputs = 4;

// The weight (rows, terms): dense row-major floats, or packed codes that are decoded, exactly, a
// block of rows at a time.
struct Weight {
  const float* data = nullptr;
  const matmul::PackedMatrix* packed = nullptr;
  int64_t rows = 0;
  int64_t terms = 0;
};

// What follows a convolution in the same pass over its outputs: batch norm with running statistics
// and then the sum with another box, either or both, with the bounds of elementwise.h.
struct Epilogue {
  const double* mean = nullptr;  // (rows) and so are the other three, or null: no norm
  const double* scale = nullptr;
  const double* shift = nullptr;
  const double* gain = nullptr;
  bool rectified_norm = false;   // a ReLU before the norm
  const float* lower = nullptr;  // ends of the other box, as the outputs, or null: no sum
  const float* upper = nullptr;
  bool rectified_sum = false;    // a ReLU before the sum
  bool rectified_other = false;  // and one of the other box
};

// What both products share. All arrays are dense and row-major.
struct Call {
  const float* lower;
  const float* upper;
  Weight weight;
  const float* bias;  // (rows) or null
  Rounding rounding;
  bool int8;  // the layer rounds each input (in a convolution: each patch) to 8 bits first
  float operand_error;  // v of the arithmetic that kDeployed covers; 0 for float32
  bool rectified;       // the box is that of max(0, x): a ReLU before the layer
  bool coarse_radius;   // radii may be multiplied in bfloat16, where the processor can
  float* out_lower;
  float* out_upper;
  std::atomic<bool>* unbounded = nullptr;  // becomes true where an end is infinite
  const Epilogue* epilogue = nullptr;      // of a convolution

  // What the kernels that make ends tell.
  void report(bool finite) const {
    if (!finite && unbounded != nullptr) unbounded->store(true, std::memory_order_relaxed);
  }

  // The ends count as at least this.
  float floor() const { return rectified ? 0.0f : -rounding::infinity(); }
};

// lower, upper (batch, weight.terms); out (batch, weight.rows).
void interval_linear(const Call& call, int64_t batch, int num_threads);

// Layers with packed weights one after another, of one input: each but the first reads what the one
// before it wrote. The ends are those of interval_linear for each, without a return to the caller
// in between.
void interval_chain(const Call* layers, int64_t count, int num_threads);

// Geometry of a two-dimensional convolution; zeros pad the top and the left by the given amount,
// the other sides by what the output size needs.
struct Window {
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;
  int64_t dilation_height, dilation_width;
  int64_t groups;
  int64_t out_height, out_width;
};

struct Images {
  int64_t batch, channels, height, width;
};

// lower, upper (batch, channels, height, width); out (batch, weight.rows, out_height, out_width);
// weight.terms = channels / groups * kernel_height * kernel_width, in that order.
void interval_conv2d(const Call& call, const Images& images, const Window& window, int num_threads);

}  // namespace interval
}  // namespace pyrobust
