// Included by avx512.cpp alone: minimal filtering along rows and columns (filtering.h), tiles of
// two output rows, sixteen a register.
#pragma once

#include <immintrin.h>

#include "interval/avx512_ends.h"
#include "interval/avx512_filter_weights.h"
#include "interval/avx512_quads.h"
#include "interval/avx512_strided.h"
#include "interval/avx512_tiles.h"
#include "interval/filtering.h"

namespace pyrobust {
namespace interval {
namespace {

// --- down a column of a tile: F(2, 3) of four pixels, with stride 2 F(2, 2) and the others of five
// -------------------------------------------------------------------------------------------------

inline void products_down(const __m512 (&d)[4], __m512 (&v)[4]) {
  v[0] = _mm512_sub_ps(d[0], d[2]);
  v[1] = _mm512_add_ps(d[1], d[2]);
  v[2] = _mm512_sub_ps(d[2], d[1]);
  v[3] = _mm512_sub_ps(d[1], d[3]);
}

inline void products_down(const __m512 (&d)[5], __m512 (&v)[5]) {
  v[0] = _mm512_sub_ps(d[0], d[2]);
  v[1] = d[2];
  v[2] = _mm512_sub_ps(d[2], d[4]);
  v[3] = d[1];
  v[4] = d[3];
}

inline void errors_down(const __m512 (&d)[4], __m512 (&e)[4]) {
  e[1] = e[2] = _mm512_add_ps(d[1], d[2]);
  e[0] = _mm512_add_ps(e[1], _mm512_add_ps(d[0], d[2]));
  e[3] = _mm512_add_ps(e[1], _mm512_add_ps(d[1], d[3]));
}

inline void errors_down(const __m512 (&d)[5], __m512 (&e)[5]) {
  const __m512 twice = _mm512_add_ps(d[2], d[2]);
  e[0] = _mm512_add_ps(d[0], twice);
  e[1] = d[1];
  e[2] = d[2];
  e[3] = d[3];
  e[4] = _mm512_add_ps(d[4], twice);
}

// Both outputs of a column.
struct Column {
  __m512 top, bottom;
};

inline Column outputs_down(const __m512 (&m)[4]) {
  return {_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]),
          _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3])};
}

inline Column outputs_down(const __m512 (&m)[5]) {
  return {_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[3]),
          _mm512_add_ps(_mm512_sub_ps(m[1], m[2]), m[4])};
}

// --- tiles of J lines
// -------------------------------------------------------------------------------------------------

template <int J>
struct Square {
  Quad line[J];
};

// `change` takes J pixels of a column to J others.
template <int J, typename Change>
inline void change_columns(Square<J>& square, const Change& change) {
  for (int i = 0; i < 6; ++i) {
    __m512 before[J], after[J];
    for (int j = 0; j < J; ++j) before[j] = square.line[j].d[i];
    change(before, after);
    for (int j = 0; j < J; ++j) square.line[j].d[i] = after[j];
  }
}

template <int J>
inline void to_products(Square<J>& square) {
  change_columns(square, [](const __m512(&d)[J], __m512(&v)[J]) { products_down(d, v); });
}

template <int J, typename Errors>
inline Square<J> square_errors(const Square<J>& square, const Errors& along_rows) {
  Square<J> out;
  for (int j = 0; j < J; ++j) out.line[j] = along_rows(square.line[j]);
  change_columns(out, [](const __m512(&d)[J], __m512(&e)[J]) { errors_down(d, e); });
  return out;
}

// r'' of filtering.h: the functions give e of the pixels of a line.
template <int J, typename CentreErrors, typename RadiusErrors>
inline void grow_square(const SquareRows& work, const Square<J>& centre, Square<J>& radius,
                        const CentreErrors& of_centres, const RadiusErrors& of_radii) {
  const __m512 floor = _mm512_set1_ps(work.input_floor);
  const Square<J> of_centre = square_errors(centre, of_centres);
  for (int j = 0; j < J; ++j) {
    for (int i = 0; i < 6; ++i) {
      __m512& r = radius.line[j].d[i];
      r = _mm512_add_ps(widened(r, of_centre.line[j].d[i], work.centre_error), floor);
    }
  }
  const Square<J> own = square_errors(radius, of_radii);
  for (int j = 0; j < J; ++j) {
    for (int i = 0; i < 6; ++i) {
      __m512& r = radius.line[j].d[i];
      r = widened(r, own.line[j].d[i], work.radius_error);
    }
  }
}

template <int J>
inline Square<J> square_of(const SquareRows& work, const float* lines, const int64_t (&places)[4]) {
  Square<J> out;
  for (int j = 0; j < J; ++j) out.line[j] = quad_of(lines + j * work.line, places);
  return out;
}

// Centres of two parts.
inline void pair_of_parts(const SquareRows& work, int64_t left, int64_t right, float* to) {
  Square<4> square;
  for (int j = 0; j < 4; ++j) {
    const float* line = work.centre + j * work.line;
    const Tile tile = tile_of(line + left, line + right);
    const __m512 none = _mm512_setzero_ps();
    square.line[j] = {{tile.d0, tile.d1, tile.d2, tile.d3, none, none}};
  }
  to_products(square);
  for (int j = 0; j < 4; ++j) {
    const auto& d = square.line[j].d;
    store_products({d[0], d[1], d[2], d[3]}, work.plane, to + j * kFilters * work.plane);
  }
}

inline void four_parts(const SquareRows& work, const int64_t (&places)[4], float* to) {
  Square<4> radius = square_of<4>(work, work.radius, places);
  if (work.radius_error > 0.0f) {
    grow_square(work, square_of<4>(work, work.centre, places), radius, centre_errors,
                radius_errors);
  }
  to_products(radius);
  for (int j = 0; j < 4; ++j) {
    store_quads(radius.line[j], work.radius_plane, to + j * kQuadFilters * work.radius_plane);
  }
}

inline void strided_parts(const SquareRows& work, const int64_t (&places)[4], int64_t to) {
  constexpr int J = kStridedFilters;
  Square<J> centre = square_of<J>(work, work.centre, places);
  Square<J> radius = square_of<J>(work, work.radius, places);
  if (work.radius_error > 0.0f) {
    grow_square(work, centre, radius, strided_centre_errors, strided_errors);
  }
  to_products(centre);
  to_products(radius);
  for (int j = 0; j < J; ++j) {
    store_strided(centre.line[j], work.plane, work.centre_tiles + to + j * J * work.plane);
    store_strided(radius.line[j], work.radius_plane,
                  work.radius_tiles + to + j * J * work.radius_plane);
  }
}

void count_nonzero_pixels(const Ends& ends, int32_t* counts) {
  const __m512 zero = _mm512_setzero_ps(), floor = _mm512_set1_ps(ends.floor);
  const auto vanishes = [&](__m512 x) {
    return _mm512_cmp_ps_mask(x, zero, _CMP_EQ_OQ) | _mm512_cmp_ps_mask(x, floor, _CMP_LT_OQ);
  };
  for (int64_t x = 0; x < ends.count; x += 16) {
    const int64_t rest = ends.count - x;  // absent lanes are zero
    const int zeros =
        vanishes(load_lanes(ends.lower + x, rest)) & vanishes(load_lanes(ends.upper + x, rest));
    const __m512i before = _mm512_maskz_loadu_epi32(lanes_mask(rest), counts + x);
    const __m512i after =
        _mm512_mask_add_epi32(before, static_cast<__mmask16>(~zeros), before, _mm512_set1_epi32(1));
    _mm512_mask_storeu_epi32(counts + x, lanes_mask(rest), after);
  }
}

// Parts beyond the last count as it.
void square_tiles(const SquareRows& work) {
  const int64_t step = work.strided ? 2 : 1;
  const auto place = [&](int64_t part) {
    const int64_t given = part < work.parts ? part : work.parts - 1;
    return given / work.of_row * 2 * step * work.line + given % work.of_row * 16 * step;
  };
  for (int64_t part = 0; work.strided && part < work.parts; part += 2) {
    const int64_t left = place(part), right = place(part + 1);
    strided_parts(work, {left, left + 16, right, right + 16}, part * 8);
  }
  for (int64_t part = 0; !work.strided && part < work.parts; part += 4) {
    const int64_t places[4] = {place(part), place(part + 1), place(part + 2), place(part + 3)};
    for (int64_t half = 0; half < 4 && part + half < work.parts; half += 2) {
      pair_of_parts(work, places[half], places[half + 1], work.centre_tiles + (part + half) * 8);
    }
    four_parts(work, places, work.radius_tiles + part * 4);
  }
}

// --- filters of sixteen kernels
// -------------------------------------------------------------------------------------------------

// `along` gives N products of a row of the window, `down` those of a column.
template <int N, typename Along, typename Down>
inline void square_filters_of(const __m512 (&g)[9], const FilterLanes& out, const Along& along,
                              const Down& down) {
  float rows[3][N * 16];
  for (int y = 0; y < 3; ++y) along({g[3 * y], g[3 * y + 1], g[3 * y + 2]}, {16, 16, rows[y]});
  for (int i = 0; i < N; ++i) {
    const auto row = [&](int y) { return _mm512_loadu_ps(rows[y] + 16 * i); };
    down({row(0), row(1), row(2)}, {N * out.plane, out.count, out.to + i * out.plane});
  }
}

void square_weights(const FilterWeights& work) {
  const __m512i places =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(9));
  for (int64_t k = 0; k < work.count; k += 16) {
    const int64_t count = work.count - k < 16 ? work.count - k : 16;
    __m512 g[9], size[9];
    for (int i = 0; i < 9; ++i) {
      g[i] = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes_mask(count), places,
                                      work.weight + 9 * k + i, sizeof(float));
      size[i] = magnitude(g[i]);
    }
    const FilterLanes centre{work.plane, count, work.centre + k};
    const FilterLanes radius{work.plane, count, work.radius + k};
    if (work.strided) {
      square_filters_of<kStridedFilters>(g, centre, strided_filters_of, strided_filters_of);
      square_filters_of<kStridedFilters>(size, radius, strided_filters_of, strided_filters_of);
    } else {
      square_filters_of<kFilters>(g, centre, filters_of, filters_of);
      square_filters_of<kQuadFilters>(size, radius, quad_filters_of, filters_of);
    }
  }
}

// --- outputs
// -------------------------------------------------------------------------------------------------

// Sums of N products along a row, of both rows of outputs.
template <int N>
struct SquareSums {
  __m512 top[N], bottom[N];
};

template <int J, int N>
inline SquareSums<N> sums_down(const float* sums, int64_t plane) {
  SquareSums<N> out;
  for (int i = 0; i < N; ++i) {
    __m512 m[J];
    for (int j = 0; j < J; ++j) m[j] = _mm512_loadu_ps(sums + (j * N + i) * plane);
    const Column column = outputs_down(m);
    out.top[i] = column.top;
    out.bottom[i] = column.bottom;
  }
  return out;
}

// Four parts: sixteen pixels of both rows each.
struct PartPixels {
  __m512 top[4], bottom[4];
};

inline void set_two(PartPixels& out, int first, const Pixels& top, const Pixels& bottom) {
  out.top[first] = top.left;
  out.top[first + 1] = top.right;
  out.bottom[first] = bottom.left;
  out.bottom[first + 1] = bottom.right;
}

// Of tiles of two pixels a row.
template <int J>
inline PartPixels parts_of_pairs(const float* sums, int64_t plane) {
  PartPixels out;
  for (int half = 0; half < 2; ++half) {
    const SquareSums<J> m = sums_down<J, J>(sums + 16 * half, plane);
    set_two(out, 2 * half, pixels_of_products(m.top), pixels_of_products(m.bottom));
  }
  return out;
}

inline PartPixels parts_of_quads(const float* sums, int64_t plane) {
  const SquareSums<kQuadFilters> m = sums_down<4, kQuadFilters>(sums, plane);
  const QuadPixels top = quad_pixels_of(m.top), bottom = quad_pixels_of(m.bottom);
  PartPixels out;
  for (int k = 0; k < 4; ++k) {
    out.top[k] = top.part[k];
    out.bottom[k] = bottom.part[k];
  }
  return out;
}

bool square_ends(const SquareEnds& work, const Constants& constants) {
  constexpr int64_t kPairs = kSquareParts * 8, kQuads = kSquareParts * 4;
  constexpr int J = kStridedFilters;
  const int64_t width = 16 * work.of_row, radius_stride = work.strided ? kPairs : kQuads;
  const __m512 offset = _mm512_set1_ps(work.offset);
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < work.count; ++i) {
    const __m512 shift = _mm512_set1_ps(work.bias != nullptr ? work.bias[i] : 0.0f);
    const float* centre = work.centre + (work.first + i) * kPairs;
    const float* radius = work.radius + (work.first + i) * radius_stride;
    const auto store = [&](__m512 c, __m512 r, int64_t at) {
      const SixteenEnds ends = finish_sixteen(c, r, shift, offset, constants, &largest);
      store_end(work.out_lower + at, 16, ends.lower, work.past_cache);
      store_end(work.out_upper + at, 16, ends.upper, work.past_cache);
    };
    for (int64_t part = 0; part < work.parts; part += 4) {
      const int64_t plane = work.rows * kPairs;
      const PartPixels c = work.strided ? parts_of_pairs<J>(centre + 8 * part, plane)
                                        : parts_of_pairs<4>(centre + 8 * part, plane);
      const PartPixels r = work.strided
                               ? parts_of_pairs<J>(radius + 8 * part, plane)
                               : parts_of_quads(radius + 4 * part, work.rows * radius_stride);
      for (int64_t k = 0; k < 4 && part + k < work.parts; ++k) {
        const int64_t p = part + k,
                      at = i * work.row_stride + p / work.of_row * 2 * width + p % work.of_row * 16;
        store(c.top[k], r.top[k], at);
        store(c.bottom[k], r.bottom[k], at + width);
      }
    }
  }
  if (work.past_cache) _mm_sfence();
  return finite(largest);
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
