// The product of two boxes by five products of float64, in one pass: H. D. Nguyen, "Efficient
// algorithms for verified scientific computing", thesis, ENS Lyon 2011. With a = m +- r, the core
// c = min(|m|, r) sign m and s = |m| + r,
//   M = sum m m' + c c',   Q = sum |m| |m'| + |c| |c'|,   T = sum s s',
// the image lies in [M - (T - Q), M + (T - Q)], exactly so where no entry crosses zero. Each sum
// takes its terms in turn, one fused multiplication and addition after the other, on every
// instruction set.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace transformer {

constexpr int64_t kBlockRows = 8;     // of A
constexpr int64_t kBlockColumns = 8;  // of B
// Doubles of one term: m, c, s of the columns; m, c, s, |m|, |c| of the rows.
constexpr int64_t kColumnTerm = 3 * kBlockColumns, kRowTerm = 5 * kBlockRows;
constexpr int64_t kBlockSums = 3 * kBlockRows * kBlockColumns;  // M, Q, T of each row

}  // namespace transformer
}  // namespace pyrobust
