// Included by avx512.cpp alone: minimal filtering along rows, sixteen tiles a register.
#pragma once

#include <immintrin.h>

#include <array>
#include <utility>

#include "interval/avx512_ends.h"
#include "interval/avx512_filter_weights.h"
#include "interval/avx512_packed.h"
#include "interval/avx512_quads.h"
#include "interval/avx512_strided.h"
#include "interval/avx512_tiles.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

static_assert(kTileGroup == 16 && kPanelWidth == 16, "a group of tiles fills a register");

// --- rows of pixels
// -------------------------------------------------------------------------------

// e of filtering.h, of values >= 0.
inline Tile errors_of(const Tile& v) {
  const __m512 inner = _mm512_add_ps(v.d1, v.d2);
  return {_mm512_add_ps(inner, _mm512_add_ps(v.d0, v.d2)), inner, inner,
          _mm512_add_ps(inner, _mm512_add_ps(v.d3, v.d1))};
}

// r'' of filtering.h.
inline Tile grown(const FilterRows& work, const Tile& centre, const Tile& radius) {
  const __m512 slack = _mm512_set1_ps(kSlack), floor = _mm512_set1_ps(work.input_floor);
  const auto plus = [&](__m512 r, __m512 error, float gain) {
    const __m512 part = _mm512_mul_ps(error, _mm512_set1_ps(gain));
    return _mm512_mul_ps(_mm512_add_ps(r, part), slack);
  };
  const Tile of_centre = errors_of(
      {magnitude(centre.d0), magnitude(centre.d1), magnitude(centre.d2), magnitude(centre.d3)});
  const auto with_centre = [&](__m512 r, __m512 error) {
    return _mm512_add_ps(plus(r, error, work.centre_error), floor);
  };
  const Tile now{with_centre(radius.d0, of_centre.d0), with_centre(radius.d1, of_centre.d1),
                 with_centre(radius.d2, of_centre.d2), with_centre(radius.d3, of_centre.d3)};
  const Tile own = errors_of(now);
  const float gain = work.radius_error;
  return {plus(now.d0, own.d0, gain), plus(now.d1, own.d1, gain), plus(now.d2, own.d2, gain),
          plus(now.d3, own.d3, gain)};
}

// Sixteen tiles whose halves start at pixels `left` and `right` of the lines, to place `to`.
inline void sixteen_tiles(const FilterRows& work, int64_t left, int64_t right, int64_t to) {
  const Tile centre = tile_of(work.centre + left, work.centre + right);
  store_products(centre, work.plane, work.centre_tiles + to);
  if (work.radius_tiles == nullptr) return;
  const Tile radius = tile_of(work.radius + left, work.radius + right);
  store_products(work.radius_error > 0.0f ? grown(work, centre, radius) : radius, work.plane,
                 work.radius_tiles + to);
}

void filter_tiles(const FilterRows& work) {
  if (work.strided) return filter_strided(work);
  if (work.quads) return filter_quads(work);
  if (work.tiles % 8 == 0) {  // halves of neighbouring rows share registers
    const int64_t of_row = work.tiles / 8, count = work.rows * of_row;
    const auto place = [&](int64_t half) { return half / of_row * work.line + half % of_row * 16; };
    for (int64_t half = 0; half < count; half += 2) {
      sixteen_tiles(work, place(half), place(half + 1 < count ? half + 1 : half), half * 8);
    }
    return;
  }
  for (int64_t row = 0; row < work.rows; ++row) {
    for (int64_t t = 0; t < work.tiles; t += 16) {
      const int64_t from = row * work.line + 2 * t;
      sixteen_tiles(work, from, from + 16, row * work.tiles + t);
    }
  }
}

// --- products
// -------------------------------------------------------------------------------------

// 24 accumulators, four columns of tiles and a weight: 29 of the 32 registers.
constexpr int kFilterRows = 6;
// Terms whose tiles stay in a first-level cache while all rows of W meet them.
constexpr int64_t kFilterChunk = 96;

struct FilterPart {
  const float* tiles;
  const int64_t* places;
  const float* weight;
  int64_t terms;  // of a row of W
  float* sums;
  int64_t sum_stride;
};

template <int R, int P>
void filter_run(const FilterPart& part, int64_t begin, int64_t end) {
  __m512 sum[R][P];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[i][p] = _mm512_setzero_ps();
  }
  for (int64_t k = begin; k < end; ++k) {
    const float* from = part.tiles + part.places[k];
    __m512 x[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) x[p] = _mm512_loadu_ps(from + p * 16);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m512 w = _mm512_set1_ps(part.weight[i * part.terms + k]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[i][p] = _mm512_fmadd_ps(w, x[p], sum[i][p]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      float* at = part.sums + i * part.sum_stride + p * 16;
      const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
      _mm512_storeu_ps(at, _mm512_add_ps(before, sum[i][p]));
    }
  }
}

using FilterRun = void (*)(const FilterPart&, int64_t, int64_t);

template <int P, int... R>
constexpr std::array<FilterRun, sizeof...(R)> runs_by_rows(std::integer_sequence<int, R...>) {
  return {filter_run<R + 1, P>...};
}

// One of the products.
template <int P>
void filter_plane(const FilterProduct& work, const FilterPart& all) {
  static constexpr auto kRuns = runs_by_rows<P>(std::make_integer_sequence<int, kFilterRows>());
  const int64_t count = (work.rows + kFilterRows - 1) / kFilterRows;
  for (int64_t chunk = 0; chunk < work.terms; chunk += kFilterChunk) {
    const int64_t last = work.terms < chunk + kFilterChunk ? work.terms : chunk + kFilterChunk;
    for (int64_t t = 0, n = 0; t < count; ++t) {
      const int64_t next = work.rows * (t + 1) / count;
      FilterPart part = all;
      part.weight += n * work.terms;
      part.sums += n * part.sum_stride;
      for (int64_t begin = chunk; begin < last; begin += work.run) {
        const int64_t end = last < begin + work.run ? last : begin + work.run;
        kRuns[static_cast<size_t>(next - n - 1)](part, begin, end);
      }
      n = next;
    }
  }
}

void filter_product(const FilterProduct& work) {
  for (int64_t i = 0; i < work.filters; ++i) {
    const FilterPart part{work.tiles + i * work.plane,
                          work.places,
                          work.weight + i * work.weight_plane,
                          work.terms,
                          work.sums + i * work.rows * work.sum_stride,
                          work.sum_stride};
    switch (work.groups) {
      case 1:
        filter_plane<1>(work, part);
        break;
      case 2:
        filter_plane<2>(work, part);
        break;
      case 3:
        filter_plane<3>(work, part);
        break;
      default:
        filter_plane<4>(work, part);
    }
  }
}

// --- outputs
// --------------------------------------------------------------------------------------

// N sums of sixteen tiles, which lie `plane` apart.
template <int N>
struct TileSums {
  __m512 m[N];

  TileSums(const float* sums, int64_t plane) {
    for (int i = 0; i < N; ++i) m[i] = _mm512_loadu_ps(sums + i * plane);
  }
};

inline Pixels pixels_of(bool strided, const float* sums, int64_t plane) {
  if (strided) return pixels_of_products(TileSums<kStridedFilters>(sums, plane).m);
  return pixels_of_products(TileSums<kFilters>(sums, plane).m);
}

// Radii of pixels [pixel, pixel + 64) of row n; without quads the first half is there.
inline QuadPixels radii_of(const FilterEnds& work, int64_t n, int64_t pixel) {
  if (work.tiled) {
    const float* from = work.radius + n * kTiledPixels + pixel;
    return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}};
  }
  const float* sums = work.radius + n * kBlockTiles;
  const int64_t plane = work.rows * kBlockTiles;
  if (work.quads) return quad_pixels_of(TileSums<kQuadFilters>(sums + pixel / 4, plane).m);
  const Pixels pixels = pixels_of(work.strided, sums + pixel / 2, plane);
  return {{pixels.left, pixels.right}};
}

bool filter_ends(const FilterEnds& work, const Constants& constants) {
  const int64_t stride = work.quads ? 2 * kBlockTiles : kBlockTiles, step = work.quads ? 64 : 32;
  const __m512 offset = _mm512_set1_ps(work.offset);
  __m512 largest = _mm512_setzero_ps();
  const auto store = [&](__m512 centre, __m512 radius, __m512 shift, int64_t at, int64_t count) {
    if (count <= 0) return;
    const SixteenEnds ends = finish_sixteen(centre, radius, shift, offset, constants, &largest);
    store_end(work.out_lower + at, count, ends.lower, work.past_cache);
    store_end(work.out_upper + at, count, ends.upper, work.past_cache);
  };
  for (int64_t i = 0; i < work.count; ++i) {
    const __m512 shift = _mm512_set1_ps(work.bias != nullptr ? work.bias[i] : 0.0f);
    const int64_t n = work.first + i;
    for (int64_t pixel = 0; pixel < work.pixels; pixel += step) {
      const QuadPixels radii = radii_of(work, n, pixel);
      for (int64_t half = 0; 32 * half < step; ++half) {
        const int64_t from = pixel + 32 * half, to = i * work.row_stride + from;
        const Pixels centres =
            pixels_of(work.strided, work.centre + n * stride + from / 2, work.rows * stride);
        store(centres.left, radii.part[2 * half], shift, to, work.pixels - from);
        store(centres.right, radii.part[2 * half + 1], shift, to + 16, work.pixels - from - 16);
      }
    }
  }
  if (work.past_cache) _mm_sfence();
  return finite(largest);
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
