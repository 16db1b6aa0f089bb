// Sixteen lanes: the loops of avx2.cpp where the sums are. A column of a panel, eight centres and
// eight radii, is one register, so one FMA serves both products: W is loaded once and loses its
// sign in the upper half by a mask. The rest is avx2.cpp's. Round to nearest throughout: the bounds
// of interval.h cover it, at a widening far below one part in a hundred thousand.
#include <array>
#include <utility>

#include "interval/avx512_elements.h"
#include "interval/avx512_ends.h"
#include "interval/avx512_filters.h"
#include "interval/avx512_integers.h"
#include "interval/avx512_packed.h"
#include "interval/avx512_planes.h"
#include "interval/avx512_squares.h"
#include "interval/avx512_sums.h"
#include "interval/curve_loops.h"
#include "interval/few_inputs.h"
#include "interval/pair_loops.h"
#include "interval/radius_loops.h"
#include "interval/uniform_loops.h"

namespace pyrobust {
namespace interval {
namespace {

static_assert(kPanelWidth == 16, "a column fills a register");

// --- a few inputs: R rows of W against B inputs
// ----------------------------------------------------

template <int R, int B>
inline void dot_step(const Dots& work, const float* weight, int64_t k, __mmask16 mask,
                     __m512 (&c)[R][B], __m512 (&r)[R][B]) {
  __m512 x[B], y[B];
  for (int b = 0; b < B; ++b) {
    x[b] = _mm512_maskz_loadu_ps(mask, work.centre + b * work.terms + k);
    y[b] = _mm512_maskz_loadu_ps(mask, work.radius + b * work.terms + k);
  }
  for (int i = 0; i < R; ++i) {
    const __m512 w = _mm512_maskz_loadu_ps(mask, weight + i * work.terms + k);
    const __m512 size = magnitude(w);
    for (int b = 0; b < B; ++b) {
      c[i][b] = _mm512_fmadd_ps(w, x[b], c[i][b]);
      r[i][b] = _mm512_fmadd_ps(size, y[b], r[i][b]);
    }
  }
}

template <int R, int B>
void dot_rows(const Dots& work, int64_t n) {
  constexpr __mmask16 kAll = 0xffff;
  const float* weight = work.weight + n * work.terms;
  const int64_t whole = work.terms / 16 * 16;
  const auto tail = static_cast<__mmask16>((1u << (work.terms - whole)) - 1);
  __m512 total_c[R][B], total_r[R][B];
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) total_c[i][b] = total_r[i][b] = _mm512_setzero_ps();
  }
  for (int64_t begin = 0; begin < work.terms; begin += 16 * kRun) {
    const int64_t end = whole < begin + 16 * kRun ? whole : begin + 16 * kRun;
    __m512 c[R][B], r[R][B];
    for (int i = 0; i < R; ++i) {
      for (int b = 0; b < B; ++b) c[i][b] = r[i][b] = _mm512_setzero_ps();
    }
    for (int64_t k = begin; k < end; k += 16) dot_step<R, B>(work, weight, k, kAll, c, r);
    if (end == whole && end < work.terms && end < begin + 16 * kRun) {
      dot_step<R, B>(work, weight, end, tail, c, r);
    }
    for (int i = 0; i < R; ++i) {
      for (int b = 0; b < B; ++b) {
        total_c[i][b] = _mm512_add_ps(total_c[i][b], c[i][b]);
        total_r[i][b] = _mm512_add_ps(total_r[i][b], r[i][b]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) {
      work.centre_sums[b * work.sum_stride + n + i] = _mm512_reduce_add_ps(total_c[i][b]);
      work.radius_sums[b * work.sum_stride + n + i] = _mm512_reduce_add_ps(total_r[i][b]);
    }
  }
}

struct FewInputs {
  static constexpr int kRows[4] = {4, 4, 2, 2};

  template <int R, int B>
  static void rows(const Dots& work, int64_t n) {
    dot_rows<R, B>(work, n);
  }
};

// --- panels: R rows of W against P panels of eight inputs
// --------------------------------------------

// 24 accumulators, four columns, W and the mask: 30 of the 32 registers. Twelve rows and two
// columns would be as many, but more loads, and rows of W that are 4096 bytes apart share a set of
// the first cache, whose ways are eight on Zen 4: 84 GF/s where six rows take 111 of 118.
constexpr int kTileRows = 6;

// `kRadii`: the upper half of a panel holds radii, which meet |W|.
template <bool kRadii, int R, int P>
void add_chunk(const Tiles& work, int64_t first, int64_t n, int64_t begin, int64_t end) {
  const __m512i mask = _mm512_inserti64x4(_mm512_set1_epi32(-1), _mm256_set1_epi32(0x7fffffff), 1);
  const float* weight = work.weight + n * work.weight_stride;
  const float* panel = work.panel + first * work.panel_stride;
  __m512 chunk[R][P];
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) chunk[i][p] = _mm512_setzero_ps();
  }
  for (int64_t from = begin; from < end; from += kRun) {
    const int64_t to = end < from + kRun ? end : from + kRun;
    __m512 sum[R][P];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[i][p] = _mm512_setzero_ps();
    }
    for (int64_t k = from; k < to; ++k) {
      __m512 x[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        x[p] = _mm512_loadu_ps(panel + p * work.panel_stride + k * kPanelWidth);
      }
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const __m512 w = _mm512_set1_ps(weight[i * work.weight_stride + k]);
        const __m512 both =
            kRadii ? _mm512_castsi512_ps(_mm512_and_si512(mask, _mm512_castps_si512(w))) : w;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[i][p] = _mm512_fmadd_ps(both, x[p], sum[i][p]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) chunk[i][p] = _mm512_add_ps(chunk[i][p], sum[i][p]);
    }
  }
  const bool fresh = begin == 0 && !work.add;
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      float* at = work.sums + (first + p) * work.sum_stride + (n + i) * kPanelWidth;
      const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
      _mm512_storeu_ps(at, _mm512_add_ps(before, chunk[i][p]));
    }
  }
}

using AddChunk = void (*)(const Tiles&, int64_t, int64_t, int64_t, int64_t);

template <bool kRadii, int P, int... R>
constexpr std::array<AddChunk, sizeof...(R)> chunks_by_rows(std::integer_sequence<int, R...>) {
  return {add_chunk<kRadii, R + 1, P>...};
}

// Asks for the lines of `next` from row n on, those of a part of the lanes in each of the chunks of
// [0, terms). Another processor that read them holds them: to wait for it when ends are stored
// takes a tenth of a layer.
inline void fetch_ends(const NextEnds& next, int64_t n, int64_t chunk, int64_t terms) {
  const int64_t chunks = (terms + kChunk - 1) / kChunk;
  for (int64_t lane = chunk; next.lower != nullptr && lane < next.lanes; lane += chunks) {
    _mm_prefetch(next.lower + lane * next.lane_stride + n, _MM_HINT_ET0);
    _mm_prefetch(next.upper + lane * next.lane_stride + n, _MM_HINT_ET0);
  }
}

// Tiles of nearly equal height: a last one of four rows would wait for its own sums.
template <bool kRadii, int P>
void chunk_of_rows(const Tiles& work, int64_t first, int64_t begin, int64_t end) {
  static constexpr auto kChunks =
      chunks_by_rows<kRadii, P>(std::make_integer_sequence<int, kTileRows>());
  const int64_t count = (work.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0, n = 0; t < count; ++t) {
    const int64_t next = work.rows * (t + 1) / count;
    if (first == 0) fetch_ends(work.next, n, begin / kChunk, work.terms);
    kChunks[static_cast<size_t>(next - n - 1)](work, first, n, begin, end);
    n = next;
  }
}

template <bool kRadii>
void tiles(const Tiles& work) {
  for (int64_t begin = 0; begin < work.terms; begin += kChunk) {
    const int64_t end = work.terms - begin < kChunk ? work.terms : begin + kChunk;
    int64_t p = 0;
    for (; p + 4 <= work.panels; p += 4) chunk_of_rows<kRadii, 4>(work, p, begin, end);
    if (work.panels - p == 3) chunk_of_rows<kRadii, 3>(work, p, begin, end);
    if (work.panels - p == 2) chunk_of_rows<kRadii, 2>(work, p, begin, end);
    if (work.panels - p == 1) chunk_of_rows<kRadii, 1>(work, p, begin, end);
  }
  if (work.terms > 0 || work.add) return;
  for (int64_t p = 0; p < work.panels; ++p) {
    for (int64_t i = 0; i < work.rows * kPanelWidth; ++i) work.sums[p * work.sum_stride + i] = 0.0f;
  }
}

struct SixteenFloats {
  using Vector = __m512;
  static constexpr int64_t kWidth = 16;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* from, int64_t count) { return load_lanes(from, count); }
  static __m512 add_size(__m512 x, __m512 sum) { return _mm512_add_ps(sum, magnitude(x)); }
  static __m512 add_square(__m512 x, __m512 sum) { return _mm512_fmadd_ps(x, x, sum); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static float sum(__m512 x) { return _mm512_reduce_add_ps(x); }
};

// --- a convolution's pixels: R rows of W against P groups of sixteen
// ---------------------------------

// 24 accumulators, four inputs, W, |W| and the mask: 31 registers.
constexpr int kDirectRows = 6;

inline void add_to(float* sums, bool fresh, __m512 value) {
  const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums);
  _mm512_storeu_ps(sums, _mm512_add_ps(before, value));
}

template <int R, int P>
void direct_chunk(const Direct& work, int64_t n, int64_t begin, int64_t end) {
  const float* weight = work.weight + n * work.terms;
  PixelSums<R, P> total;
  total.clear();
  for (int64_t from = begin; from < end; from += kRun) {
    const int64_t to = end < from + kRun ? end : from + kRun;
    PixelSums<R, P> sums;
    sums.clear();
    for (int64_t k = from; k < to; ++k) {
      __m512 x[P], y[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        x[p] = _mm512_loadu_ps(work.centre + work.bases[p] + work.places[k]);
        y[p] = _mm512_loadu_ps(work.radius + work.bases[p] + work.places[k]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const __m512 w = _mm512_set1_ps(weight[i * work.terms + k]);
        const __m512 size = magnitude(w);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          sums.c[i][p] = _mm512_fmadd_ps(w, x[p], sums.c[i][p]);
          sums.r[i][p] = _mm512_fmadd_ps(size, y[p], sums.r[i][p]);
        }
      }
    }
    total.add(sums);
  }
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      float* left = work.sums + 2 * p * work.sum_stride + (n + i) * kPanelWidth;
      const __m512 c = total.c[i][p], r = total.r[i][p];
      add_to(left, begin == 0, _mm512_shuffle_f32x4(c, r, 0x44));
      add_to(left + work.sum_stride, begin == 0, _mm512_shuffle_f32x4(c, r, 0xee));
    }
  }
}

using DirectChunk = void (*)(const Direct&, int64_t, int64_t, int64_t);

template <int P, int... R>
constexpr std::array<DirectChunk, sizeof...(R)> direct_by_rows(std::integer_sequence<int, R...>) {
  return {direct_chunk<R + 1, P>...};
}

template <int P>
void direct_groups(const Direct& work) {
  static constexpr auto kChunks = direct_by_rows<P>(std::make_integer_sequence<int, kDirectRows>());
  const int64_t count = (work.rows + kDirectRows - 1) / kDirectRows;
  for (int64_t begin = 0; begin < work.terms; begin += kChunk) {
    const int64_t end = work.terms - begin < kChunk ? work.terms : begin + kChunk;
    for (int64_t t = 0, n = 0; t < count; ++t) {
      const int64_t next = work.rows * (t + 1) / count;
      kChunks[static_cast<size_t>(next - n - 1)](work, n, begin, end);
      n = next;
    }
  }
}

void direct(const Direct& work) {
  if (work.groups == 2) {
    direct_groups<2>(work);
  } else {
    direct_groups<1>(work);
  }
}

constexpr IntervalKernels kKernels = {
    prepare,
    nullptr,
    pack_patches,
    spread_by_registers,
    dots<FewInputs>,
    tiles<true>,
    nullptr,
    finish_pixels,
    kRegisterLoops,
    kCurveLoops,
    kPairLoops,
    {widen_panel<0>, widen_row<16, 0>, count_nonzero},
    uniform_loops<SixteenFloats, 0>(tiles<false>),
    &kIntegers,
    direct,
    fill_sixteen,
    plane_of_sixteen,
    fused_columns,
    fused_order,
    fused_dots,
    {filter_tiles,
     filter_weights,
     filter_product,
     filter_ends,
     {count_nonzero_pixels, square_tiles, square_weights, square_ends}},
};

}  // namespace

const IntervalKernels* avx512_kernels() { return &kKernels; }

}  // namespace interval
}  // namespace pyrobust
