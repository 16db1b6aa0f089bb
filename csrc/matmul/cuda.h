// The matmul family on a GPU: launch functions with raw pointers and the caller's stream. They
// enqueue and return: no synchronisation, no allocation; the caller supplies the workspace. What is
// computed is matmul.h's; layouts are cuda_layout.h's.
//
// Exact mode here means: codes minus zeros are exact halves, products of halves are exact, sums are
// float32 on tensor cores. With groups along input features or one scale a row,
//
//     |error| <= (K + 64) 2^-22 sum_k |x| |W|, plus the final rounding to the type of y;
//
// in float16 with groups along input features and no codebook the codes are multiplied before their
// zeros are subtracted (cuda_multiply.cuh): there |W| is |W| + 2 scale zero, and an x that is not
// finite makes NaNs of its row of y;
// with groups along output features each weight is first rounded to the type of x: 2^-11 |x| |W|
// more in float16, 2^-8 |x| |W| more in bfloat16 (its scale and its product). Rows of x above
// FUSED_ROWS (pyrobust/ops/_cuda_matmul.py) meet weights that are rounded to the type of x, once,
// fused (cuda_broad.cuh) or decoded: 2^-11 or 2^-9 |x| |W| more. A row of y depends on its row of x
// alone; not on M within 1 .. 16, 17 .. 32, 33 .. 64, above FUSED_ROWS up to ROUNDED_ROWS, and what
// is above.
#pragma once

#include <cstdint>

#include "core/float_types.h"
#include "cuda/queue.h"
#include "matmul/cuda_layout.h"
#include "matmul/matmul.h"

namespace pyrobust::matmul::gpu {

constexpr int64_t kMaxFusedRows = 64;
constexpr int64_t kMostBroadRows = 65535 * kBroadRows;

// By warps (cuda_linear.cuh), by warps with signals (cuda_few.cuh), by warpgroups (cuda_wide.cuh),
// by warpgroups with weights that are rounded to the type of x (cuda_broad.cuh).
enum class Path : int { kWarps, kFew, kWide, kBroad };

// A product of at most kMaxFusedRows rows of x with a repacked weight; of kMostColumnwiseRows where
// groups run along output features, of kMostBroadRows on that path.
struct LinearArguments {
  const uint32_t* codes = nullptr;  // stored_words(), 16-byte aligned
  const void* scale = nullptr;      // as cuda_layout.h says; of scale_type (group_dim 0: of x_type)
  const uint8_t* zero = nullptr;    // the same places, or null
  const float* alpha = nullptr;     // one factor of all results, or null
  const float* row_scale = nullptr;  // (rows) or null
  const float* bias = nullptr;       // (rows) or null
  const uint8_t* codebook = nullptr;
  Remainder remainder;
  const void* x = nullptr;  // (count, cols), 16-byte aligned, cols a multiple of 8
  void* out = nullptr;      // (count, rows) of out_type
  int32_t* sums = nullptr;  // complex only: (2, count, rows), sums with u and with v
  float* partials = nullptr;
  int32_t* arrivals = nullptr;  // (tiles) a launch, zeros
  FloatType scale_type = FloatType::kFloat16;
  FloatType x_type = FloatType::kFloat16;
  FloatType out_type = FloatType::kFloat16;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t count = 0;
  int64_t strips = 0;
  int64_t groups = 1;  // as stored: with two a block or strip, an even number
  int group_span = 1;  // blocks (group_dim 1) or strips (group_dim 0) that share a group
  int two_groups = 0;  // groups of 32: two in a block or strip; 0 or 1
  int group_dim = 1;
  int levels = 16;
  float symmetric_zero = 0.0f;
  bool clusters = false;    // the device has them: compute capability 9.0 and above
  bool warpgroups = false;  // the device multiplies by them: 9.0 alone
  bool rounds = false;      // weights may be rounded to x_type
  Path path = Path::kWarps;
  // The weight was complete before the grid ahead on this stream: this one may begin to read it.
  bool settled = false;
  Schedule schedule;
};

// Whether more than 64 rows of x_type may be multiplied in one launch, with weights rounded to it.
bool takes_many_rows(Format format, const LinearArguments& p, FloatType x_type);

// Fills strips, group_span, two_groups and groups from the sizes; then, for `count` rows of x of
// x_type and the multiprocessors of the device, count, path and schedule.
void plan_linear(int64_t group_size, LinearArguments* p);
void plan_rows(Format format, int64_t count, int multiprocessors, LinearArguments* p);

// Floats of the workspace `partials` and int32 of `arrivals`: none with clusters, or where every
// tile has one thread block.
int64_t partial_floats(Format format, const LinearArguments& p);
int64_t arrival_words(const LinearArguments& p);

cuda::Status linear(Format format, const LinearArguments& p, cuda::Stream stream);

// One translation unit a width.
cuda::Status linear_1(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_2(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_3(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_4(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_8(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_codebook(const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_few(Format format, const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_wide(Format format, const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_broad(Format format, const LinearArguments& p, cuda::Stream stream);
cuda::Status linear_complex(const LinearArguments& p, cuda::Stream stream);

// Codes from the canonical layout to the GPU's, stored_words() of them.
cuda::Status repack(Format format, const Codes& codes, uint32_t* out, cuda::Stream stream);

// Rows `rows` of the exact weight, or with `indices` (device, `count`) those rows, as `type`
// (float32: without rounding): out (rows, cols). Indices out of range are skipped.
cuda::Status dequantize(const PackedMatrix& weight, RowRange rows, const int64_t* indices,
                        FloatType type, void* out, cuda::Stream stream);

// activations="int8", bit for bit as on the CPU; a plain loop, no tensor cores.
cuda::Status linear_int8(const PackedMatrix& weight, const Activations& x, const float* bias,
                         int8_t* rounded, double* steps, void* out, cuda::Stream stream);

}  // namespace pyrobust::matmul::gpu
