// What a thread block of the fused product holds, how it is launched, and how a stage of its shared
// memory is filled.
#pragma once

#include "core/float_types.h"
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "matmul/cuda.h"
#include "matmul/cuda_layout.h"

namespace pyrobust::matmul::gpu {

// Sizes of an instance. kRows: rows of x that it takes.
template <Format kFormat, int kRows>
struct Shape {
  static constexpr int kBits = stored_bits(kFormat);
  static constexpr int kSums = kFormat == Format::kComplex ? 2 : 1;
  static constexpr int kStrips = tile_strips(kRows);
  static constexpr int kEights = kRows / 8;  // rows of x, by eights
  static constexpr int kTiles = 4;           // of 16 rows of W of a warp
  static constexpr int kTeams = teams_of(kRows);
  static constexpr int kTeam = kStrips * kLanes;  // threads, a row of x for every eight
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kBlocksPerSm = resident_blocks(kRows);
  // What registers are for: shared memory of compute capability 8.0 has room for one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kRegistersFor = 1;
#else
  static constexpr int kRegistersFor = kBlocksPerSm;
#endif

  // Parts of a stage of one team, in bytes. A strip may have two groups of scales a block.
  static constexpr int kStripCodes = static_cast<int>(block_words(kFormat)) * 4;
  static constexpr int kStripScales = 2 * kStrip * 4;
  static constexpr int kStripZeros = 2 * kStrip;
  static constexpr int kCodesAt = kRows * 128;
  static constexpr int kScalesAt = kCodesAt + kStrips * kStripCodes;
  static constexpr int kZerosAt = kScalesAt + kStrips * kStripScales;
  static constexpr int kStageBytes = kZerosAt + kStrips * kStripZeros;
  // As many as fit, two thread blocks to a multiprocessor of sm_90 or one to one of sm_80; but no
  // more than keep 40 KB of codes under way on a multiprocessor, of which 24 KB suffice at 4.3 TB/s
  // and 0.75 us.
  static constexpr int kRoom = (kBlocksPerSm == 2 ? 110 : 160) * 1024 / (kTeams * kStageBytes);
  static constexpr int kUnderWay = kBlocksPerSm * kTeams * kStrips * kStripCodes;  // a stage
  static constexpr int kEnough = 1 + (40 * 1024 + kUnderWay - 1) / kUnderWay;
  static constexpr int kWanted = kEnough < 4 ? 4 : kEnough;
  static constexpr int kStages = kRoom < kWanted ? kRoom : kWanted;
  static_assert(kStages >= 2, "copies need a stage of their own");
  static constexpr int kTableAt = kTeams * kStages * kStageBytes;
  static constexpr int kTableBytes = kFormat == Format::kCodebook ? 1024 : 0;
  static constexpr int kTicketAt = kTableAt + kTableBytes;
  static constexpr int kSharedBytes = kTicketAt + 16;

  // The sums of a team, vectors of four a thread, lie over the stages in the end.
  static constexpr int kVectors = kSums * kTiles * kEights;
  static constexpr int kRunBytes = kVectors * kTeam * 16;
  static_assert(kTeams * kRunBytes <= kTableAt, "the sums lie over the stages");
};

// The launch of a kernel with these sizes.
template <class S>
cuda::LaunchShape launch_shape(const LinearArguments& p) {
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(thread_blocks_of(p.schedule));
  shape.threads = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  if (p.clusters) shape.cluster = static_cast<unsigned>(p.schedule.parts);
  shape.overlaps = p.clusters && p.settled && p.schedule.fills;
  return shape;
}

// Which warp of its team a thread is in.
struct WarpPlace {
  int lane, strip;  // strip within the tile
  int half;         // of the rows of x, where warps share them (cuda_broad.cuh), else 0
  int tile;         // first of the strip's tiles of 16 rows
};

// Where a team is: columns [64 block, ...) of its tile. `ends`: the last block of the group, or of
// the run where that ends before; with groups along output features that of the run.
struct Unit {
  int block, ends, last;

  __device__ __forceinline__ bool at_end() const { return block == ends; }

  // Whether a group has ended.
  __device__ __forceinline__ bool advance(const LinearArguments& p) {
    const bool ended = at_end();
    if (ended) ends = ends + p.group_span < last ? ends + p.group_span : last;
    ++block;
    return ended;
  }
};

// Fills stages of one team: what this thread copies next. Places move along with the unit, without
// multiplications; they count in 32 bits, which saves registers and is enough for 2^36 weights.
template <Format kFormat, int kRows, int kGroupDim>
struct Loader {
  using S = Shape<kFormat, kRows>;
  static constexpr int kCopies = (kRows * 8 + S::kTeam - 1) / S::kTeam;
  static constexpr int kRowStep = S::kTeam / 8;  // rows of x between a thread's copies
  static_assert(kRowStep % 4 == 0, "the order of chunks would differ by more than one bit");
  static constexpr int kBlockVectors = static_cast<int>(block_words(kFormat)) / 4;

  Unit unit;
  int filled[kCopies];  // blocks whose columns exist, where the row of x does
  uint32_t x;           // halves from p.x to the first copy
  uint32_t codes;       // 16-byte vectors from p.codes to the first
  uint32_t scales;      // of the first of 64 scales
  uint32_t x_to, w_to;  // bytes from a stage to what this thread copies
  bool idle;            // the strip lies past the end of W

  // Blocks [block, end) of a tile. In 32 bits: a division of 64 costs about 100 instructions.
  __device__ __forceinline__ void begin(const LinearArguments& p, const WarpPlace& at, int tile,
                                        int block, int end) {
    const int thread = static_cast<int>(threadIdx.x) % S::kTeam;
    const int row = thread / 8, chunk = thread % 8, cols = static_cast<int>(p.cols);
    const auto span = static_cast<uint32_t>(p.group_span);
    const auto group = static_cast<uint32_t>(block) / span;
    const int ends = static_cast<int>((group + 1) * span);
    unit = {block, (kGroupDim == 1 && ends < end ? ends : end) - 1, end - 1};
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool exists = row + i * kRowStep < static_cast<int>(p.count);
      filled[i] = exists ? (cols - chunk * 8 + kBlock - 1) / kBlock : 0;
    }
    x = static_cast<uint32_t>(row * cols + block * kBlock + chunk * 8);
    x_to = static_cast<uint32_t>(activation_offset(row, chunk));
    w_to = static_cast<uint32_t>(S::kCodesAt + at.strip * S::kStripCodes + at.lane * 16);
    const auto strip = static_cast<uint32_t>(tile * S::kStrips + at.strip);
    const auto blocks = static_cast<uint32_t>(p.schedule.blocks), pairs = p.two_groups + 1u;
    idle = strip >= static_cast<uint32_t>(p.strips);
    codes = (strip * blocks + static_cast<uint32_t>(block)) * kBlockVectors +
            static_cast<uint32_t>(at.lane);
    if (kGroupDim == 1) {
      scales = (strip * static_cast<uint32_t>(p.groups) + group * pairs) * kStrip;
    } else {
      const uint32_t groups = p.two_groups ? 2 * strip : strip / span;
      scales = (groups * blocks + static_cast<uint32_t>(block)) * kBlock;
    }
  }

  __device__ __forceinline__ void advance(const LinearArguments& p) {
    x += kBlock;
    codes += kBlockVectors;
    if (kGroupDim == 0) scales += kBlock;
    if (unit.advance(p) && kGroupDim == 1) scales += kStrip * (p.two_groups + 1);
  }

  __device__ __forceinline__ void load(const LinearArguments& p, const WarpPlace& at,
                                       cuda::SharedPlace stage) const {
    load_activations(p, stage);
    load_weights(p, at, stage);
  }

  __device__ __forceinline__ void load_weights(const LinearArguments& p, const WarpPlace& at,
                                               cuda::SharedPlace stage) const {
    if (idle) return;
    const uint32_t* from = p.codes + int64_t{codes} * 4;
#pragma unroll
    for (int j = 0; j < S::kBits; ++j) {
      cuda::copy16_async(stage + w_to + j * kLanes * 16, from + j * kLanes * 4);
    }
    // Scales multiply the sums of a group at its end; zeros may be wanted at its beginning.
    const bool scaled = kGroupDim == 0 || p.zero != nullptr || p.two_groups || unit.at_end();
    if (kFormat != Format::kComplex && scaled) load_scales(p, at, stage);
  }

  // Rows of x are apart by a multiple of eight, which have the same order of chunks, or by four.
  __device__ __forceinline__ void load_activations(const LinearArguments& p,
                                                   cuda::SharedPlace stage) const {
    const auto* from = static_cast<const uint16_t*>(p.x) + x;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cuda::copy16_async_or_zero(stage + (x_to ^ i * kRowStep % 8 * 16) + i * kRowStep * 128,
                                 from + int64_t{i} * kRowStep * p.cols, unit.block < filled[i]);
    }
  }

  __device__ __forceinline__ void load_scales(const LinearArguments& p, const WarpPlace& at,
                                              cuda::SharedPlace stage) const {
    // A second group of the strip or block lies right behind (group_dim 1) or a row further.
    const int64_t apart = kGroupDim == 1 ? kStrip : int64_t{p.schedule.blocks} * kBlock;
    const int shift = p.scale_type == FloatType::kFloat32 ? 2 : 1;  // log2 of a scale's bytes
    const int which = at.lane >> (shift + 2);
    if (which <= p.two_groups) {
      const int64_t first = int64_t{scales} + which * apart;
      const auto* scale = static_cast<const uint8_t*>(p.scale) + (first << shift);
      cuda::copy16_async(stage + S::kScalesAt + at.strip * S::kStripScales + at.lane * 16,
                         scale + (at.lane & ((4 << shift) - 1)) * 16);
    }
    if (p.zero != nullptr && at.lane / 4 <= p.two_groups) {
      const uint8_t* zero = p.zero + scales + at.lane / 4 * apart;
      cuda::copy16_async(stage + S::kZerosAt + at.strip * S::kStripZeros + at.lane * 16,
                         zero + at.lane % 4 * 16);
    }
  }
};

}  // namespace pyrobust::matmul::gpu
