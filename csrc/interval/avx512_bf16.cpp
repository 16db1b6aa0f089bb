// Products of radii in bfloat16, two terms an instruction: the panel kernel of avx512.cpp, with
// sixteen inputs a register. Centres stay in float32. See "Coarse radii" in interval.h.
#include <array>
#include <utility>

#include "interval/avx512_gather.h"
#include "interval/avx512_sums.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

// For every pair of terms, P groups of: 16 centres of the first, 16 of the second, 16 pairs of
// radii.
constexpr int64_t kGroup = 48;

// 24 accumulators; W of one term and one column at a time fill the rest.
constexpr int kTileRows = 6;

template <int P>
struct Gathered {
  static constexpr int64_t kGroups = P;

  float* to;
  int64_t pairs;

  Gathered(float* to, int64_t terms) : to(to), pairs(pairs_of(terms)) {}

  void put(int64_t q, int64_t p, const TermPair& terms) const {
    float* at = to + (q * P + p) * kGroup;
    _mm512_storeu_ps(at, terms.first);
    _mm512_storeu_ps(at + 16, terms.second);
    _mm512_storeu_si512(at + 32, terms.radii);
  }
};

template <int R, int P>
inline void add_centres(const float* weight, int64_t stride, const float* column,
                        PixelSums<R, P>& sums) {
  __m512 x[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) x[p] = _mm512_loadu_ps(column + p * kGroup);
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    const __m512 w = _mm512_set1_ps(weight[i * stride]);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) sums.c[i][p] = _mm512_fmadd_ps(w, x[p], sums.c[i][p]);
  }
}

template <int R, int P>
inline void add_radii(const uint32_t* sizes, int64_t stride, const float* column,
                      PixelSums<R, P>& sums) {
  __m512bh y[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    y[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(column + p * kGroup + 32));
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    const auto w =
        reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(sizes[i * stride])));
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) sums.r[i][p] = _mm512_dpbf16_ps(sums.r[i][p], w, y[p]);
  }
}

// A chunk of `count` terms; W and |W| start at row n and at its first term.
struct Chunk {
  const Tiles& work;
  const float* gathered;
  const float* weight;
  const uint32_t* sizes;
  int64_t size_stride;
  RunFactors factors;
  int64_t count;
  bool fresh;
};

template <int R, int P>
void add_chunk(const Chunk& chunk, int64_t n) {
  const int64_t stride = chunk.work.weight_stride;
  PixelSums<R, P> total;
  total.clear();
  for (int64_t from = 0; from < chunk.count; from += kRun) {
    const int64_t to = chunk.count < from + kRun ? chunk.count : from + kRun;
    PixelSums<R, P> sums;
    sums.clear();
    for (int64_t k = from; k < to; k += 2) {
      const float* column = chunk.gathered + k / 2 * P * kGroup;
      add_centres<R, P>(chunk.weight + k, stride, column, sums);
      if (k + 1 < to) add_centres<R, P>(chunk.weight + k + 1, stride, column + 16, sums);
      add_radii<R, P>(chunk.sizes + k / 2, chunk.size_stride, column, sums);
    }
    if (chunk.factors.values == nullptr) {
      total.add(sums);
    } else {
      total.add(sums, chunk.factors.values + from / kRun, chunk.factors.stride);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      const int64_t panel = 2 * p;
      float* left = chunk.work.sums + panel * chunk.work.sum_stride + (n + i) * kPanelWidth;
      float* right = panel + 1 < chunk.work.panels ? left + chunk.work.sum_stride : nullptr;
      add_to_panels(left, right, chunk.fresh, total.c[i][p], total.r[i][p]);
    }
  }
}

using AddChunk = void (*)(const Chunk&, int64_t);

template <int P, int... R>
constexpr std::array<AddChunk, sizeof...(R)> chunks_by_rows(std::integer_sequence<int, R...>) {
  return {add_chunk<R + 1, P>...};
}

// P groups of two panels, terms [begin, begin + count).
template <int P>
void chunk_of_panels(const CoarseTiles& work, int64_t begin, int64_t count) {
  static constexpr auto kChunks = chunks_by_rows<P>(std::make_integer_sequence<int, kTileRows>());
  const Tiles& tiles = work.tiles;
  const int64_t heights = (tiles.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0, n = 0; t < heights; ++t) {
    const int64_t next = tiles.rows * (t + 1) / heights;
    kChunks[static_cast<size_t>(next - n - 1)](
        {tiles, work.gathered + begin / 2 * P * kGroup,
         tiles.weight + n * tiles.weight_stride + begin,
         work.sizes + n * work.size_stride + begin / 2, work.size_stride,
         work.factors.from(n, begin / kRun), count, begin == 0 && !tiles.add},
        n);
    n = next;
  }
}

void coarse_tiles(const CoarseTiles& work) {
  const Tiles& tiles = work.tiles;
  for (int64_t begin = 0; begin < tiles.terms; begin += kChunk) {
    const int64_t count = tiles.terms - begin < kChunk ? tiles.terms - begin : kChunk;
    if (tiles.panels > 2) {
      chunk_of_panels<2>(work, begin, count);
    } else {
      chunk_of_panels<1>(work, begin, count);
    }
  }
}

// --- a convolution's pixels: centres read from the image, radii from planes of paired channels
// --------------------------------------------------------------------------------------------------

void round_channels(const RoundChannels& work) {
  for (int64_t n = 0; n < work.rows; ++n) {
    const float* row = work.weight + n * work.terms;
    uint32_t* sizes = work.sizes + n * work.size_stride;
    for (int64_t k = 0; k < work.terms; k += 2 * work.taps, sizes += work.taps) {
      for (int64_t t = 0; t < work.taps; t += 16) {
        const int64_t rest = work.taps - t;
        const auto mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
        const __m512i a = _mm512_maskz_loadu_epi32(mask, row + k + t);
        const __m512i b = _mm512_maskz_loadu_epi32(mask, row + k + work.taps + t);
        _mm512_mask_storeu_epi32(sizes + t, mask, pair_up(size_up(a), size_up(b)));
      }
    }
  }
}

template <int R, int P>
inline void add_pair(const CoarseDirect& work, const float* weight, const uint32_t* sizes,
                     int64_t q, PixelSums<R, P>& sums) {
  const Direct& direct = work.direct;
  const float *from = direct.centre + direct.places[q], *w = weight + work.weights[q];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, from += work.plane, w += work.taps) {
    __m512 x[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) x[p] = _mm512_loadu_ps(from + direct.bases[p]);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m512 one = _mm512_set1_ps(w[i * direct.terms]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sums.c[i][p] = _mm512_fmadd_ps(one, x[p], sums.c[i][p]);
    }
  }
  const uint32_t* radii = work.radii + work.radius_places[q];
  __m512bh y[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    y[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(radii + work.radius_bases[p]));
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    const auto one = reinterpret_cast<__m512bh>(
        _mm512_set1_epi32(static_cast<int>(sizes[i * work.size_stride + q])));
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) sums.r[i][p] = _mm512_dpbf16_ps(sums.r[i][p], one, y[p]);
  }
}

// Pairs [begin, end) of rows [n, n + R).
template <int R, int P>
void direct_chunk(const CoarseDirect& work, int64_t n, int64_t begin, int64_t end) {
  const Direct& direct = work.direct;
  const float* weight = direct.weight + n * direct.terms;
  const uint32_t* sizes = work.sizes + n * work.size_stride;
  PixelSums<R, P> total;
  total.clear();
  for (int64_t from = begin; from < end; from += kRun / 2) {
    const int64_t to = end < from + kRun / 2 ? end : from + kRun / 2;
    PixelSums<R, P> sums;
    sums.clear();
    for (int64_t q = from; q < to; ++q) add_pair<R, P>(work, weight, sizes, q, sums);
    total.add(sums);
  }
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      float* left = direct.sums + 2 * p * direct.sum_stride + (n + i) * kPanelWidth;
      add_to_panels(left, left + direct.sum_stride, begin == 0, total.c[i][p], total.r[i][p]);
    }
  }
}

using DirectChunk = void (*)(const CoarseDirect&, int64_t, int64_t, int64_t);

template <int P, int... R>
constexpr std::array<DirectChunk, sizeof...(R)> direct_by_rows(std::integer_sequence<int, R...>) {
  return {direct_chunk<R + 1, P>...};
}

template <int P>
void direct_groups(const CoarseDirect& work) {
  static constexpr auto kChunks = direct_by_rows<P>(std::make_integer_sequence<int, kTileRows>());
  const int64_t rows = work.direct.rows, count = (rows + kTileRows - 1) / kTileRows;
  const int64_t pairs = work.direct.terms / 2;
  for (int64_t begin = 0; begin < pairs; begin += kChunk / 2) {
    const int64_t end = pairs - begin < kChunk / 2 ? pairs : begin + kChunk / 2;
    for (int64_t t = 0, n = 0; t < count; ++t) {
      const int64_t next = rows * (t + 1) / count;
      kChunks[static_cast<size_t>(next - n - 1)](work, n, begin, end);
      n = next;
    }
  }
}

void coarse_direct(const CoarseDirect& work) {
  if (work.direct.groups == 2) {
    direct_groups<2>(work);
  } else {
    direct_groups<1>(work);
  }
}

// Products of bfloat16 and nothing else.
constexpr IntervalKernels coarse_kernels() {
  IntervalKernels out;
  out.round_sizes = round_sizes;
  out.gather_panels = gather_panels<Gathered>;
  out.coarse_tiles = coarse_tiles;
  out.round_channels = round_channels;
  out.pair_channels = pair_channels;
  out.coarse_direct = coarse_direct;
  return out;
}

constexpr IntervalKernels kKernels = coarse_kernels();

}  // namespace

const IntervalKernels* avx512_bf16_kernels() { return &kKernels; }

}  // namespace interval
}  // namespace pyrobust
