// The loops without wide instructions: the reference. Processors without fused multiplications take
// far longer for products than torch does; they are older than AVX2.
#include "transformer/norm_loops.h"
#include "transformer/product_loops.h"
#include "transformer/scale_loops.h"
#include "transformer/softmax_loops.h"

namespace pyrobust {
namespace transformer {
namespace {

void product_block(const double* rows, const double* columns, int64_t terms, double* sums) {
  for (int64_t i = 0; i < kBlockSums; ++i) sums[i] = 0.0;
  for (int64_t k = 0; k < terms; ++k, rows += kRowTerm, columns += kColumnTerm) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const double m = rows[r], c = rows[kBlockRows + r], s = rows[2 * kBlockRows + r];
      const double of_m = rows[3 * kBlockRows + r], of_c = rows[4 * kBlockRows + r];
      double* middle = sums + 3 * kBlockColumns * r;
      double *same = middle + kBlockColumns, *total = same + kBlockColumns;
      for (int64_t j = 0; j < kBlockColumns; ++j) {
        const double n = columns[j], d = columns[kBlockColumns + j];
        middle[j] = std::fma(c, d, std::fma(m, n, middle[j]));
        same[j] = std::fma(of_c, std::fabs(d), std::fma(of_m, std::fabs(n), same[j]));
        total[j] = std::fma(s, columns[2 * kBlockColumns + j], total[j]);
      }
    }
  }
}

}  // namespace

const TransformerKernels kPortableKernels = {norm_row,     pack_columns, pack_rows, product_block,
                                             product_ends, softmax_row,  scale};

}  // namespace transformer
}  // namespace pyrobust
