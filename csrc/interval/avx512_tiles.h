// Included by avx512_filters.h alone: what both forms of its tiles share.
#pragma once

#include <immintrin.h>

namespace pyrobust {
namespace interval {
namespace {

// Sixteen tiles, the first eight from one place and the others from another.
struct Tile {
  __m512 d0, d1, d2, d3;
};

inline Tile tile_of(const float* left, const float* right) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  const __m512 a = _mm512_loadu_ps(left), b = _mm512_loadu_ps(right);
  const __m512 c = _mm512_loadu_ps(left + 2), d = _mm512_loadu_ps(right + 2);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b),
          _mm512_permutex2var_ps(c, even, d), _mm512_permutex2var_ps(c, odd, d)};
}

inline void store_products(const Tile& tile, int64_t plane, float* to) {
  _mm512_storeu_ps(to, _mm512_sub_ps(tile.d0, tile.d2));
  _mm512_storeu_ps(to + plane, _mm512_add_ps(tile.d1, tile.d2));
  _mm512_storeu_ps(to + 2 * plane, _mm512_sub_ps(tile.d2, tile.d1));
  _mm512_storeu_ps(to + 3 * plane, _mm512_sub_ps(tile.d1, tile.d3));
}

// Thirty-two neighbouring pixels.
struct Pixels {
  __m512 left, right;
};

inline Pixels interleaved(__m512 first, __m512 second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(first, low, second), _mm512_permutex2var_ps(first, high, second)};
}

inline Pixels pixels_of_products(const __m512 (&m)[4]) {
  return interleaved(_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]),
                     _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]));
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
