// Included by avx512_filters.h alone: tiles of convolutions of stride 2, sixteen a register.
#pragma once

#include <immintrin.h>

#include "interval/avx512_quads.h"
#include "interval/avx512_tiles.h"
#include "interval/filtering.h"

namespace pyrobust {
namespace interval {
namespace {

// e of filtering.h, of values >= 0; the sixth pixel belongs to the next tile alone.
inline Quad strided_errors(const Quad& v) {
  const __m512 twice = _mm512_add_ps(v.d[2], v.d[2]);
  return {{_mm512_add_ps(v.d[0], twice), v.d[1], v.d[2], v.d[3], _mm512_add_ps(v.d[4], twice),
           _mm512_setzero_ps()}};
}

inline Quad strided_centre_errors(const Quad& centre) {
  Quad size;
  for (int i = 0; i < 6; ++i) size.d[i] = magnitude(centre.d[i]);
  return strided_errors(size);
}

inline Quad strided_grown(const FilterRows& work, const Quad& centre, const Quad& radius) {
  return grown(work, strided_centre_errors(centre), radius,
               [](const Quad& v) { return strided_errors(v); });
}

inline void store_strided(const Quad& tile, int64_t plane, float* to) {
  const auto& d = tile.d;
  _mm512_storeu_ps(to, _mm512_sub_ps(d[0], d[2]));
  _mm512_storeu_ps(to + plane, d[2]);
  _mm512_storeu_ps(to + 2 * plane, _mm512_sub_ps(d[2], d[4]));
  _mm512_storeu_ps(to + 3 * plane, d[1]);
  _mm512_storeu_ps(to + 4 * plane, d[3]);
}

// Quarters of neighbouring rows share registers.
void filter_strided(const FilterRows& work) {
  const Quarters quarters(work, 4);
  for (int64_t first = 0; first < quarters.count; first += 4) {
    const int64_t places[4] = {quarters.place(first), quarters.place(first + 1),
                               quarters.place(first + 2), quarters.place(first + 3)};
    const Quad centre = quad_of(work.centre, places);
    store_strided(centre, work.plane, work.centre_tiles + first * 4);
    if (work.radius_tiles == nullptr) continue;
    const Quad radius = quad_of(work.radius, places);
    store_strided(work.radius_error > 0.0f ? strided_grown(work, centre, radius) : radius,
                  work.radius_plane, work.radius_tiles + first * 4);
  }
}

inline Pixels pixels_of_products(const __m512 (&m)[kStridedFilters]) {
  return interleaved(_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[3]),
                     _mm512_add_ps(_mm512_sub_ps(m[1], m[2]), m[4]));
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
