// Bounds of what transformers are made of, in float64 and rounded outward to float32 once: norms of
// rows, products of two boxes, softmax, products with constants. The rules in torch operations
// (pyrobust/interval/normalization.py, attention.py) derive the formulas and the errors that are
// added; the loops here evaluate the same formulas, in one order on every instruction set and
// number of threads.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace transformer {

// Layer norm (`centred`) or RMS norm of rows of `count` neighbours, times weight plus bias: row r
// takes row r % `weight_rows` of both, each of which may be null. All arrays are dense.
struct RowNorm {
  const float* lower;
  const float* upper;
  int64_t rows, count;
  const float* weight;
  const float* bias;
  int64_t weight_rows;
  double eps;
  bool centred;
  bool deployed;  // for evaluations in float32, too
  float* out_lower;
  float* out_upper;
};

// One operand of a product: `batch` matrices, dense; `transposed`: its terms are neighbours.
struct Operand {
  const float* lower;
  const float* upper;
  bool transposed;
};

// (batch, rows, terms) times (batch, terms, columns); A is never transposed. `gain` is the relative
// error of an evaluation, 0 in real arithmetic.
struct BoxProduct {
  Operand a, b;
  int64_t batch, rows, terms, columns;
  double gain;
  float* out_lower;  // (batch, rows, columns)
  float* out_upper;
};

// The softmax of rows of `count` neighbours. Ends may be -inf.
struct RowSoftmax {
  const float* lower;
  const float* upper;
  int64_t rows, count;
  bool deployed;
  float* out_lower;
  float* out_upper;
};

// Rows of `count` neighbours times constants that lie between `first` and `last`: `count` of each,
// or one for all; `bent`: what is below zero, the rest as it is.
struct BoxScale {
  const float* lower;
  const float* upper;
  int64_t rows, count;
  const double* first;
  const double* last;
  bool single, bent;
  bool deployed;
  float* out_lower;
  float* out_upper;
};

// All are false where ends are not finite, or an evaluation in float32 might overflow on its way or
// flush a weight or bias of a norm to zero: the outputs then say nothing.
bool row_norm(const RowNorm& work, int num_threads);
bool box_product(const BoxProduct& work, int num_threads);
bool row_softmax(const RowSoftmax& work, int num_threads);
bool box_scale(const BoxScale& work, int num_threads);

}  // namespace transformer
}  // namespace pyrobust
