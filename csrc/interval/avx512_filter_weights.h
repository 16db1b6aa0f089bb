// Included by avx512_filters.h alone: the filters of W and of |W|, sixteen rows of windows a
// register. They are made anew at every call, as W may have changed.
#pragma once

#include <immintrin.h>

#include "interval/avx512_ends.h"
#include "interval/avx512_packed.h"
#include "interval/filtering.h"

namespace pyrobust {
namespace interval {
namespace {

struct Weights {
  __m512 a, b, c;  // g0, g1, g2
};

// Of the first `count` triples.
inline Weights weights_of(const float* from, int64_t count) {
  __m512 part[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t rest = 3 * count - 16 * i;
    part[i] = load_lanes(from + 16 * i, rest > 0 ? rest : 0);
  }
  const __m512i lanes =
      _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
  const auto every_third = [&](int first) {
    // permutations read the lowest bits of a place: five of two registers, four of one
    const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    const __mmask16 beyond = _mm512_cmpge_epi32_mask(places, _mm512_set1_epi32(32));
    return _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(part[0], places, part[1]), beyond,
                                      places, part[2]);
  };
  return {every_third(0), every_third(1), every_third(2)};
}

// Sixteen filters of one kind at `to`, the next kind `plane` further.
struct FilterLanes {
  int64_t plane, count;
  float* to;

  void store(int kind, __m512 value) const { store_lanes(to + kind * plane, count, value); }
};

inline void filters_of(const Weights& g, const FilterLanes& out) {
  const __m512 outer = _mm512_add_ps(g.a, g.c), half = _mm512_set1_ps(0.5f);
  out.store(0, g.a);
  out.store(1, _mm512_mul_ps(_mm512_add_ps(outer, g.b), half));
  out.store(2, _mm512_mul_ps(_mm512_sub_ps(outer, g.b), half));
  out.store(3, g.c);
}

inline void quad_filters_of(const Weights& g, const FilterLanes& out) {
  const auto times = [](float factor, __m512 x) {
    return _mm512_mul_ps(_mm512_set1_ps(factor), x);
  };
  const __m512 outer = _mm512_add_ps(g.a, g.c), twice = times(2.0f, g.b);
  const __m512 wide = _mm512_add_ps(g.a, times(4.0f, g.c));
  out.store(0, times(6.0f, g.a));
  out.store(1, times(-4.0f, _mm512_add_ps(outer, g.b)));
  out.store(2, times(-4.0f, _mm512_sub_ps(outer, g.b)));
  out.store(3, _mm512_add_ps(wide, twice));
  out.store(4, _mm512_sub_ps(wide, twice));
  out.store(5, times(24.0f, g.c));
}

inline void strided_filters_of(const Weights& g, const FilterLanes& out) {
  out.store(0, g.a);
  out.store(1, _mm512_add_ps(g.a, g.c));
  out.store(2, g.c);
  out.store(3, g.b);
  out.store(4, g.b);
}

void filter_weights(const FilterWeights& work) {
  const auto of_centres = work.strided ? strided_filters_of : filters_of;
  const auto of_radii = work.quads ? quad_filters_of : of_centres;
  for (int64_t k = 0; k < work.count; k += 16) {
    const int64_t count = work.count - k < 16 ? work.count - k : 16;
    const Weights g = weights_of(work.weight + 3 * k, count);
    of_centres(g, {work.plane, count, work.centre + k});
    if (work.radius == nullptr) continue;
    of_radii({magnitude(g.a), magnitude(g.b), magnitude(g.c)},
             {work.plane, count, work.radius + k});
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
