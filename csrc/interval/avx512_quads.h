// Included by avx512_filters.h alone: radii by F(4, 3), sixteen tiles of four outputs a register,
// beside centres by F(2, 3).
#pragma once

#include <immintrin.h>

#include "interval/avx512_packed.h"
#include "interval/avx512_tiles.h"
#include "interval/ends.h"
#include "interval/filtering.h"

namespace pyrobust {
namespace interval {
namespace {

// Six pixels of each of sixteen tiles, whose quarters start at four places of a line.
struct Quad {
  __m512 d[6];
};

inline Quad quad_of(const float* line, const int64_t (&places)[4]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  __m512 evens[2][2], odds[2][2];  // by offset (0 or 4 pixels) and half
  for (int offset = 0; offset < 2; ++offset) {
    for (int half = 0; half < 2; ++half) {
      const __m512 a = _mm512_loadu_ps(line + places[2 * half] + 4 * offset);
      const __m512 b = _mm512_loadu_ps(line + places[2 * half + 1] + 4 * offset);
      evens[offset][half] = _mm512_permutex2var_ps(a, even, b);
      odds[offset][half] = _mm512_permutex2var_ps(a, odd, b);
    }
  }
  return {{_mm512_permutex2var_ps(evens[0][0], even, evens[0][1]),
           _mm512_permutex2var_ps(odds[0][0], even, odds[0][1]),
           _mm512_permutex2var_ps(evens[0][0], odd, evens[0][1]),
           _mm512_permutex2var_ps(odds[0][0], odd, odds[0][1]),
           _mm512_permutex2var_ps(evens[1][0], even, evens[1][1]),
           _mm512_permutex2var_ps(odds[1][0], even, odds[1][1])}};
}

// e(c) of both tiles of F(2, 3), the larger where they share a pixel.
inline Quad centre_errors(const Quad& centre) {
  __m512 size[6];
  for (int i = 0; i < 6; ++i) size[i] = magnitude(centre.d[i]);
  const auto plus = [](__m512 a, __m512 b, __m512 c) {
    return _mm512_add_ps(a, _mm512_add_ps(b, c));
  };
  const __m512 left = _mm512_add_ps(size[1], size[2]), right = _mm512_add_ps(size[3], size[4]);
  return {{plus(left, size[0], size[2]), left, _mm512_max_ps(left, plus(right, size[2], size[4])),
           _mm512_max_ps(plus(left, size[1], size[3]), right), right,
           plus(right, size[3], size[5])}};
}

// f of filtering.h.
inline Quad radius_errors(const Quad& r) {
  const auto& d = r.d;
  const auto times = [](float factor, __m512 x) {
    return _mm512_mul_ps(_mm512_set1_ps(factor), x);
  };
  const auto outer = [&](__m512 a, __m512 b, __m512 c) {  // 4 a + 5 b + c
    return _mm512_add_ps(_mm512_add_ps(times(4.0f, a), times(5.0f, b)), c);
  };
  const __m512 low = _mm512_add_ps(d[1], d[2]), high = _mm512_add_ps(d[3], d[4]);
  const __m512 third = times(0.33333335f, _mm512_add_ps(times(4.0f, low), high));
  const __m512 wide =
      _mm512_add_ps(times(2.0f, _mm512_add_ps(d[1], d[3])), _mm512_add_ps(d[2], d[4]));
  const auto inner = [&](float factor) { return _mm512_add_ps(third, times(factor, wide)); };
  return {{_mm512_add_ps(inner(0.083333336f), times(0.25f, outer(d[0], d[2], d[4]))),
           inner(0.16666667f), inner(0.33333335f), inner(0.66666669f), inner(1.3333334f),
           _mm512_add_ps(inner(2.6666668f), outer(d[1], d[3], d[5]))}};
}

// A radius that takes up an error, rounded up.
inline __m512 widened(__m512 radius, __m512 error, float gain) {
  const __m512 part = _mm512_mul_ps(error, _mm512_set1_ps(gain));
  return _mm512_mul_ps(_mm512_add_ps(radius, part), _mm512_set1_ps(kSlack));
}

// r'' of filtering.h: `errors` gives e of values >= 0.
template <typename Errors>
inline Quad grown(const FilterRows& work, const Quad& of_centre, const Quad& radius,
                  const Errors& errors) {
  const __m512 floor = _mm512_set1_ps(work.input_floor);
  Quad out;
  for (int i = 0; i < 6; ++i) {
    out.d[i] = _mm512_add_ps(widened(radius.d[i], of_centre.d[i], work.centre_error), floor);
  }
  const Quad own = errors(out);
  for (int i = 0; i < 6; ++i) out.d[i] = widened(out.d[i], own.d[i], work.radius_error);
  return out;
}

// Where quarters of rows, which share registers, lie: those beyond the last count as it.
struct Quarters {
  int64_t of_row, count, line;

  Quarters(const FilterRows& work, int64_t tiles)
      : of_row(work.tiles / tiles), count(work.rows * of_row), line(work.line) {}

  int64_t place(int64_t quarter) const {
    const int64_t given = quarter < count ? quarter : count - 1;
    return given / of_row * line + given % of_row * 16;
  }
};

inline void store_quads(const Quad& quad, int64_t plane, float* to) {
  const auto& d = quad.d;
  const __m512 two = _mm512_set1_ps(2.0f), four = _mm512_set1_ps(4.0f), five = _mm512_set1_ps(5.0f);
  const auto outer = [&](__m512 a, __m512 b, __m512 c) {  // 4 a - 5 b + c
    return _mm512_add_ps(_mm512_sub_ps(_mm512_mul_ps(four, a), _mm512_mul_ps(five, b)), c);
  };
  const __m512 near = _mm512_add_ps(d[3], d[4]), far = _mm512_add_ps(d[1], d[2]);
  const __m512 step = _mm512_sub_ps(d[4], d[3]), jump = _mm512_sub_ps(d[1], d[2]);
  const __m512 wide = _mm512_mul_ps(two, _mm512_sub_ps(d[3], d[1])),
               even = _mm512_sub_ps(d[4], d[2]);
  _mm512_storeu_ps(to, outer(d[0], d[2], d[4]));
  _mm512_storeu_ps(to + plane, _mm512_sub_ps(near, _mm512_mul_ps(four, far)));
  _mm512_storeu_ps(to + 2 * plane, _mm512_add_ps(step, _mm512_mul_ps(four, jump)));
  _mm512_storeu_ps(to + 3 * plane, _mm512_add_ps(even, wide));
  _mm512_storeu_ps(to + 4 * plane, _mm512_sub_ps(even, wide));
  _mm512_storeu_ps(to + 5 * plane, outer(d[1], d[3], d[5]));
}

// Rows of sixteen pixels and more: quarters of neighbouring rows share registers.
void filter_quads(const FilterRows& work) {
  const Quarters quarters(work, 8);
  for (int64_t first = 0; first < quarters.count; first += 4) {
    const int64_t places[4] = {quarters.place(first), quarters.place(first + 1),
                               quarters.place(first + 2), quarters.place(first + 3)};
    for (int64_t half = 0; half < 4 && first + half < quarters.count; half += 2) {
      store_products(tile_of(work.centre + places[half], work.centre + places[half + 1]),
                     work.plane, work.centre_tiles + (first + half) * 8);
    }
    const Quad radius = quad_of(work.radius, places);
    store_quads(work.radius_error > 0.0f
                    ? grown(work, centre_errors(quad_of(work.centre, places)), radius,
                            [](const Quad& r) { return radius_errors(r); })
                    : radius,
                work.radius_plane, work.radius_tiles + first * 4);
  }
}

// Sixty-four neighbouring pixels of sixteen tiles.
struct QuadPixels {
  __m512 part[4];
};

inline QuadPixels quad_pixels_of(const __m512 (&m)[kQuadFilters]) {
  const __m512 a = _mm512_add_ps(m[1], m[2]), b = _mm512_sub_ps(m[1], m[2]);
  const __m512 c = _mm512_add_ps(m[3], m[4]), d = _mm512_sub_ps(m[3], m[4]);
  const __m512 unit = _mm512_set1_ps(1.0f / 24.0f), two = _mm512_set1_ps(2.0f);
  const __m512 four = _mm512_set1_ps(4.0f), eight = _mm512_set1_ps(8.0f);
  const __m512 out[4] = {
      _mm512_mul_ps(unit, _mm512_add_ps(m[0], _mm512_add_ps(a, c))),
      _mm512_mul_ps(unit, _mm512_add_ps(b, _mm512_mul_ps(two, d))),
      _mm512_mul_ps(unit, _mm512_add_ps(a, _mm512_mul_ps(four, c))),
      _mm512_mul_ps(unit, _mm512_add_ps(_mm512_add_ps(b, _mm512_mul_ps(eight, d)), m[5]))};
  const Pixels even = interleaved(out[0], out[2]), odd = interleaved(out[1], out[3]);
  const Pixels left = interleaved(even.left, odd.left), right = interleaved(even.right, odd.right);
  return {{left.left, left.right, right.left, right.right}};
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
