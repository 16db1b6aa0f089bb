// Sums in registers of R rows of W against P groups of sixteen inputs, of centres and of radii.
#pragma once

#include <immintrin.h>

namespace pyrobust {
namespace interval {
namespace {

template <int R, int P>
struct PixelSums {
  __m512 c[R][P], r[R][P];

  void clear() {
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) c[i][p] = r[i][p] = _mm512_setzero_ps();
    }
  }

  void add(const PixelSums& other) {
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        c[i][p] = _mm512_add_ps(c[i][p], other.c[i][p]);
        r[i][p] = _mm512_add_ps(r[i][p], other.r[i][p]);
      }
    }
  }

  // The same with `other`'s radii times a factor for each row, `stride` apart.
  void add(const PixelSums& other, const float* factors, int64_t stride) {
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m512 factor = _mm512_set1_ps(factors[i * stride]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        c[i][p] = _mm512_add_ps(c[i][p], other.c[i][p]);
        r[i][p] = _mm512_fmadd_ps(other.r[i][p], factor, r[i][p]);
      }
    }
  }
};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
