// Eight lanes of float64: portable.cpp's loops, compiled for the set, and blocks of products.
#include <immintrin.h>

#include "transformer/norm_loops.h"
#include "transformer/product_loops.h"
#include "transformer/scale_loops.h"
#include "transformer/softmax_loops.h"

namespace pyrobust {
namespace transformer {
namespace {

// Eight rows by eight columns: 24 sums and what a term shares in 29 registers; the numbers of rows
// come from memory.
void product_block(const double* rows, const double* columns, int64_t terms, double* sums) {
  __m512d middle[kBlockRows], same[kBlockRows], total[kBlockRows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kBlockRows; ++r) middle[r] = same[r] = total[r] = _mm512_setzero_pd();
  for (int64_t k = 0; k < terms; ++k, rows += kRowTerm, columns += kColumnTerm) {
    const __m512d n = _mm512_loadu_pd(columns), d = _mm512_loadu_pd(columns + kBlockColumns);
    const __m512d s = _mm512_loadu_pd(columns + 2 * kBlockColumns);
    const __m512d of_n = _mm512_abs_pd(n), of_d = _mm512_abs_pd(d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const double* row = rows + r;
      middle[r] = _mm512_fmadd_pd(_mm512_set1_pd(row[0]), n, middle[r]);
      same[r] = _mm512_fmadd_pd(_mm512_set1_pd(row[3 * kBlockRows]), of_n, same[r]);
      total[r] = _mm512_fmadd_pd(_mm512_set1_pd(row[2 * kBlockRows]), s, total[r]);
      middle[r] = _mm512_fmadd_pd(_mm512_set1_pd(row[kBlockRows]), d, middle[r]);
      same[r] = _mm512_fmadd_pd(_mm512_set1_pd(row[4 * kBlockRows]), of_d, same[r]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kBlockRows; ++r, sums += 3 * kBlockColumns) {
    _mm512_storeu_pd(sums, middle[r]);
    _mm512_storeu_pd(sums + kBlockColumns, same[r]);
    _mm512_storeu_pd(sums + 2 * kBlockColumns, total[r]);
  }
}

constexpr TransformerKernels kKernels = {norm_row,     pack_columns, pack_rows, product_block,
                                         product_ends, softmax_row,  scale};

}  // namespace

const TransformerKernels* avx512_kernels() { return &kKernels; }

}  // namespace transformer
}  // namespace pyrobust
