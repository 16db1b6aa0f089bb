// Included by amx.cpp alone: the centres' product in float32, and the sums of centres and radii in
// the order of panels. Its runs and chunks are those of avx512_bf16.cpp; without radii twelve rows
// of W meet two groups of inputs.
#pragma once

#include <array>
#include <utility>

#include "interval/avx512_pairs.h"

namespace pyrobust {
namespace interval {
namespace {

// 24 accumulators and two columns; W comes from memory.
constexpr int kCentreRows = 12;

// Terms of panels copied side by side: every term has `width` inputs.
struct GatheredColumns {
  const float* centre;
  int64_t width;
  const float* weight;  // at the first row and term

  const float* inputs(int64_t k, int p) const { return centre + k * width + p * 16; }
  const float* weights(int64_t k) const { return weight + k; }
};

// Terms of an image, two neighbouring channels in turns.
struct ImageColumns {
  const CoarseDirect& work;
  const float* weight;  // of the first row

  const float* inputs(int64_t k, int p) const {
    const Direct& direct = work.direct;
    return direct.centre + direct.bases[p] + direct.places[k / 2] + k % 2 * work.plane;
  }
  const float* weights(int64_t k) const { return weight + work.weights[k / 2] + k % 2 * work.taps; }
};

// Where the sums of R rows and P groups go; the last panel may be absent.
struct CentreSums {
  int64_t weight_stride;
  const float* radii;  // (rows, 32) sums, or null for zeros
  float* sums;
  int64_t sum_stride;
  int64_t panels;
  bool fresh;
};

template <int R, int P>
struct Accumulators {
  __m512 of[R][P];

  void clear() {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) of[i][p] = _mm512_setzero_ps();
    }
  }
};

// Terms [begin, end), at most a chunk.
template <int R, int P, typename Columns>
void add_centres(const Columns& columns, const CentreSums& to, int64_t begin, int64_t end) {
  Accumulators<R, P> chunk;
  chunk.clear();
  for (int64_t from = begin; from < end; from += kRun) {
    const int64_t last = end < from + kRun ? end : from + kRun;
    Accumulators<R, P> run;
    run.clear();
    for (int64_t k = from; k < last; ++k) {
      const float* weight = columns.weights(k);
      __m512 x[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) x[p] = _mm512_loadu_ps(columns.inputs(k, p));
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        const __m512 w = _mm512_set1_ps(weight[i * to.weight_stride]);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) run.of[i][p] = _mm512_fmadd_ps(w, x[p], run.of[i][p]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) chunk.of[i][p] = _mm512_add_ps(chunk.of[i][p], run.of[i][p]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      const __m512 radii =
          to.radii != nullptr ? _mm512_loadu_ps(to.radii + i * 32 + p * 16) : _mm512_setzero_ps();
      float* left = to.sums + 2 * p * to.sum_stride + i * kPanelWidth;
      float* right = 2 * p + 1 < to.panels ? left + to.sum_stride : nullptr;
      add_to_panels(left, right, to.fresh, chunk.of[i][p], radii);
    }
  }
}

template <typename Columns>
using AddCentres = void (*)(const Columns&, const CentreSums&, int64_t, int64_t);

template <int P, typename Columns, int... R>
constexpr std::array<AddCentres<Columns>, sizeof...(R)> centres_by_rows(
    std::integer_sequence<int, R...>) {
  return {add_centres<R + 1, P, Columns>...};
}

// `rows` rows in parts of nearly equal height, whose columns and sums `part(first)` gives.
template <int P, typename Columns, typename Part>
void add_all_centres(int64_t rows, int64_t begin, int64_t end, const Part& part) {
  static constexpr auto kHeights =
      centres_by_rows<P, Columns>(std::make_integer_sequence<int, kCentreRows>());
  const int64_t count = (rows + kCentreRows - 1) / kCentreRows;
  for (int64_t t = 0, n = 0; t < count; ++t) {
    const int64_t next = rows * (t + 1) / count;
    const std::pair<Columns, CentreSums> own = part(n);
    kHeights[static_cast<size_t>(next - n - 1)](own.first, own.second, begin, end);
    n = next;
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
