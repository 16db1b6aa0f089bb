// Four lanes of float64: portable.cpp's loops, compiled for the set, and blocks of products.
#include <immintrin.h>

#include "transformer/norm_loops.h"
#include "transformer/product_loops.h"
#include "transformer/scale_loops.h"
#include "transformer/softmax_loops.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr int64_t kLanes = 4, kRows = 3;  // of a tile: nine sums

// `kCount` rows by four columns of a block.
template <int64_t kCount>
void product_tile(const double* rows, const double* columns, int64_t terms, double* sums) {
  __m256d middle[kCount], same[kCount], total[kCount];
  const __m256d sign = _mm256_set1_pd(-0.0);
#pragma GCC unroll 3
  for (int64_t r = 0; r < kCount; ++r) middle[r] = same[r] = total[r] = _mm256_setzero_pd();
  for (int64_t k = 0; k < terms; ++k, rows += kRowTerm, columns += kColumnTerm) {
    const __m256d n = _mm256_loadu_pd(columns), d = _mm256_loadu_pd(columns + kBlockColumns);
    const __m256d s = _mm256_loadu_pd(columns + 2 * kBlockColumns);
    const __m256d of_n = _mm256_andnot_pd(sign, n), of_d = _mm256_andnot_pd(sign, d);
#pragma GCC unroll 3
    for (int64_t r = 0; r < kCount; ++r) {
      const double* row = rows + r;
      middle[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(row), n, middle[r]);
      same[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(row + 3 * kBlockRows), of_n, same[r]);
      total[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(row + 2 * kBlockRows), s, total[r]);
      middle[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(row + kBlockRows), d, middle[r]);
      same[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(row + 4 * kBlockRows), of_d, same[r]);
    }
  }
#pragma GCC unroll 3
  for (int64_t r = 0; r < kCount; ++r, sums += 3 * kBlockColumns) {
    _mm256_storeu_pd(sums, middle[r]);
    _mm256_storeu_pd(sums + kBlockColumns, same[r]);
    _mm256_storeu_pd(sums + 2 * kBlockColumns, total[r]);
  }
}

void product_block(const double* rows, const double* columns, int64_t terms, double* sums) {
  for (int64_t j = 0; j < kBlockColumns; j += kLanes) {
    int64_t r = 0;
    for (; r + kRows <= kBlockRows; r += kRows) {
      product_tile<kRows>(rows + r, columns + j, terms, sums + 3 * kBlockColumns * r + j);
    }
    product_tile<kBlockRows % kRows>(rows + r, columns + j, terms,
                                     sums + 3 * kBlockColumns * r + j);
  }
}

constexpr TransformerKernels kKernels = {norm_row,     pack_columns, pack_rows, product_block,
                                         product_ends, softmax_row,  scale};

}  // namespace

const TransformerKernels* avx2_kernels() { return &kKernels; }

}  // namespace transformer
}  // namespace pyrobust
