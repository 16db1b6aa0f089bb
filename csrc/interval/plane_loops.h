// Convolutions of one channel, from its prepared plane to ends: included by the file of each
// instruction set that supplies lanes. A sum is one run over the columns of the window and, within,
// its rows, at most kMostTaps terms. Sums stay in registers until they are ends.
#pragma once

#include <cstdint>

#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

template <typename Floats>
struct PreparedLanes {
  Floats centre, radius, largest;  // the last infinite where an end is not finite
};

template <typename Floats>
struct EndLanes {
  Floats lower, upper;
};

// V has V::kWidth floats a register. Rows are shorter than whole registers: those past a row's end
// are written too, as zeros in a plane, as anything in outputs, where the next row follows.
template <typename V>
class Filling {
 public:
  Filling(const FillPlane& work, const Constants& constants)
      : work_(work),
        constants_(constants),
        floor_(V::all(work.ends.floor)),
        largest_(V::all(0.0f)) {}

  // Columns [i, i + V::kWidth) of the row that begins at `row`, with zeros past its end.
  PreparedLanes<typename V::Floats> lanes(int64_t row, int64_t i) {
    const int64_t at = row + i, left = work_.ends.count - at, of_row = work_.width - i;
    if (of_row <= 0) return {V::all(0.0f), V::all(0.0f), V::all(0.0f)};
    auto now = V::prepare(V::load(work_.ends.lower + at, left),
                          V::load(work_.ends.upper + at, left), floor_, constants_);
    largest_ = V::larger(now.largest, largest_);
    if (of_row < V::kWidth) {
      now.centre = V::first(now.centre, of_row);
      now.radius = V::first(now.radius, of_row);
    }
    return now;
  }

  float largest() const { return V::largest(largest_); }

 private:
  const FillPlane& work_;
  const Constants& constants_;
  typename V::Floats floor_, largest_;
};

// Columns by their remainder modulo 2.
template <typename V>
float fill_halves(const FillPlane& work, const Constants& constants) {
  Filling<V> filling(work, constants);
  float *centre = work.centre, *radius = work.radius;
  const int64_t even = work.even, odd = work.odd;
  for (int64_t row = 0; row < work.ends.count; row += work.width) {
    for (int64_t i = 0; i < work.width; i += 2 * V::kWidth) {
      const auto left = filling.lanes(row, i), right = filling.lanes(row, i + V::kWidth);
      V::store(centre + even + i / 2, V::even(left.centre, right.centre));
      V::store(radius + even + i / 2, V::even(left.radius, right.radius));
      V::store(centre + odd + i / 2, V::odd(left.centre, right.centre));
      V::store(radius + odd + i / 2, V::odd(left.radius, right.radius));
    }
    centre += work.row_size;
    radius += work.row_size;
  }
  return filling.largest();
}

template <typename V>
float fill_plane(const FillPlane& work, const Constants& constants) {
  if (work.odd != 0) return fill_halves<V>(work, constants);
  Filling<V> filling(work, constants);
  float *centre = work.centre, *radius = work.radius;
  for (int64_t row = 0; row < work.ends.count; row += work.width) {
    for (int64_t i = 0; i < work.width; i += V::kWidth) {
      const auto now = filling.lanes(row, i);
      V::store(centre + work.even + i, now.centre);
      V::store(radius + work.even + i, now.radius);
    }
    centre += work.row_size;
    radius += work.row_size;
  }
  return filling.largest();
}

template <typename V, int N>
struct LaneSums {
  typename V::Floats c[N], r[N];
};

// The ends of `count` sums, N places of an output row or of neighbouring rows. `lanes` of each
// register are pixels; `step` floats lie between the places.
template <typename V, int N>
inline void write_ends(const Plane& work, const Constants& constants, LaneSums<V, N>& sums,
                       const int64_t (&places)[N], int64_t lanes, typename V::Floats* largest) {
  const auto shift = V::all(work.shift), offset = V::all(work.offset);
  const int64_t pixels = work.out_height * work.out_width;
  for (int i = 0; i < N; ++i) {
    if (lanes < V::kWidth) {  // no others may count as infinite
      sums.c[i] = V::first(sums.c[i], lanes);
      sums.r[i] = V::first(sums.r[i], lanes);
    }
    const auto ends = V::finish(sums.c[i], sums.r[i], shift, offset, constants, largest);
    const int64_t left = pixels - places[i];
    V::store_end(work.out_lower + places[i], left, ends.lower, work.past_cache);
    V::store_end(work.out_upper + places[i], left, ends.upper, work.past_cache);
  }
}

// R output rows at once, kStep kernel rows apart: a register of the plane serves all that it
// belongs to, and those of W serve R times.
template <typename V, int kHeight, int kStep, int R>
void plane_rows(const Plane& work, const Constants& constants, int64_t row, int64_t column,
                int64_t lanes, typename V::Floats* largest) {
  using F = typename V::Floats;
  LaneSums<V, R> sums;
  for (int i = 0; i < R; ++i) sums.c[i] = sums.r[i] = V::all(0.0f);
  const int64_t from = row * work.row_step + column;
  for (int64_t x = 0; x < work.kernel_width; ++x) {
    const float *centre = work.centre + from + work.columns[x],
                *radius = work.radius + from + work.columns[x];
    F w[kHeight], size[kHeight];
#pragma GCC unroll 8
    for (int y = 0; y < kHeight; ++y) {
      w[y] = V::all(work.weight[y * work.kernel_width + x]);
      size[y] = V::size(w[y]);
    }
#pragma GCC unroll 16
    for (int line = 0; line < (R - 1) * kStep + kHeight; ++line) {
      const F c = V::load(centre + line * work.kernel_step);
      const F r = V::load(radius + line * work.kernel_step);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const int y = line - i * kStep;
        if (y < 0 || y >= kHeight) continue;
        sums.c[i] = V::multiply_add(w[y], c, sums.c[i]);
        sums.r[i] = V::multiply_add(size[y], r, sums.r[i]);
      }
    }
  }
  int64_t places[R];
  for (int i = 0; i < R; ++i) places[i] = (row + i) * work.out_width + column;
  write_ends<V, R>(work, constants, sums, places, lanes, largest);
}

// Any window: N registers of an output row.
template <typename V, int N>
void plane_columns(const Plane& work, const Constants& constants, int64_t row, int64_t first,
                   int64_t lanes, typename V::Floats* largest) {
  LaneSums<V, N> sums;
  int64_t columns[N], places[N];
  for (int i = 0; i < N; ++i) {
    const int64_t last = work.out_width > V::kWidth ? work.out_width - V::kWidth : 0;
    const int64_t column = (first + i) * V::kWidth;
    columns[i] = column < last ? column : last;
    places[i] = row * work.out_width + columns[i];
    sums.c[i] = sums.r[i] = V::all(0.0f);
  }
  for (int64_t x = 0; x < work.kernel_width; ++x) {
    for (int64_t y = 0; y < work.kernel_height; ++y) {
      const int64_t at = row * work.row_step + y * work.kernel_step + work.columns[x];
      const auto w = V::all(work.weight[y * work.kernel_width + x]), size = V::size(w);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        sums.c[i] = V::multiply_add(w, V::load(work.centre + at + columns[i]), sums.c[i]);
        sums.r[i] = V::multiply_add(size, V::load(work.radius + at + columns[i]), sums.r[i]);
      }
    }
  }
  write_ends<V, N>(work, constants, sums, places, lanes, largest);
}

template <typename V>
using PlaneBlock = void (*)(const Plane&, const Constants&, int64_t, int64_t, int64_t,
                            typename V::Floats*);

constexpr int kPlaneRows = 4;  // eight sums wait for none of the others

// The blocks of 1 to kPlaneRows rows of a window, or null.
template <typename V>
const PlaneBlock<V>* blocks_of_rows(const Plane& work) {
#define PYROBUST_PLANE_ROWS(height, step)                                       \
  {                                                                             \
    plane_rows<V, height, step, 1>, plane_rows<V, height, step, 2>,             \
        plane_rows<V, height, step, 3>, plane_rows<V, height, step, kPlaneRows> \
  }
  static constexpr PlaneBlock<V> kBlocks[3][2][kPlaneRows] = {
      {PYROBUST_PLANE_ROWS(3, 1), PYROBUST_PLANE_ROWS(3, 2)},
      {PYROBUST_PLANE_ROWS(5, 1), PYROBUST_PLANE_ROWS(5, 2)},
      {PYROBUST_PLANE_ROWS(7, 1), PYROBUST_PLANE_ROWS(7, 2)}};
#undef PYROBUST_PLANE_ROWS
  const int64_t height = work.kernel_height;
  const bool once = work.row_step == work.kernel_step;
  if (height != 3 && height != 5 && height != 7) return nullptr;
  if (!once && work.row_step != 2 * work.kernel_step) return nullptr;
  return kBlocks[(height - 3) / 2][once ? 0 : 1];
}

// Rows in blocks of nearly equal height, in ascending order.
template <typename V>
void plane_by_rows(const Plane& work, const Constants& constants, const PlaneBlock<V>* rows,
                   typename V::Floats* largest) {
  const int64_t lanes = work.out_width < V::kWidth ? work.out_width : V::kWidth;
  const int64_t last = work.out_width - lanes;
  const int64_t count = (work.out_height + kPlaneRows - 1) / kPlaneRows;
  for (int64_t t = 0, row = 0; t < count; ++t) {
    const int64_t next = work.out_height * (t + 1) / count;
    const PlaneBlock<V> block = rows[next - row - 1];
    for (int64_t column = 0; column < work.out_width; column += V::kWidth) {
      block(work, constants, row, column < last ? column : last, lanes, largest);
    }
    row = next;
  }
}

template <typename V>
bool plane_ends(const Plane& work, const Constants& constants) {
  typename V::Floats largest = V::all(0.0f);
  if (const PlaneBlock<V>* rows = blocks_of_rows<V>(work)) {
    plane_by_rows<V>(work, constants, rows, &largest);
    return V::all_finite(largest);
  }
  const int64_t lanes = work.out_width < V::kWidth ? work.out_width : V::kWidth;
  const int64_t count = (work.out_width + V::kWidth - 1) / V::kWidth;
  for (int64_t row = 0; row < work.out_height; ++row) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) plane_columns<V, 4>(work, constants, row, i, lanes, &largest);
    for (; i < count; ++i) plane_columns<V, 1>(work, constants, row, i, lanes, &largest);
  }
  return V::all_finite(largest);
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
