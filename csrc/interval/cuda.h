// The interval product on tensor cores: y = W x over boxes, W read once for both sums of up to 64
// inputs. Same promises as interval.h, other arithmetic.
//
// Operands. Tensor cores multiply bfloat16 exactly and add in float32. So
//   c = c_hi + c_lo + rest     two bfloat16, rest exact in float32, |rest| goes into the radius
//   r' = r_hi + r_lo           rounded up; or r^, one bfloat16, rounded up
//   W  exactly one bfloat16 (bfloat16 weights; packed codes of at most 8 bits less their zero,
//      whose scale multiplies the accumulators), or W1 + W2 + rest with |rest| <= 2^-16 |W| for
//      float32.
// Products of one warp (cuda_product.cuh): W c_hi, W c_lo, |W| r_hi, |W| r_lo; for float32 weights
// also W2 c_hi and, with the sign of W1, W2 r_hi. What is left out, W2 c_lo and W2 r_lo, is at most
// 1.01 * 2^-16 of |W c| and twice that of |W| r, since |W2| <= 2^-8 |W|, |c_lo| <= 2^-8 (1 + 2^-8)
// |c|, |r_lo| <= 2^-7 r (1 + 2^-7). Products of warpgroups (cuda_wide.cuh): W c_hi, W c_lo, |W| r^.
//
// Proof. As in interval.h, with another bound of the sums. A tensor core aligns products to the
// largest exponent, cuts, and adds: over n products from 0 on its result is within n 2^-22 of the
// sum of magnitudes (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// PeerJ CS 7:e330, 2021, and Khattak, Mikaitis, arXiv 2512.07004, 2025, measure the blocks and kept
// places of V100 to B200; 0.75 n 2^-22 is the coarsest). After n products of some terms, in any
// order, the accumulators are scaled and added to float32 totals by ordinary instructions, of which
// a term passes at most d. With delta = n 2^-22 and the magnitudes of all products at most
// 1.02 |W| |x|, the relative error of a sum is below
//   own = 1.02 ((1 + delta)(1 + gamma_d) - 1)
// which takes the place of gamma_D there; what float32 weights leave out is added to it.
//   one warp       n = 3 * kStep / 2 for both sums, d = gpu_depth(K)
//   warpgroups     centre n = 2 * 64, or 2 * 128 of packed weights; radius n = 128 of packed
//   weights,
//                  else all terms of a part, as it has no totals; d = 2 stages + parts + 2
// float32 scales: W is the float nearest to scale times code, off by u, and 0.75 n in place of n
// leaves more.
// Underflow: a product of denormal size is lost to at most 2^-126, three of them a term, so the
// absolute term is twice that of interval.h; so it is where scales may be flushed (flush_of).
#pragma once

#include "cuda/queue.h"
#include "interval/interval.h"

namespace pyrobust {
namespace interval {
namespace gpu {

constexpr int64_t kStep = 128;  // terms that two halves of a block's warps take at a time

enum class WeightKind : int { kFloat32, kBFloat16, kPacked };

// Packed weights: group_dim 1, groups of a multiple of kStep columns or one per row, columns a
// multiple of kStep, levels 2, 4, 8, 16 or 256, no codebook, row scale or remainder (packed_fits).
struct LinearCall {
  const float* lower;  // (batch, terms)
  const float* upper;
  int64_t batch;
  WeightKind kind;
  const void* dense;            // (rows, terms), float32 or bfloat16, 16-byte aligned rows or not
  matmul::PackedMatrix packed;  // device pointers
  int64_t rows;
  int64_t terms;
  const float* bias;  // (rows) or null
  Rounding rounding;
  bool int8;
  bool decoded;      // a dense weight that was packed: kDeployed speaks of the packed product
  float* out_lower;  // (batch, rows)
  float* out_upper;
  void* scratch;    // scratch_bytes(call, ...), 16-byte aligned
  bool clusters;    // the device has them: compute capability 9.0 and above
  bool warpgroups;  // their products too: compute capability 9.0 alone
};

// Whether kDeployed speaks of the packed product.
inline bool bounds_packed(const LinearCall& call) {
  return call.kind == WeightKind::kPacked || call.decoded;
}

bool packed_fits(const matmul::PackedMatrix& weight);

// Inputs from which on warpgroups multiply with bfloat16 weights, where the device has them; with
// packed ones always. With float32 weights never: they have two parts.
constexpr int64_t kLeastWide = 9;

// From kind, sizes and warpgroups of the call.
int64_t scratch_bytes(const LinearCall& call, int multiprocessors);

// Two launches. The caller has checked the limits above.
cuda::Status interval_linear(const LinearCall& call, const cuda::Queue& queue);

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
