// The fused product of at most 16 rows of x with a packed weight on compute capability 9.0 and
// above, for groups along input features of a multiple of 128, or one a row, without a codebook.
// The arithmetic is that of cuda_linear.cuh; what differs is how operands come and sums meet.
//
// A warp multiplies one strip with a run of columns of its own, so that warps wait for each other
// only in the end. Codes, scales and zeros of a stage come by bulk copies that one lane starts,
// rows of x by copies of all lanes; a signal tells when all have landed. Sums of the two thread
// blocks of a tile meet by stores into each other's shared memory, which signals tell of too: a
// barrier of the cluster that publishes writes waits for all of a thread's memory and took 0.6 us
// on an H200.
#pragma once

#include "matmul/cuda_results.cuh"

namespace pyrobust::matmul::gpu {

// Sizes of an instance; what Multiplier and Results want of it is as in Shape.
template <Format kFormat, int kRows>
struct FewShape {
  static constexpr int kBits = stored_bits(kFormat);
  static constexpr int kSums = 1, kStrips = 1, kTiles = 4;
  static constexpr int kEights = kRows / 8;
  static constexpr int kTeams = kFewTeams, kTeam = kLanes, kThreads = kTeams * kTeam;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kVectors = kTiles * kEights;
  static constexpr int kRunBytes = kVectors * kTeam * 16;
  static constexpr int kReceivedBytes = kRunBytes / 2;
  static constexpr int kBytes = 113 * 1024 - kReceivedBytes;  // for stages

  static constexpr int kHalfBytes = kRows * 128;  // of x: the rows of a block of columns
  static constexpr int kBlockBytes = static_cast<int>(block_words(kFormat)) * 4;
  static constexpr int kStripScales = kStrip * 4, kStripZeros = kStrip;
  static constexpr int stage_bytes(int blocks) {
    return blocks * (kHalfBytes + kBlockBytes) + kStripScales + kStripZeros;
  }
  static constexpr int room_for(int blocks) { return kBytes / (kTeams * stage_bytes(blocks)); }
  // Of columns of a stage: two where two stages find room.
  static constexpr int kBlocks = room_for(2) >= 2 ? 2 : 1;
  static constexpr int kStages = room_for(kBlocks) < 8 ? room_for(kBlocks) : 8;
  static_assert(kStages >= 2, "copies need a stage of their own");
  static constexpr int kStripCodes = kBlocks * kBlockBytes;
  static constexpr int kCodesAt = kBlocks * kHalfBytes;
  static constexpr int kScalesAt = kCodesAt + kStripCodes;
  static constexpr int kZerosAt = kScalesAt + kStripScales;
  static constexpr int kStageBytes = stage_bytes(kBlocks);

  static constexpr int kRingBytes = kTeams * kStages * kStageBytes;
  static_assert(kTeams * kRunBytes <= kRingBytes, "the sums lie over the stages");
  static constexpr int kReceivedAt = kRingBytes;
  static constexpr int kSignalsAt = kReceivedAt + kReceivedBytes;
  static constexpr int kSentAt = kSignalsAt + kTeams * kStages * 8;  // of kReceivedAt
  static constexpr int kTicketAt = kSentAt;  // of Results, which uses none here
  static constexpr int kSharedBytes = kSentAt + 16;
};

// What a warp copies into its next stage. Places are those of its first lane, or alike in all.
template <Format kFormat, int kRows>
struct FewLoader {
  using S = FewShape<kFormat, kRows>;

  const uint8_t *codes, *scales, *zeros;
  const uint16_t* x;     // of this lane: row lane / 4, chunk lane % 4
  uint32_t x_to;         // bytes from a stage
  int weights_at, x_at;  // the next block of columns of each
  int within, span;      // blocks of a group
  uint32_t scale_bytes;

  // Columns from block `first` of strip `strip` on.
  __device__ __forceinline__ void begin(const LinearArguments& p, int lane, int strip, int first) {
    span = p.groups == 1 ? p.schedule.blocks + 1 : p.group_span;
    const int group = static_cast<int>(static_cast<uint32_t>(first) / static_cast<uint32_t>(span));
    within = first - group * span;
    weights_at = x_at = first;
    x = static_cast<const uint16_t*>(p.x) + int64_t{lane / 4} * p.cols + first * kBlock +
        lane % 4 * 8;
    x_to = static_cast<uint32_t>(activation_offset(lane / 4, lane % 4));
    codes = reinterpret_cast<const uint8_t*>(p.codes) +
            (int64_t{strip} * p.schedule.blocks + first) * S::kBlockBytes;
    scale_bytes = kStrip * (p.scale_type == FloatType::kFloat32 ? 4 : 2);
    const int64_t place = int64_t{strip} * p.groups + group;
    scales = static_cast<const uint8_t*>(p.scale) + place * scale_bytes;
    zeros = p.zero == nullptr ? nullptr : p.zero + place * kStrip;
  }

  // By all lanes; the first one copies.
  __device__ __forceinline__ void load_weights(const LinearArguments& p, int lane,
                                               cuda::SharedPlace stage, cuda::SharedPlace signal) {
    if (lane == 0) start_copies(p, stage, signal);
    weights_at += S::kBlocks;
    codes += S::kStripCodes;
    within += S::kBlocks;
    if (within < span) return;
    within = 0;
    scales += scale_bytes;
    if (zeros != nullptr) zeros += kStrip;
  }

  __device__ __forceinline__ void start_copies(const LinearArguments& p, cuda::SharedPlace stage,
                                               cuda::SharedPlace signal) const {
    const bool whole = weights_at + S::kBlocks <= p.schedule.blocks;
    const uint32_t bytes = whole ? S::kStripCodes : S::kBlockBytes;
    cuda::arrive_expecting(signal, bytes + scale_bytes + (zeros == nullptr ? 0 : kStrip));
    cuda::copy_bulk(stage + S::kCodesAt, codes, bytes, signal);
    cuda::copy_bulk(stage + S::kScalesAt, scales, scale_bytes, signal);
    if (zeros != nullptr) cuda::copy_bulk(stage + S::kZerosAt, zeros, kStrip, signal);
  }

  // Rows that do not exist stay as clear_rows() left them; columns past the end become 0.
  __device__ __forceinline__ void load_activations(const LinearArguments& p, int lane,
                                                   cuda::SharedPlace stage,
                                                   cuda::SharedPlace signal) {
    const int left = static_cast<int>(p.cols) - x_at * kBlock;
    if (left >= S::kBlocks * kBlock) {
      copy_rows(p, lane, stage, [](int) { return true; });
    } else {
      copy_rows(p, lane, stage, [=](int column) { return column + lane % 4 * 8 < left; });
    }
    cuda::arrive_with_copies(signal);
    x += S::kBlocks * kBlock;
    x_at += S::kBlocks;
  }

  // valid(column): whether columns from there on, this lane's first taken off, exist.
  template <class Valid>
  __device__ __forceinline__ void copy_rows(const LinearArguments& p, int lane,
                                            cuda::SharedPlace stage, const Valid& valid) const {
#pragma unroll
    for (int m = 0; m < S::kEights; ++m) {
      if (lane / 4 + 8 * m >= static_cast<int>(p.count)) continue;
      const uint16_t* from = x + int64_t{8 * m} * p.cols;
#pragma unroll
      for (int j = 0; j < 2 * S::kBlocks; ++j) {
        cuda::copy16_async_or_zero(
            stage + (x_to ^ j % 2 * 64) + j / 2 * S::kHalfBytes + m * kEightBytes, from + j * 32,
            valid(j * 32));
      }
    }
  }

  __device__ __forceinline__ void clear_rows(const LinearArguments& p, int lane,
                                             uint8_t* stages) const {
#pragma unroll
    for (int m = 0; m < S::kEights; ++m) {
      if (lane / 4 + 8 * m < static_cast<int>(p.count)) continue;
#pragma unroll
      for (int s = 0; s < S::kStages; ++s) {
#pragma unroll
        for (int j = 0; j < 2 * S::kBlocks; ++j) {
          cuda::store16(stages + s * S::kStageBytes + (x_to ^ j % 2 * 64) + j / 2 * S::kHalfBytes +
                            m * kEightBytes,
                        {{0, 0, 0, 0}});
        }
      }
    }
  }
};

// kFault: what tests plant. 1: stages are read before they have landed; 2: they are filled before
// they have been read; 3: sums are added before they have come.
template <Format kFormat, class Act, int kRows, int kFault = 0>
struct Few {
  using S = FewShape<kFormat, kRows>;
  using M = Multiplier<kFormat, Act, S, 1>;
  using R = Results<kFormat, Act, S>;
  using Sums = typename M::Sums;

  // Those of a warp's stages, and one for what the other thread block sends.
  PYROBUST_DEVICE void make_signals(int lane, cuda::SharedPlace signals, cuda::SharedPlace sent) {
    if (lane < S::kStages) cuda::make_signal(signals + lane * 8, 1 + kLanes);
    if (threadIdx.x == S::kThreads - 1) {
      cuda::make_signal(sent, 1);
      cuda::arrive_expecting(sent, S::kReceivedBytes);
    }
    cuda::show_signals();
    cuda::sync_warp();
  }

  // Blocks of a stage onto the part of a group.
  PYROBUST_DEVICE void multiply(const LinearArguments& p, cuda::SharedPlace stage,
                                const WarpPlace& at, uint32_t (&offset)[8],
                                typename M::Part& part) {
    if (!M::kUnits && p.zero != nullptr) M::load_offsets(stage, at, 0, offset);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      uint32_t words[kSteps * S::kBits];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        M::multiply_half(p, stage + b * S::kHalfBytes, stage + b * S::kBlockBytes, at, half, words,
                         offset, nullptr, part);
      }
    }
  }

  PYROBUST_DEVICE void run(const LinearArguments& p) {
    const int tile = static_cast<int>(blockIdx.x >> p.schedule.parts_log2);
    const int part = static_cast<int>(blockIdx.x) & (p.schedule.parts - 1);
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    // Of a shuffle the compiler knows that all lanes have it alike.
    const int team = cuda::shuffle(static_cast<int>(threadIdx.x) / kLanes, 0);
    const WarpPlace at = {lane, 0, 0, 0};
    const int first = first_of_run(p.schedule, part * S::kTeams + team);
    const int last = last_of_run(p.schedule, part * S::kTeams + team);
    const cuda::SharedPlace shared = cuda::shared_place(cuda::shared_memory());
    const cuda::SharedPlace stages = shared + team * S::kStages * S::kStageBytes;
    const cuda::SharedPlace signals = shared + S::kSignalsAt + team * S::kStages * 8;
    cuda::begin_next_grid();
    make_signals(lane, signals, shared + S::kSentAt);
    if (p.schedule.parts == 2) cuda::begin_cluster_barrier();
    FewLoader<kFormat, kRows> loader;
    loader.begin(p, lane, tile, first);
    // Weights are there before the grid ahead has ended; x may be its result.
    for (int i = 0; i < S::kStages - 1 && loader.weights_at < last; ++i) {
      loader.load_weights(p, lane, stages + i * S::kStageBytes, signals + i * 8);
    }
    loader.clear_rows(p, lane, cuda::shared_memory() + team * S::kStages * S::kStageBytes);
    cuda::await_grid();
    for (int i = 0; i < S::kStages - 1 && loader.x_at < last; ++i) {
      loader.load_activations(p, lane, stages + i * S::kStageBytes, signals + i * 8);
    }
    Sums sum;
    M::clear(sum);
    uint32_t offset[8];
    M::set_offsets(p.symmetric_zero, offset);
    int now = 0, fill = S::kStages - 1;  // slots
    uint32_t parity = 0;
    for (int block = first; block < last; block += 2) {
      typename M::Part part_of_group;
      M::clear(part_of_group);
      cuda::SharedPlace stage = 0;
#pragma unroll
      for (int b = 0; b < 2; b += S::kBlocks) {
        if (b > 0 && block + b >= last) break;
        // Rows are clear, and what this warp fills it has read. Bulk copies may overwrite what
        // ordinary loads have read: only writes hide from them, and they write none of the rows.
        if (kFault != 2) cuda::sync_warp();
        if (loader.x_at < last) {
          const cuda::SharedPlace to = stages + fill * S::kStageBytes, signal = signals + fill * 8;
          loader.load_weights(p, lane, to, signal);
          loader.load_activations(p, lane, to, signal);
        }
        fill = now;
        stage = stages + now * S::kStageBytes;
        if (kFault != 1) cuda::await_signal(signals + now * 8, parity);
        if (++now == S::kStages) now = 0, parity ^= 1;
        multiply(p, stage, at, offset, part_of_group);
      }
      M::fold(p, stage, at, 0, part_of_group, sum);
    }
    cuda::sync_threads();
    M::complete(sum);
    finish(p, tile, part, team, at, shared, sum);
  }

  // Vector i of all teams of this thread block.
  PYROBUST_DEVICE void add_teams(int i, float (&sum)[4]) {
    const uint8_t* from = cuda::shared_memory() + (i * S::kTeam + R::thread_of_team()) * 16;
    cuda::Words4 v[S::kTeams];
#pragma unroll
    for (int t = 0; t < S::kTeams; ++t) v[t] = cuda::load16(from + t * S::kRunBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] = float_from_bits(v[0].word[j]);
#pragma unroll
      for (int t = 1; t < S::kTeams; ++t) sum[j] += float_from_bits(v[t].word[j]);
    }
  }

  // Of the vectors of a tile two thread blocks finish every second one each: 2 i + part.
  PYROBUST_DEVICE void finish(const LinearArguments& p, int tile, int part, int team,
                              const WarpPlace& at, cuda::SharedPlace shared, const Sums& sum) {
    const int thread = R::thread_of_team();
    R::store_sums(sum, cuda::shared_memory() + team * S::kRunBytes, thread);
    cuda::sync_threads();
    float total[4];
    if (p.schedule.parts == 1) {
      for (int i = team; i < S::kVectors; i += S::kTeams) {
        add_teams(i, total);
        R::store_vector(p, tile, at, i, total);
      }
      return;
    }
    constexpr int kHalf = S::kVectors / 2;
    const auto place = [thread](int i) { return S::kReceivedAt + (i * S::kTeam + thread) * 16; };
    cuda::end_cluster_barrier();
    for (int i = team; i < kHalf; i += S::kTeams) {
      add_teams(2 * i + 1 - part, total);
      cuda::send16(shared + place(i), total, 1 - part, shared + S::kSentAt);
    }
    bool received = false;  // nobody may end before
    for (int i = (team + S::kTeams / 2) % S::kTeams; i < kHalf; i += S::kTeams) {
      add_teams(2 * i + part, total);
      if (kFault != 3 && !received) cuda::await_signal(shared + S::kSentAt, 0);
      received = true;
      const cuda::Words4 theirs = cuda::load16(cuda::shared_memory() + place(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] += float_from_bits(theirs.word[j]);
      R::store_vector(p, tile, at, 2 * i + part, total);
    }
    if (!received) cuda::await_signal(shared + S::kSentAt, 0);
  }
};

template <Format kFormat, class Act, int kRows, int kFault = 0>
PYROBUST_KERNEL_OF((FewShape<kFormat, kRows>::kThreads), (FewShape<kFormat, kRows>::kBlocksPerSm))
few_linear_kernel(const __grid_constant__ LinearArguments p) {
  Few<kFormat, Act, kRows, kFault>::run(p);
}

template <Format kFormat, class Act, int kRows, int kFault = 0>
cuda::Status start_few(const LinearArguments& p, cuda::Stream stream) {
  return cuda::launch(few_linear_kernel<kFormat, Act, kRows, kFault>,
                      launch_shape<FewShape<kFormat, kRows>>(p), stream, p);
}

}  // namespace pyrobust::matmul::gpu
