// Included by avx512.cpp alone: planes of one channel, sixteen pixels at a time.
#pragma once

#include <immintrin.h>

#include "interval/avx512_ends.h"
#include "interval/plane_loops.h"

namespace pyrobust {
namespace interval {
namespace {

struct SixteenLanes {
  using Floats = __m512;
  static constexpr int kWidth = 16;

  static __m512 all(float x) { return _mm512_set1_ps(x); }
  static __m512 size(__m512 x) { return magnitude(x); }
  static __m512 larger(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }
  static __m512 multiply_add(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
  static __m512 first(__m512 x, int64_t count) { return _mm512_maskz_mov_ps(lanes_mask(count), x); }
  static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static __m512 load(const float* from, int64_t count) {
    _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
    return load_lanes(from, count);
  }
  static __m512 even(__m512 a, __m512 b) { return _mm512_permutex2var_ps(a, every_second(0), b); }
  static __m512 odd(__m512 a, __m512 b) { return _mm512_permutex2var_ps(a, every_second(1), b); }
  static __m512i every_second(int first) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_add_epi32(even, _mm512_set1_epi32(first));
  }
  static void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
  static void store_end(float* to, int64_t count, __m512 x, bool past_cache) {
    interval::store_end(to, count, x, past_cache);
  }
  static float largest(__m512 x) { return _mm512_reduce_max_ps(x); }
  static bool all_finite(__m512 x) { return finite(x); }

  static PreparedLanes<__m512> prepare(__m512 low, __m512 high, __m512 floor,
                                       const Constants& constants) {
    const Sixteen out = prepare_sixteen(low, high, floor, constants);
    const __m512 infinite = _mm512_set1_ps(rounding::infinity());
    return {out.centre, out.radius, _mm512_mask_mov_ps(out.magnitude, out.unbounded, infinite)};
  }
  static EndLanes<__m512> finish(__m512 centre, __m512 radius, __m512 shift, __m512 offset,
                                 const Constants& constants, __m512* largest) {
    const SixteenEnds out = finish_sixteen(centre, radius, shift, offset, constants, largest);
    return {out.lower, out.upper};
  }
};

// Rows of at most eight pixels would leave half of each register empty.
float fill_sixteen(const FillPlane& work, const Constants& constants) {
  if (work.width <= kLanes) return avx2_kernels()->fill_plane(work, constants);
  return fill_plane<SixteenLanes>(work, constants);
}

bool plane_of_sixteen(const Plane& work, const Constants& constants) {
  if (work.out_width <= kLanes) return avx2_kernels()->plane(work, constants);
  const bool finite = plane_ends<SixteenLanes>(work, constants);
  if (work.past_cache) _mm_sfence();
  return finite;
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
