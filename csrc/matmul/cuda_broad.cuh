// The fused product of 65 and more rows of x with a packed weight on the tensor cores of
// warpgroups (compute capability 9.0). A tile is four strips of W times 128 rows of x: every weight
// is decoded once for 128 rows, scaled and rounded to the type of x, as decoding all of W would
// round it, and is the operand that lies in registers. x comes through a ring of stages of 64
// columns that both warpgroups share.
//
// A warpgroup has two strips: each has two warps, which decode two of its four tiles of 16 rows.
// Products of a step are under way while the next is decoded.
#pragma once

#include "matmul/cuda_two_tiles.cuh"
#include "matmul/cuda_warpgroup_results.cuh"

namespace pyrobust::matmul::gpu {

// Sizes of an instance; what Results wants of it is as in Shape.
template <Format kFormat>
struct BroadShape {
  static constexpr int kBits = stored_bits(kFormat);
  static constexpr int kSums = 1, kStrips = kBroadStrips, kTiles = 2, kEights = kBroadRows / 8;
  static constexpr int kTeams = 1, kTeam = kStrips * 2 * kLanes, kThreads = kTeam;
  static constexpr int kStripCodes = static_cast<int>(block_words(kFormat)) * 4;
  static constexpr int kStripScales = kStrip * 4;
  static constexpr int kCodesAt = kBroadRows * 128;
  static constexpr int kScalesAt = kCodesAt + kStrips * kStripCodes;
  static constexpr int kZerosAt = kScalesAt + kStrips * kStripScales;
  static constexpr int kStageBytes = (kZerosAt + kStrips * kStrip + 1023) / 1024 * 1024;
  static constexpr int kRoom = 226 * 1024 / kStageBytes;
  static constexpr int kStages = kRoom < 8 ? kRoom : 8;
  static_assert(kStages >= 4, "one under way, one multiplied, one still read");
  static constexpr int kTicketAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTicketAt + 16;

  static constexpr int kVectors = kTiles * kEights;
  static constexpr int kRunBytes = kVectors * kTeam * 16;
  static constexpr int kPatchAt = kRunBytes;
};

template <Format kFormat, class Act, int kLate = 0>
struct Broad {
  using S = BroadShape<kFormat>;
  using R = WarpgroupResults<kFormat, Act, S>;
  using Sums = typename R::Sums;
  using Pair = TwoTiles<kFormat, Act>;

  // What this thread copies into the next stage.
  struct Loader {
    const uint16_t* x;
    const uint32_t* codes;
    int64_t scale;
    int column;        // of x, of this thread's chunk
    int64_t row_step;  // halves between this thread's rows of x
    int left;          // stages
    int within, span;  // blocks: within the group, of a group
    int rows;          // of x from this thread's first on
    bool idle;         // the strip lies past the end of W

    __device__ __forceinline__ void begin(const LinearArguments& p, const WarpPlace& at, int tile,
                                          int first, int last) {
      const int thread = static_cast<int>(threadIdx.x), chunk = thread % 8;
      const int row = at.half * kBroadRows + thread / 8;
      const int strip = tile * S::kStrips + at.strip;
      idle = strip >= static_cast<int>(p.strips);
      span = p.group_span;
      left = last - first;
      column = first * kBlock + chunk * 8;
      rows = static_cast<int>(p.count) - row;
      row_step = 32 * p.cols;
      x = static_cast<const uint16_t*>(p.x) + int64_t{row} * p.cols + column;
      const int group = first / span;
      within = first - group * span;
      codes = p.codes + (int64_t{strip} * p.schedule.blocks + first) * block_words(kFormat) +
              thread % 64 * 4;
      scale = (int64_t{strip} * p.groups + group) * kStrip;
    }

    __device__ __forceinline__ void advance() {
      --left;
      column += kBlock;
      x += kBlock;
      codes += block_words(kFormat);
      const bool ends = ++within == span;
      within = ends ? 0 : within;
      scale += ends ? kStrip : 0;
    }

    // The two warps of a strip share it.
    __device__ __forceinline__ void load_weights(const LinearArguments& p, const WarpPlace& at,
                                                 uint8_t* stage) const {
      const int thread = static_cast<int>(threadIdx.x) % 64;
      const bool valid = !idle & (left > 0);
      uint8_t* to = stage + S::kCodesAt + at.strip * S::kStripCodes + thread * 16;
#pragma unroll
      for (int i = 0; i < (S::kBits + 1) / 2; ++i) {
        const bool wanted = 2 * i + 1 < S::kBits || thread < kLanes;
        cuda::copy16_async_if(wanted, to + i * 1024, codes + i * 256, valid);
      }
      // 16 vectors of scales, as many as float32 ones have, and four of zeros.
      const int shift = p.scale_type == FloatType::kFloat32 ? 2 : 1;  // log2 of a scale's bytes
      const bool is_scale = thread < 16;
      const auto* from = static_cast<const uint8_t*>(is_scale ? p.scale : p.zero);
      const int64_t first = is_scale ? scale << shift : scale;
      const int vector = is_scale ? thread : thread - 16;
      const bool has = valid & (is_scale ? thread < 4 << shift : p.zero != nullptr);
      uint8_t* at_scale = stage + S::kScalesAt + at.strip * S::kStripScales;
      uint8_t* at_zero = stage + S::kZerosAt + at.strip * kStrip;
      cuda::copy16_async_if(thread < 20, (is_scale ? at_scale : at_zero) + vector * 16,
                            has ? from + first + vector * 16 : static_cast<const uint8_t*>(p.scale),
                            has);
    }

    __device__ __forceinline__ void load_activations(const LinearArguments& p,
                                                     uint8_t* stage) const {
      const int thread = static_cast<int>(threadIdx.x);
      uint8_t* to = stage + activation_offset(thread / 8, thread % 8);
      const bool exists = (left > 0) & (column < static_cast<int>(p.cols));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = exists & (32 * i < rows);
        // Without the choice ptxas 13.0 waits for every single product.
        const void* from = valid ? x + i * row_step : p.x;
        cuda::copy16_async_or_zero(to + i * 4 * kEightBytes, from, valid);
      }
    }
  };

  // A scale twice in a word, and in bfloat16 what is missing of it.
  struct Scale {
    uint32_t value, rest;
  };

  PYROBUST_DEVICE uint32_t scaled_pair(uint32_t pair, const Scale& scale) {
    if (Act::kType == FloatType::kFloat16) return cuda::mul_f16x2(pair, scale.value);
    return cuda::fma_bf16x2(pair, scale.value, cuda::fma_bf16x2(pair, scale.rest, 0u));
  }

  PYROBUST_DEVICE void decode(const typename Pair::Words& words, const WarpPlace& at,
                              const typename Pair::Offsets& offset, const Scale (&scale)[4],
                              typename Pair::Fragments& a) {
    Pair::decode(words, at.tile, offset, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& pair = a[i / 4][i % 4];
      pair = scaled_pair(pair, scale[i / 4 * 2 + i % 2]);
    }
  }

  // The scales of the warp's four rows.
  PYROBUST_DEVICE void load_scales(const LinearArguments& p, const uint8_t* stage,
                                   const WarpPlace& at, Scale (&scale)[4]) {
    const uint8_t* from = stage + S::kScalesAt + at.strip * S::kStripScales;
    const int first = at.lane / 4 * kPairRows + at.tile * 2;
    if (Act::kType == FloatType::kFloat16) {
      const auto* pairs = reinterpret_cast<const uint32_t*>(from + 2 * first);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scale[r] = {cuda::prmt(pairs[r / 2], 0, r % 2 == 0 ? 0x1010u : 0x3232u), 0u};
      }
      return;
    }
    const bool single = p.scale_type == FloatType::kFloat32;
    const bool half = p.scale_type == FloatType::kFloat16;
    const auto* words = reinterpret_cast<const uint32_t*>(from + first * (single ? 4 : 2));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = words[single ? r : r / 2];
      const float low = half ? cuda::low_f16(word) : cuda::low_bf16(word);
      const float high = half ? cuda::high_f16(word) : cuda::high_bf16(word);
      const float value = single ? float_from_bits(word) : r % 2 == 0 ? low : high;
      scale[r].value = cuda::pack_bf16x2(value, value);
      const float rest = value - cuda::low_bf16(scale[r].value);
      scale[r].rest = cuda::pack_bf16x2(rest, rest);
    }
  }

  // The four zeros of the warp's rows, which are 0 where W has none.
  PYROBUST_DEVICE uint32_t zeros_of(const uint8_t* stage, const WarpPlace& at) {
    return *reinterpret_cast<const uint32_t*>(stage + S::kZerosAt + at.strip * kStrip +
                                              at.lane / 4 * kPairRows + at.tile * 2);
  }

  PYROBUST_DEVICE void multiply(const typename Pair::Fragments& a, uint64_t x, Sums& sum) {
    cuda::begin_products();
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      Act::multiply_warpgroup(sum[0][which], a[which], x, true);
    }
    cuda::commit_products();
  }

  PYROBUST_DEVICE void run(const LinearArguments& p) {
    constexpr int kAhead = S::kStages - 2;
    const int tile = static_cast<int>(blockIdx.x >> p.schedule.parts_log2);
    const int part = static_cast<int>(blockIdx.x) & (p.schedule.parts - 1);
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const WarpPlace at = {static_cast<int>(threadIdx.x) % kLanes, warp / 2,
                          static_cast<int>(blockIdx.y), warp % 2 * 2};
    const int first = first_of_run(p.schedule, part), last = last_of_run(p.schedule, part);
    const int count = last - first;
    uint8_t* stages = cuda::shared_memory();

    Loader loader;
    loader.begin(p, at, tile, first, last);
    Loader ahead = loader;
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      ahead.load_weights(p, at, stages + i * S::kStageBytes);
      ahead.advance();
    }
    cuda::begin_next_grid();
    cuda::await_grid();
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      loader.load_activations(p, stages + i * S::kStageBytes);
      loader.advance();
      cuda::commit_copies();
    }

    Sums sum;
#pragma unroll
    for (int i = 0; i < S::kVectors * 4; ++i) sum[0][i / 64][i / 4 % 16][i % 4] = 0.0f;
    const auto symmetric = static_cast<uint32_t>(p.symmetric_zero);
    const uint32_t zeros = p.zero != nullptr ? 0u : 0x01010101u * symmetric;
    int stage = 0, free = kAhead * S::kStageBytes;  // offsets in shared memory
    typename Pair::Fragments a[2];
    for (int i = 0; i < count; ++i) {
      cuda::wait_copies<kAhead - 1 + kLate>();
      cuda::show_to_products();
      cuda::sync_threads();
      const uint8_t* now = stages + stage;
      const uint8_t* codes = now + S::kCodesAt + at.strip * S::kStripCodes + at.lane * 16;
      const uint64_t x = cuda::operand_of(now);
      typename Pair::Words words;
      typename Pair::Offsets offset;
      Scale scale[4];
      Pair::load(codes, at.tile, 0, words);
      Pair::make_offsets(zeros_of(now, at) + zeros, offset);
      load_scales(p, now, at, scale);
      // No branch while products are under way: the compiler would wait for every one of them.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        decode(words, at, offset, scale, a[step % 2]);
        multiply(a[step % 2], x + static_cast<uint64_t>(2 * step), sum);
        if (step == 0) {
          loader.load_weights(p, at, stages + free);
          loader.load_activations(p, stages + free);
          loader.advance();
          cuda::commit_copies();
        }
        if (step < kSteps - 1) Pair::load(codes, at.tile, step + 1, words);
        cuda::finish_products<1>();
      }
      free = free == (S::kStages - 1) * S::kStageBytes ? 0 : free + S::kStageBytes;
      stage = stage == (S::kStages - 1) * S::kStageBytes ? 0 : stage + S::kStageBytes;
    }
    cuda::finish_products<0>(sum[0][0]);
    cuda::finish_products<0>(sum[0][1]);
    cuda::wait_copies<0>();
    cuda::sync_threads();
    R::finish(p, tile, part, 0, at, sum);
  }
};

template <Format kFormat, class Act, int kLate = 0>
PYROBUST_KERNEL_OF((BroadShape<kFormat>::kThreads), 1)
broad_linear_kernel(const __grid_constant__ LinearArguments p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Broad<kFormat, Act, kLate>::run(p);
#endif
}

template <Format kFormat, class Act>
cuda::Status start_broad(const LinearArguments& p, cuda::Stream stream) {
  cuda::LaunchShape shape = launch_shape<BroadShape<kFormat>>(p);
  shape.blocks_y = static_cast<unsigned>(divide_up(p.count, kBroadRows));
  return cuda::launch(broad_linear_kernel<kFormat, Act>, shape, stream, p);
}

}  // namespace pyrobust::matmul::gpu
