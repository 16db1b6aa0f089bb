// Included by amx.cpp alone: radii beside filtered centres ("Radii on tiles" in filtering.h).
#pragma once

#include "interval/amx_radii.h"
#include "interval/ends.h"
#include "interval/filtering.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr __mmask16 kEvenLanes = 0x5555;

inline __m512 size_of(__m512 value) { return _mm512_abs_ps(value); }
inline __m512 twice(__m512 value) { return _mm512_add_ps(value, value); }

// The largest e of sixteen pixels, the first an even one: d0 of the tile that begins there or d2 of
// the one before, and d1 or d3.
inline __m512 largest_errors(const float* centre) {
  const __m512 here = size_of(_mm512_loadu_ps(centre));
  const __m512 left = _mm512_add_ps(here, size_of(_mm512_loadu_ps(centre - 1)));
  const __m512 right = _mm512_add_ps(here, size_of(_mm512_loadu_ps(centre + 1)));
  const __m512 before = twice(size_of(_mm512_loadu_ps(centre - 2)));
  const __m512 after = twice(size_of(_mm512_loadu_ps(centre + 2)));
  return _mm512_mask_blend_ps(kEvenLanes, _mm512_max_ps(right, _mm512_add_ps(left, before)),
                              _mm512_max_ps(left, _mm512_add_ps(right, after)));
}

// Every second float from `from` on.
inline __m512 evens(const float* from) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(_mm512_loadu_ps(from), even, _mm512_loadu_ps(from + 16));
}

// The same of sixteen even pixels of a convolution of stride 2, d0 and d2 of tiles in turns; d0 is
// d4 of the tile before.
inline __m512 largest_strided_errors(const float* centre) {
  const __m512 beside = _mm512_max_ps(size_of(evens(centre - 2)), size_of(evens(centre + 2)));
  return _mm512_add_ps(size_of(evens(centre)), _mm512_maskz_mov_ps(kEvenLanes, twice(beside)));
}

// r' of sixteen pixels, rounded up, into their halves of words.
inline void store_radii(const FilterRadii& work, __m512 radius, __m512 errors, int64_t count,
                        uint32_t* words) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
  const __m512 part = _mm512_mul_ps(errors, _mm512_set1_ps(work.centre_error));
  const __m512 grown = _mm512_mul_ps(_mm512_add_ps(radius, part), _mm512_set1_ps(kSlack));
  const __m512i bits =
      round_up(_mm512_castps_si512(_mm512_add_ps(grown, _mm512_set1_ps(work.input_floor))));
  const __m512i first =
      work.second ? _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, words), 16) : bits;
  _mm512_mask_storeu_epi32(words, mask,
                           pair_up(first, work.second ? bits : _mm512_setzero_si512()));
}

void filter_radii(const FilterRadii& work) {
  const int64_t columns = work.strided ? work.row_size / 2 : work.row_size;
  for (int64_t y = 0; y < work.rows; ++y) {
    const float *centre = work.centre + y * work.line, *radius = work.radius + y * work.line;
    uint32_t* words = work.words + y * work.row_size;
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t rest = columns - i;
      if (!work.strided) {
        store_radii(work, _mm512_loadu_ps(radius + i), largest_errors(centre + i), rest, words + i);
        continue;
      }
      const float *c = centre + 2 * i, *r = radius + 2 * i;
      store_radii(work, evens(r), largest_strided_errors(c), rest, words + i);
      store_radii(work, evens(r + 1), size_of(evens(c + 1)), rest, words + columns + i);
    }
  }
}

void filter_radius_product(const RadiusProduct& work) {
  configure_tiles();
  for (int64_t g = 0; g < work.groups; g += 2) {
    const int64_t groups = work.groups - g < 2 ? 1 : 2;
    const uint32_t* first = work.words + work.bases[g];
    sum_radii({work.sizes,
               work.size_stride,
               {first, groups == 2 ? work.words + work.bases[g + 1] : first},
               groups,
               work.plane,
               work.places,
               work.taps,
               work.pairs,
               work.rows,
               work.sums + g * kTileInputs,
               kTiledPixels});
  }
  tile::release();
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
