// Differs from avx512_bf16.cpp in the product of radii, which tiles make, sixteen rows of W and
// sixteen inputs an instruction (amx_radii.h); centres stay with the FMAs of AVX-512
// (amx_centres.h). With PYROBUST_EMULATED_TILES the same code runs without AMX, for tests.
#include "interval/amx_centres.h"
#include "interval/amx_filters.h"
#include "interval/amx_radii.h"
#include "interval/avx512_gather.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

static_assert(kCoarseBlock % kCoarseRows == 0 && kCoarseBlock % kCentreRows == 0,
              "a block is whole tiles, and parts of equal height");

// --- panels
// --------------------------------------------------------------------------------------

// Panels side by side, a chunk at a time: centres (terms, 16 P), then pairs of radii (pairs, 16 P);
// zero from the last term to the end of its tile.
template <int P>
struct Chunk {
  static constexpr int64_t kWidth = 16 * P;

  float* centre;
  uint32_t* radii;
  int64_t count;

  // Terms from `begin` on, of `terms`.
  Chunk(float* gathered, int64_t begin, int64_t terms)
      : centre(gathered + begin / 2 * 3 * kWidth),
        count(terms - begin < kChunk ? terms - begin : kChunk) {
    radii = reinterpret_cast<uint32_t*>(centre + 2 * pairs() * kWidth);
  }

  int64_t pairs() const { return coarse_pairs(pairs_of(count)); }
};

template <int P>
struct Gathered {
  static constexpr int64_t kGroups = P, kWidth = Chunk<P>::kWidth;

  float* to;
  int64_t terms, pairs;

  Gathered(float* to, int64_t terms) : to(to), terms(terms), pairs(coarse_pairs(pairs_of(terms))) {}

  void put(int64_t q, int64_t p, const TermPair& values) const {
    const Chunk<P> chunk(to, 2 * q / kChunk * kChunk, terms);
    const int64_t own = q % (kChunk / 2);
    _mm512_storeu_ps(chunk.centre + 2 * own * kWidth + p * 16, values.first);
    _mm512_storeu_ps(chunk.centre + (2 * own + 1) * kWidth + p * 16, values.second);
    _mm512_storeu_si512(chunk.radii + own * kWidth + p * 16, values.radii);
  }
};

template <int P>
void chunk_of_panels(const CoarseTiles& work, int64_t begin) {
  static constexpr int64_t kOrigin = 0;
  const Tiles& tiles = work.tiles;
  const Chunk<P> chunk(work.gathered, begin, tiles.terms);
  for (int64_t n = 0; n < tiles.rows; n += kCoarseBlock) {
    const int64_t rows = tiles.rows - n < kCoarseBlock ? tiles.rows - n : kCoarseBlock;
    sum_radii({work.sizes + n * work.size_stride + begin / 2,
               work.size_stride,
               {chunk.radii, chunk.radii + 16},
               P,
               chunk.kWidth,
               &kOrigin,
               1,
               chunk.pairs(),
               rows,
               work.scratch,
               32},
              work.factors.from(n, begin / kRun));
    const auto part = [&](int64_t i) {
      const float* weight = tiles.weight + (n + i) * tiles.weight_stride + begin;
      return std::pair(
          GatheredColumns{chunk.centre, chunk.kWidth, weight},
          CentreSums{tiles.weight_stride, work.scratch + i * 32, tiles.sums + (n + i) * kPanelWidth,
                     tiles.sum_stride, tiles.panels, begin == 0 && !tiles.add});
    };
    add_all_centres<P, GatheredColumns>(rows, 0, chunk.count, part);
  }
}

void coarse_tiles(const CoarseTiles& work) {
  configure_tiles();
  for (int64_t begin = 0; begin < work.tiles.terms; begin += kChunk) {
    if (work.tiles.panels > 2) {
      chunk_of_panels<2>(work, begin);
    } else {
      chunk_of_panels<1>(work, begin);
    }
  }
  tile::release();
}

// --- a convolution's pixels
// -----------------------------------------------------------------------

// Words of a row by place of the window, then by pair of channels, of which tiles take sixteen.
void round_channels(const RoundChannels& work) {
  const int64_t pairs = work.terms / work.taps / 2, stride = coarse_pairs(pairs);
  for (int64_t n = 0; n < work.rows; ++n) {
    const float* row = work.weight + n * work.terms;
    uint32_t* sizes = work.sizes + n * work.size_stride;
    for (int64_t q = 0; q < pairs; ++q, row += 2 * work.taps) {
      for (int64_t t = 0; t < work.taps; t += 16) {
        const int64_t rest = work.taps - t;
        const auto mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
        const __m512i words = pair_up(size_up(_mm512_maskz_loadu_epi32(mask, row + t)),
                                      size_up(_mm512_maskz_loadu_epi32(mask, row + work.taps + t)));
        alignas(64) uint32_t some[16];
        _mm512_store_si512(some, words);
        for (int64_t i = 0; i < 16 && i < rest; ++i) sizes[(t + i) * stride + q] = some[i];
      }
    }
  }
}

template <int P>
void direct_groups(const CoarseDirect& work) {
  const Direct& direct = work.direct;
  const int64_t pairs = coarse_pairs(direct.terms / work.taps / 2);
  for (int64_t n = 0; n < direct.rows; n += kCoarseBlock) {
    const int64_t rows = direct.rows - n < kCoarseBlock ? direct.rows - n : kCoarseBlock;
    sum_radii({work.sizes + n * work.size_stride,
               work.size_stride,
               {work.radii + work.radius_bases[0], work.radii + work.radius_bases[1]},
               P,
               work.plane,
               work.radius_places,
               work.taps,
               pairs,
               rows,
               work.scratch,
               32});
    for (int64_t begin = 0; begin < direct.terms; begin += kChunk) {
      const int64_t end = direct.terms - begin < kChunk ? direct.terms : begin + kChunk;
      const auto part = [&](int64_t i) {
        return std::pair(
            ImageColumns{work, direct.weight + (n + i) * direct.terms},
            CentreSums{direct.terms, begin == 0 ? work.scratch + i * 32 : nullptr,
                       direct.sums + (n + i) * kPanelWidth, direct.sum_stride, 2 * P, begin == 0});
      };
      add_all_centres<P, ImageColumns>(rows, begin, end, part);
    }
  }
}

void coarse_direct(const CoarseDirect& work) {
  configure_tiles();
  if (work.direct.groups == 2) {
    direct_groups<2>(work);
  } else {
    direct_groups<1>(work);
  }
  tile::release();
}

constexpr IntervalKernels coarse_kernels() {
  IntervalKernels out;
  out.round_sizes = round_sizes;
  out.gather_panels = gather_panels<Gathered>;
  out.coarse_tiles = coarse_tiles;
  out.round_channels = round_channels;
  out.pair_channels = pair_channels;
  out.coarse_direct = coarse_direct;
  out.coarse_channels = 16;  // a tile of fewer would be mostly zeros
  out.tiled_filter = {filter_radii, filter_radius_product};
  return out;
}

constexpr IntervalKernels kKernels = coarse_kernels();

}  // namespace

const IntervalKernels* amx_kernels() { return &kKernels; }

}  // namespace interval
}  // namespace pyrobust
