// The fused product of 33 to 64 rows of x with a packed weight on the tensor cores of warpgroups
// (compute capability 9.0): four warps multiply 64 rows of W at once with x as it lies in shared
// memory, at twice the rate of one warp's products. For groups along input features of a multiple
// of 128, or one a row; weights are never rounded, and each 128 columns are scaled in float32.
//
// A warpgroup is a team with its own columns of two strips: each strip has two warps, which decode
// two of its four tiles of 16 rows each. While the products of one tile are under way the warps
// decode the other, or add its sums.
#pragma once

#include "matmul/cuda_two_tiles.cuh"
#include "matmul/cuda_warpgroup_results.cuh"

namespace pyrobust::matmul::gpu {

constexpr int kPairColumns = 2 * kBlock;  // of a stage

// Sizes of an instance; what Results wants of it is as in Shape.
template <Format kFormat>
struct WideShape {
  static constexpr int kBits = stored_bits(kFormat);
  static constexpr int kSums = 1, kStrips = kWideStrips, kTiles = 2, kEights = 8;
  static constexpr int kTeams = kWideTeams, kTeam = 4 * kLanes, kThreads = kTeams * kTeam;
  static constexpr int kHalfBytes = 64 * 128;  // of x: 64 rows of 64 columns
  static constexpr int kBlockVectors = static_cast<int>(block_words(kFormat)) / 4;
  static constexpr int kStripCodes = 2 * kBlockVectors * 16;
  static constexpr int kStripScales = kStrip * 4;
  static constexpr int kCodesAt = 2 * kHalfBytes;
  static constexpr int kScalesAt = kCodesAt + kStrips * kStripCodes;
  static constexpr int kZerosAt = kScalesAt + kStrips * kStripScales;
  static constexpr int kStageBytes = (kZerosAt + kStrips * kStrip + 1023) / 1024 * 1024;
  static constexpr int kRoom = 226 * 1024 / (kTeams * kStageBytes);
  static constexpr int kStages = kRoom < 5 ? kRoom : 5;
  static_assert(kStages >= 2, "copies need a stage of their own");
  static constexpr int kTicketAt = kTeams * kStages * kStageBytes;
  static constexpr int kSharedBytes = kTicketAt + 16;

  static constexpr int kVectors = kTiles * kEights;
  static constexpr int kRunBytes = kVectors * kTeam * 16;
  static constexpr int kPatchAt = kTeams * kRunBytes;
};

template <Format kFormat, class Act, int kLate = 0>
struct Wide {
  using S = WideShape<kFormat>;
  using R = WarpgroupResults<kFormat, Act, S>;
  using Sums = typename R::Sums;
  using Pair = TwoTiles<kFormat, Act>;
  using Product = float[8][4];
  using Fragments = uint32_t[8][4];  // of a tile: eight steps

  // What this thread copies into the next stage. A group ends with a stage, or later.
  struct Loader {
    const uint32_t* codes;
    int64_t scale;
    int pair, within, span;  // stages: present, within its group, of a group
    int thread;
    bool idle;  // the strip lies past the end of W

    __device__ __forceinline__ void begin(const LinearArguments& p, const WarpPlace& at, int tile,
                                          int first) {
      thread = static_cast<int>(threadIdx.x) % S::kTeam;
      const int strip = tile * S::kStrips + at.strip;
      idle = strip >= static_cast<int>(p.strips);
      span = p.groups == 1 ? p.schedule.blocks : p.group_span / 2;
      const int group = first / span;
      pair = first;
      within = first - group * span;
      codes = p.codes +
              ((int64_t{strip} * p.schedule.blocks + 2 * first) * S::kBlockVectors + at.lane) * 4;
      scale = (int64_t{strip} * p.groups + group) * kStrip;
    }

    __device__ __forceinline__ void advance() {
      ++pair;
      codes += 2 * S::kBlockVectors * 4;
      if (++within == span) {
        within = 0;
        scale += kStrip;
      }
    }

    // The warps of a strip take every second vector.
    __device__ __forceinline__ void load_weights(const LinearArguments& p, const WarpPlace& at,
                                                 uint8_t* stage) const {
      const int half = at.tile / 2;
      uint8_t* to = stage + S::kCodesAt + at.strip * S::kStripCodes + at.lane * 16;
#pragma unroll
      for (int i = 0; i < S::kBits; ++i) {
        const int j = 2 * i + half;
        const bool valid = !idle && (j < S::kBits || 2 * pair + 1 < p.schedule.blocks);
        cuda::copy16_async_or_zero(to + j * kLanes * 16, valid ? codes + j * kLanes * 4 : p.codes,
                                   valid);
      }
      const int shift = p.scale_type == FloatType::kFloat32 ? 2 : 1;  // log2 of a scale's bytes
      const auto* scales = static_cast<const uint8_t*>(p.scale);
      if (half == 0 && at.lane < 4 << shift) {
        cuda::copy16_async_or_zero(stage + S::kScalesAt + at.strip * S::kStripScales + at.lane * 16,
                                   idle ? scales : scales + (scale << shift) + at.lane * 16, !idle);
      }
      if (p.zero != nullptr && half == 1 && at.lane < 4) {
        cuda::copy16_async_or_zero(stage + S::kZerosAt + at.strip * kStrip + at.lane * 16,
                                   idle ? p.zero : p.zero + scale + at.lane * 16, !idle);
      }
    }

    __device__ __forceinline__ void load_activations(const LinearArguments& p,
                                                     uint8_t* stage) const {
      const auto* x = static_cast<const uint16_t*>(p.x);
      const int chunk = thread % 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i % 2, row = i / 2 * 16 + thread / 8;
        const int column = pair * kPairColumns + half * kBlock + chunk * 8;
        const bool valid = row < static_cast<int>(p.count) && column < static_cast<int>(p.cols);
        cuda::copy16_async_or_zero(stage + half * S::kHalfBytes + activation_offset(row, chunk),
                                   valid ? x + row * static_cast<int>(p.cols) + column : x, valid);
      }
    }
  };

  // The first or the second of the warp's tiles, eight steps.
  template <int kWhich>
  PYROBUST_DEVICE void decode(const uint8_t* stage, const WarpPlace& at,
                              const typename Pair::Offsets& offset, Fragments& a) {
    const uint8_t* codes = stage + S::kCodesAt + at.strip * S::kStripCodes + at.lane * 16;
#pragma unroll
    for (int step = 0; step < 2 * kSteps; ++step) {
      typename Pair::Words words;
      typename Pair::Fragments both;
      Pair::load(codes, at.tile, step, words);
      Pair::decode(words, at.tile, offset, both);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = both[kWhich][i];
    }
  }

  PYROBUST_DEVICE void multiply(const Fragments& a, uint64_t x, Product& product) {
    cuda::begin_products();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint64_t b =
          x + static_cast<uint64_t>(step / kSteps * (S::kHalfBytes / 16) + step % kSteps * 2);
      Act::multiply_warpgroup(product, a[step], b, step != 0);
    }
    cuda::commit_products();
  }

  // The scales of the warp's two rows of tile `which` of the two.
  PYROBUST_DEVICE void load_scales(const LinearArguments& p, const uint8_t* stage,
                                   const WarpPlace& at, int which, float (&scale)[2]) {
    const uint8_t* from = stage + S::kScalesAt + at.strip * S::kStripScales;
    const int first = at.lane / 4 * kPairRows + (at.tile + which) * 2;
    if (p.scale_type == FloatType::kFloat32) {
      scale[0] = reinterpret_cast<const float*>(from)[first];
      scale[1] = reinterpret_cast<const float*>(from)[first + 1];
      return;
    }
    const uint32_t pair = reinterpret_cast<const uint32_t*>(from)[first / 2];
    const bool half = p.scale_type == FloatType::kFloat16;
    scale[0] = half ? cuda::low_f16(pair) : cuda::low_bf16(pair);
    scale[1] = half ? cuda::high_f16(pair) : cuda::high_bf16(pair);
  }

  PYROBUST_DEVICE void add(const Product& product, const float (&scale)[2], float (&sum)[8][4]) {
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][i] = fmaf(scale[i / 2], product[m][i], sum[m][i]);
    }
  }

  // The four zeros of the warp's rows.
  PYROBUST_DEVICE uint32_t zeros_of(const uint8_t* stage, const WarpPlace& at) {
    return *reinterpret_cast<const uint32_t*>(stage + S::kZerosAt + at.strip * kStrip +
                                              at.lane / 4 * kPairRows + at.tile * 2);
  }

  PYROBUST_DEVICE void run(const LinearArguments& p) {
    constexpr int kAhead = S::kStages - 1;
    const int tile = static_cast<int>(blockIdx.x >> p.schedule.parts_log2);
    const int part = static_cast<int>(blockIdx.x) & (p.schedule.parts - 1);
    const int team = static_cast<int>(threadIdx.x) / S::kTeam;
    const int warp = static_cast<int>(threadIdx.x) % S::kTeam / kLanes;
    const WarpPlace at = {static_cast<int>(threadIdx.x) % kLanes, warp / 2, 0, warp % 2 * 2};
    const int first = first_of_run(p.schedule, part * S::kTeams + team);
    const int last = last_of_run(p.schedule, part * S::kTeams + team);
    const int count = (last - first + 1) / 2;
    uint8_t* stages = cuda::shared_memory() + team * S::kStages * S::kStageBytes;

    Loader loader;
    loader.begin(p, at, tile, first / 2);
    Loader ahead = loader;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) ahead.load_weights(p, at, stages + i * S::kStageBytes);
      ahead.advance();
    }
    cuda::begin_next_grid();
    cuda::await_grid();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) loader.load_activations(p, stages + i * S::kStageBytes);
      loader.advance();
      cuda::commit_copies();
    }

    typename Pair::Offsets offset;
    Pair::make_offsets(0x01010101u * static_cast<uint32_t>(p.symmetric_zero), offset);
    Sums sum;
    clear(sum);
    int stage = 0, free = kAhead * S::kStageBytes;  // offsets in shared memory
    for (int i = 0; i < count; ++i) {
      cuda::wait_copies<kAhead - 1 + kLate>();
      cuda::show_to_products();
      cuda::sync_group<S::kTeam>(team);
      if (i + kAhead < count) {
        loader.load_weights(p, at, stages + free);
        loader.load_activations(p, stages + free);
      }
      loader.advance();
      cuda::commit_copies();
      const uint8_t* now = stages + stage;
      const uint64_t x = cuda::operand_of(now);
      if (p.zero != nullptr) Pair::make_offsets(zeros_of(now, at), offset);
      float scale[2][2];
      load_scales(p, now, at, 0, scale[0]);
      load_scales(p, now, at, 1, scale[1]);
      // No branch while products are under way: the compiler would wait for every one of them.
      Product product[2];
      Fragments a, b;
      decode<0>(now, at, offset, a);
      multiply(a, x, product[0]);
      decode<1>(now, at, offset, b);
      multiply(b, x, product[1]);
      cuda::finish_products<1>(product[0]);
      add(product[0], scale[0], sum[0][0]);
      cuda::finish_products<0>(product[1]);
      add(product[1], scale[1], sum[0][1]);
      free = free == (S::kStages - 1) * S::kStageBytes ? 0 : free + S::kStageBytes;
      stage = stage == (S::kStages - 1) * S::kStageBytes ? 0 : stage + S::kStageBytes;
    }
    cuda::wait_copies<0>();
    cuda::sync_threads();
    R::finish(p, tile, part, team, at, sum);
  }

  PYROBUST_DEVICE void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < S::kVectors * 4; ++i) sum[0][i / 32][i / 4 % 8][i % 4] = 0.0f;
  }
};

template <Format kFormat, class Act, int kLate = 0>
PYROBUST_KERNEL_OF((WideShape<kFormat>::kThreads), 1)
wide_linear_kernel(const __grid_constant__ LinearArguments p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Wide<kFormat, Act, kLate>::run(p);
#endif
}

template <Format kFormat, class Act>
cuda::Status start_wide(const LinearArguments& p, cuda::Stream stream) {
  return cuda::launch(wide_linear_kernel<kFormat, Act>, launch_shape<WideShape<kFormat>>(p), stream,
                      p);
}

}  // namespace pyrobust::matmul::gpu
