// Internal to the transformer family: what an instruction set supplies.
#pragma once

#include "transformer/transformer.h"

namespace pyrobust {
namespace transformer {

// Numbers of a norm that all rows share.
struct NormConstants {
  double unit;      // relative error of sums over a row, in the arithmetic that is covered
  double flushed;   // what flushing of denormals takes from one
  double relative;  // of the result
  float least;      // lower ends between zero and this become zero
};

// Up to eight rows of A or columns of B, with the distances of their terms and of their neighbours.
struct PackEntries {
  const float* lower;
  const float* upper;
  int64_t terms, count, term_stride, entry_stride;
};

// One row of a block of a product: M, Q and T of eight columns, of which `count` are wanted, the
// errors by T and besides, and where T is too large.
struct ProductEnds {
  const double* sums;
  int64_t count;
  double gain, lost, limit;
  float least;
  float* out_lower;
  float* out_upper;
};

struct SoftmaxConstants {
  double relative, of_spread, of_spread32;  // errors, the latter two times a spread
  double tiny;
  float least;
};

// The numbers of a row, and whole groups of them.
inline int64_t padded_count(int64_t count) { return (count + 7) / 8 * 8; }

// Numbers times a constant that lies between `first` and `last`: one for all, or one for each;
// `bent`: those below zero, the others as they are.
struct ScaleLoop {
  const float* lower;
  const float* upper;
  int64_t count;
  const double* first;
  const double* last;
  bool single, bent;
  float least;
  float* out_lower;
  float* out_upper;
};

struct TransformerKernels {
  // Row `row`; `scratch` holds 4 * count numbers.
  bool (*norm_row)(const RowNorm& work, const NormConstants& constants, int64_t row,
                   double* scratch);
  // product.h has the layouts. Columns that are not given stay as they are.
  void (*pack_columns)(const PackEntries& work, double* to);
  void (*pack_rows)(const PackEntries& work, double* to, double* largest);
  void (*product_block)(const double* rows, const double* columns, int64_t terms, double* sums);
  bool (*product_ends)(const ProductEnds& work);
  // Row `row`; `scratch` holds 5 * padded_count numbers.
  bool (*softmax_row)(const RowSoftmax& work, const SoftmaxConstants& constants, int64_t row,
                      double* scratch);
  bool (*scale)(const ScaleLoop& work);
};

extern const TransformerKernels kPortableKernels;
const TransformerKernels* avx2_kernels();
const TransformerKernels* avx512_kernels();

}  // namespace transformer
}  // namespace pyrobust
