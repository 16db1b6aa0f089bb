// The fused product of few activations with a packed weight on tensor cores: y = x W^T + bias for
// at most 64 rows of x at a time. Differs from portable.cpp in arithmetic: codes become halves
// exactly, products of halves are summed in float32, and scales multiply
//
//     group_dim 1   the float32 sums of a group: no weight is rounded
//     group_dim 0   the weights: each is rounded once to the type of x
//
// A thread block is four warps (eight for more than 32 rows of x), each with a strip of 64 rows of
// W; W is the 16-row side of the tensor core product, so that 8 rows of x cost half of what 16 do.
// Units of work and their order are in cuda_layout.h. Every unit passes through a ring of stages in
// shared memory, filled by asynchronous copies; the codes of a lane are read by that lane alone,
// without a dequantized copy in shared memory.
#pragma once

#include <cmath>

#include "core/float_types.h"
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "matmul/cuda.h"
#include "matmul/cuda_decode.cuh"
#include "matmul/cuda_layout.h"

namespace pyrobust::matmul::gpu {

// Sizes of an instance. kRows: rows of x that it takes.
template <Format kFormat, int kRows>
struct Shape {
  static constexpr int kBits = stored_bits(kFormat);
  static constexpr int kWarpsM = kRows > 32 ? 2 : 1;
  static constexpr int kEights = kRows / kWarpsM / 8;  // rows of x of a warp, by eights
  static constexpr int kThreads = kTileStrips * kWarpsM * kLanes;
  static constexpr int kBlocksPerSm = kWarpsM == 1 ? 2 : 1;
  static constexpr int kSums = kFormat == Format::kComplex ? 2 : 1;

  // Parts of a stage, in bytes. A strip may have two groups of scales a block.
  static constexpr int kStripCodes = static_cast<int>(block_words(kFormat)) * 4;
  static constexpr int kStripScales = 2 * kStrip * 4;
  static constexpr int kStripZeros = 2 * kStrip;
  static constexpr int kCodesAt = kRows * 128;
  static constexpr int kScalesAt = kCodesAt + kTileStrips * kStripCodes;
  static constexpr int kZerosAt = kScalesAt + kTileStrips * kStripScales;
  static constexpr int kStageBytes = kZerosAt + kTileStrips * kStripZeros;
  // Enough bytes under way at two blocks a multiprocessor, within the 163 KB of sm_80.
  static constexpr int kStages = kBits == 8 ? 3 : kBits > 2 ? 4 : 6;
  static constexpr int kTableAt = kStages * kStageBytes;
  static constexpr int kTableBytes = kFormat == Format::kCodebook ? 1024 : 0;
  static constexpr int kTicketAt = kTableAt + kTableBytes;
  static constexpr int kSharedBytes = kTicketAt + 16;
};

// Where a thread block is in its units: columns [64 block, ...) of strips [4 tile, ...), and, with
// groups along input features, how many blocks of the present group lie behind.
struct Unit {
  int tile, block, within;
};

PYROBUST_DEVICE Unit unit_at(const LinearArguments& p, int64_t index) {
  const int block = static_cast<int>(index % p.schedule.blocks);
  return {static_cast<int>(index / p.schedule.blocks), block, block % p.group_span};
}

// To the next unit; whether that begins a tile.
PYROBUST_DEVICE bool advance(const LinearArguments& p, Unit* unit) {
  ++unit->block;
  if (++unit->within == p.group_span) unit->within = 0;
  if (unit->block != static_cast<int>(p.schedule.blocks)) return false;
  unit->block = unit->within = 0;
  ++unit->tile;
  return true;
}

// kLate copies too many may be under way when a stage is read: 0, or a fault for tests to find.
template <Format kFormat, class Act, int kRows, int kGroupDim, int kLate = 0>
struct Linear {
  using S = Shape<kFormat, kRows>;
  static constexpr int kEights = S::kEights;
  using Sums = float[S::kSums][4][kEights][4];

  struct Place {
    int lane, strip, half;  // strip within the tile; half of the rows of x
  };

  PYROBUST_DEVICE Place place() {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    return {static_cast<int>(threadIdx.x) % kLanes, warp % kTileStrips, warp / kTileStrips};
  }

  // --- filling a stage --------------------------------------------------------------------------

  // What this thread copies next: places move along with the unit, without multiplications. They
  // count in 32 bits, which saves registers and is enough for 2^36 weights.
  struct Loader {
    Unit unit;
    uint32_t x;       // halves from p.x to its chunk of the first row of x that it copies
    uint32_t codes;   // 16-byte vectors from p.codes to its first
    uint32_t scales;  // of the first of 64 scales
  };

  static constexpr int kCopies = (kRows * 8 + S::kThreads - 1) / S::kThreads;
  static constexpr int kRowStep = S::kThreads / 8;  // rows of x between a thread's copies
  static constexpr int kBlockVectors = static_cast<int>(block_words(kFormat)) / 4;

  PYROBUST_DEVICE bool idle(const LinearArguments& p, const Unit& unit, const Place& at) {
    return unit.tile * kTileStrips + at.strip >= static_cast<int>(p.strips);
  }

  PYROBUST_DEVICE void begin_strip(const LinearArguments& p, const Place& at, Loader* to) {
    const int64_t strip = int64_t{to->unit.tile} * kTileStrips + at.strip;
    const int64_t blocks = p.schedule.blocks;
    to->codes = static_cast<uint32_t>((strip * blocks + to->unit.block) * kBlockVectors + at.lane);
    if (kGroupDim == 1) {
      const int group = to->unit.block / p.group_span * (p.two_groups + 1);
      to->scales = static_cast<uint32_t>((strip * p.groups + group) * kStrip);
    } else {
      const int64_t group = p.two_groups ? 2 * strip : strip / p.group_span;
      to->scales = static_cast<uint32_t>((group * blocks + to->unit.block) * kBlock);
    }
  }

  PYROBUST_DEVICE Loader make_loader(const LinearArguments& p, const Place& at, int64_t first) {
    const int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
    Loader to;
    to.unit = unit_at(p, first);
    to.x = static_cast<uint32_t>(row * p.cols + to.unit.block * kBlock + chunk * 8);
    begin_strip(p, at, &to);
    return to;
  }

  PYROBUST_DEVICE void advance_loader(const LinearArguments& p, const Place& at, Loader* to) {
    to->x += kBlock;
    to->codes += kBlockVectors;
    const bool next_tile = advance(p, &to->unit);
    if (kGroupDim == 0) to->scales += kBlock;
    if (kGroupDim == 1 && to->unit.within == 0) to->scales += kStrip * (p.two_groups + 1);
    if (next_tile) {
      to->x -= static_cast<uint32_t>(p.schedule.blocks) * kBlock;
      begin_strip(p, at, to);
    }
  }

  PYROBUST_DEVICE void load_activations(const LinearArguments& p, const Loader& from,
                                        uint8_t* stage) {
    const int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
    const auto* x = static_cast<const uint16_t*>(p.x);
    const bool columns = from.unit.block * kBlock + chunk * 8 < static_cast<int>(p.cols);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kRows < kRowStep && row >= kRows) break;
      const bool valid = columns && row + i * kRowStep < static_cast<int>(p.count);
      cuda::copy16_async_or_zero(stage + activation_offset(row, chunk) + i * kRowStep * 128,
                                 valid ? x + from.x + i * kRowStep * p.cols : x, valid);
    }
  }

  PYROBUST_DEVICE void load_scales(const LinearArguments& p, const Loader& from, const Place& at,
                                   uint8_t* stage) {
    // A second group of the strip or block lies right behind (group_dim 1) or a row further.
    const int64_t apart = kGroupDim == 1 ? kStrip : p.schedule.blocks * kBlock;
    const int shift = p.scale_type == FloatType::kFloat32 ? 2 : 1;  // log2 of a scale's bytes
    const int which = at.lane >> (shift + 2);
    if (which <= p.two_groups) {
      const int64_t first = int64_t{from.scales} + which * apart;
      const auto* scale = static_cast<const uint8_t*>(p.scale) + (first << shift);
      cuda::copy16_async(stage + S::kScalesAt + at.strip * S::kStripScales + at.lane * 16,
                         scale + (at.lane & ((4 << shift) - 1)) * 16);
    }
    if (p.zero != nullptr && at.lane / 4 <= p.two_groups) {
      const uint8_t* zero = p.zero + from.scales + at.lane / 4 * apart;
      cuda::copy16_async(stage + S::kZerosAt + at.strip * S::kStripZeros + at.lane * 16,
                         zero + at.lane % 4 * 16);
    }
  }

  PYROBUST_DEVICE void load(const LinearArguments& p, const Loader& from, const Place& at,
                            uint8_t* stage) {
    load_activations(p, from, stage);
    if (idle(p, from.unit, at)) return;
    uint8_t* to = stage + S::kCodesAt + at.strip * S::kStripCodes + at.lane * 16;
    const uint32_t* codes = p.codes + int64_t{from.codes} * 4;
#pragma unroll
    for (int j = 0; j < S::kBits; ++j) {
      if (S::kWarpsM > 1 && j % S::kWarpsM != at.half) continue;
      cuda::copy16_async(to + j * kLanes * 16, codes + j * kLanes * 4);
    }
    if (kFormat != Format::kComplex && at.half == 0) load_scales(p, from, at, stage);
  }

  // --- multiplying a stage ----------------------------------------------------------------------

  PYROBUST_DEVICE void set_offsets(float zero, uint32_t (&offset)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) offset[r] = offset_of<kFormat, Act>(r, zero);
  }

  PYROBUST_DEVICE void load_offsets(const uint8_t* stage, const Place& at, int which,
                                    uint32_t (&offset)[8]) {
    const uint8_t* zero =
        stage + S::kZerosAt + at.strip * S::kStripZeros + which * kStrip + at.lane / 4 * kPairRows;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      offset[r] = offset_of<kFormat, Act>(r, static_cast<float>(zero[r]));
    }
  }

  PYROBUST_DEVICE void load_row_scales(const LinearArguments& p, const uint8_t* stage,
                                       const Place& at, int which, float (&scale)[8]) {
    const uint8_t* strip = stage + S::kScalesAt + at.strip * S::kStripScales;
    const int first = which * kStrip + at.lane / 4 * kPairRows;
    if (p.scale_type == FloatType::kFloat32) {
      const cuda::Words4 a = cuda::load16(strip + first * 4),
                         b = cuda::load16(strip + first * 4 + 16);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scale[r] = float_from_bits(a.word[r]);
        scale[r + 4] = float_from_bits(b.word[r]);
      }
      return;
    }
    const cuda::Words4 pairs = cuda::load16(strip + first * 2);
    const bool half = p.scale_type == FloatType::kFloat16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = pairs.word[i];
      scale[2 * i] = half ? cuda::low_f16(pair) : cuda::low_bf16(pair);
      scale[2 * i + 1] = half ? cuda::high_f16(pair) : cuda::high_bf16(pair);
    }
  }

  // sum += scale * part, part = 0.
  PYROBUST_DEVICE void fold(const LinearArguments& p, const uint8_t* stage, const Place& at,
                            int which, Sums& part, Sums& sum) {
    float scale[8];
    load_row_scales(p, stage, at, which, scale);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[0][tile][m][i] =
              fmaf(scale[2 * tile + i / 2], part[0][tile][m][i], sum[0][tile][m][i]);
          part[0][tile][m][i] = 0.0f;
        }
      }
    }
  }

  // Groups along output features: subtracts zeros, multiplies by scales, both one a column.
  PYROBUST_DEVICE void scale_columns(const LinearArguments& p, const uint8_t* stage,
                                     const Place& at, int step, Tiles& a) {
    const uint8_t* scale = stage + S::kScalesAt + at.strip * S::kStripScales;
    const uint8_t* zero = stage + S::kZerosAt + at.strip * S::kStripZeros;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = step * kStepColumns + pair_column(at.lane, h);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int first = (p.two_groups ? which : 0) * kBlock + column;
        const uint32_t factor = *reinterpret_cast<const uint32_t*>(scale + first * 2);
        uint32_t less = 0;
        if (p.zero != nullptr) {
          less = Act::pack(-static_cast<float>(zero[first]), -static_cast<float>(zero[first + 1]));
        }
#pragma unroll
        for (int r = 4 * which; r < 4 * which + 4; ++r) {
          uint32_t& pair = pair_of(a, r, h);
          if (p.zero != nullptr) pair = Act::fma(pair, Act::kOne, less);
          pair = Act::fma(pair, factor, 0x80008000u);  // -0: the product alone
        }
      }
    }
  }

  // The B operands of one step: its rows of x, 16 columns from chunk `chunk` on.
  PYROBUST_DEVICE void load_operands(const uint8_t* stage, const Place& at, int chunk,
                                     uint32_t (&x)[kEights][2]) {
    if constexpr (kEights == 1) {
      cuda::ldmatrix_x2(x[0], stage + activation_offset(at.lane % 8, chunk + at.lane / 8 % 2));
    } else {
#pragma unroll
      for (int m = 0; m < kEights; m += 2) {
        const int row = (at.half * kEights + m) * 8 + at.lane / 16 * 8 + at.lane % 8;
        uint32_t pair[4];
        cuda::ldmatrix_x4(pair, stage + activation_offset(row, chunk + at.lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m + i / 2][i % 2] = pair[i];
      }
    }
  }

  PYROBUST_DEVICE void multiply_tiles(const Tiles& a, const uint32_t (&x)[kEights][2],
                                      float (&sum)[4][kEights][4]) {
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) Act::mma(sum[tile][m], a[tile], x[m]);
    }
  }

  // Columns [32 half, 32 half + 32) of the stage onto `sum`.
  PYROBUST_DEVICE void multiply_half(const LinearArguments& p, const uint8_t* stage,
                                     const Place& at, int half, const uint32_t* words,
                                     const uint32_t (&offset)[8], const uint32_t* table,
                                     Sums& sum) {
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; ++step) {
      uint32_t x[kEights][2];
      load_operands(stage, at, 2 * step, x);
      Tiles a;
      if constexpr (kFormat == Format::kComplex) {
        Tiles v;
        complex_step(words + step * S::kBits, a, v);
        multiply_tiles(v, x, sum[S::kSums - 1]);
      } else {
        Decoder<kFormat, Act>::step(words + step * S::kBits, offset, table, a);
        if (kGroupDim == 0) scale_columns(p, stage, at, step, a);
      }
      multiply_tiles(a, x, sum[0]);
    }
  }

  // Vectors [first, last) of the lane's codes into their words.
  PYROBUST_DEVICE void load_words(const uint8_t* stage, const Place& at, int first, int last,
                                  uint32_t (&words)[kSteps * S::kBits]) {
    const uint8_t* codes = stage + S::kCodesAt + at.strip * S::kStripCodes;
#pragma unroll
    for (int j = first; j < last; ++j) {
      const cuda::Words4 vector = cuda::load16(codes + (j * kLanes + at.lane) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * j + i] = vector.word[i];
    }
  }

  // One unit. `begins`: a group begins with it; `ends`: a group, or this block's part of it, ends.
  PYROBUST_DEVICE void multiply(const LinearArguments& p, const uint8_t* stage, const Place& at,
                                bool begins, bool ends, const uint32_t* table,
                                uint32_t (&offset)[8], Sums& part, Sums& sum) {
    uint32_t words[kSteps * S::kBits];
    constexpr int kFirst = (S::kBits + 1) / 2;  // vectors that the first half of the columns needs
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_words(stage, at, half == 0 ? 0 : kFirst, half == 0 ? kFirst : S::kBits, words);
      if constexpr (kGroupDim == 1) {
        const int which = p.two_groups ? half : 0;
        if (p.zero != nullptr && (p.two_groups || (half == 0 && begins))) {
          load_offsets(stage, at, which, offset);
        }
        multiply_half(p, stage, at, half, words, offset, table, part);
        if (p.two_groups || (half == 1 && ends)) fold(p, stage, at, which, part, sum);
      } else {
        multiply_half(p, stage, at, half, words, offset, table, sum);
      }
    }
  }

  // --- results ----------------------------------------------------------------------------------

  PYROBUST_DEVICE float* slot(const LinearArguments& p, int64_t index) {
    return p.partials + index * S::kSums * kTileStrips * kStrip * kRows + threadIdx.x * 4;
  }

  PYROBUST_DEVICE void store_part(const LinearArguments& p, int64_t index, const Sums& sum) {
    float* to = slot(p, index);
#pragma unroll
    for (int i = 0; i < S::kSums * 4 * kEights; ++i) {
      const float* v = sum[i / (4 * kEights)][i / kEights % 4][i % kEights];
      cuda::store16(to + i * S::kThreads * 4, {{bits_of_float(v[0]), bits_of_float(v[1]),
                                                bits_of_float(v[2]), bits_of_float(v[3])}});
    }
  }

  PYROBUST_DEVICE void add_part(const LinearArguments& p, int64_t index, Sums& sum) {
    const float* from = slot(p, index);
#pragma unroll
    for (int i = 0; i < S::kSums * 4 * kEights; ++i) {
      const cuda::Words4 v = cuda::load16(from + i * S::kThreads * 4);
      float* to = sum[i / (4 * kEights)][i / kEights % 4][i % kEights];
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] += float_from_bits(v.word[j]);
      if (i % 8 == 7) cuda::sync_warp();  // bounds the loads under way, which take registers
    }
  }

  PYROBUST_DEVICE void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < S::kSums * 16 * kEights; ++i) {
      sum[i / (16 * kEights)][i / (4 * kEights) % 4][i / 4 % kEights][i % 4] = 0.0f;
    }
  }

  // The remainder's part of row n of W, for this lane's rows of x.
  PYROBUST_DEVICE void add_remainder(const LinearArguments& p, int64_t n, int first,
                                     float (&extra)[kEights][2]) {
    const Remainder& s = p.remainder;
    const int64_t begin = s.offsets[n] < 0 ? 0 : s.offsets[n];
    const int64_t end = s.offsets[n + 1] > s.count ? s.count : s.offsets[n + 1];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = s.columns[i];
      if (k < 0 || k >= p.cols) continue;
      const float value = load_float(s.values, i, s.type);
#pragma unroll
      for (int m = 0; m < 2 * kEights; ++m) {
        const int row = first + m / 2 * 8 + m % 2;
        if (row >= p.count) continue;
        const float x = load_float(p.x, row * p.cols + k, Act::kType);
        extra[m / 2][m % 2] = fmaf(value, x, extra[m / 2][m % 2]);
      }
    }
  }

  // Results of pairs r: row n of W, this lane's rows of x from `first` on.
  PYROBUST_DEVICE void store_row(const LinearArguments& p, int64_t n, int r, int first, float alpha,
                                 const Sums& sum) {
    const float factor = p.row_scale != nullptr ? alpha * p.row_scale[n] : alpha;
    const float bias = p.bias != nullptr ? p.bias[n] : 0.0f;
    float extra[kEights][2] = {};
    if (p.remainder.offsets != nullptr) add_remainder(p, n, first, extra);
#pragma unroll
    for (int m = 0; m < 2 * kEights; ++m) {
      const int64_t row = first + m / 2 * 8 + m % 2;
      if (row >= p.count) continue;
      const int i = 2 * (r % 2) + m % 2;
      if constexpr (kFormat == Format::kComplex) {
        p.sums[row * p.rows + n] = static_cast<int32_t>(0.5f * sum[0][r / 2][m / 2][i]);
        p.sums[(p.count + row) * p.rows + n] =
            static_cast<int32_t>(0.5f * sum[S::kSums - 1][r / 2][m / 2][i]);
      } else {
        const float value = fmaf(sum[0][r / 2][m / 2][i], factor, extra[m / 2][m % 2]) + bias;
        store_float(p.out, row * p.rows + n, p.out_type, value);
      }
    }
  }

  PYROBUST_DEVICE void store_results(const LinearArguments& p, int64_t tile, const Place& at,
                                     const Sums& sum) {
    const int first = at.half * kEights * 8 + 2 * (at.lane % 4);
    const float alpha = p.alpha != nullptr ? *p.alpha : 1.0f;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int64_t n = (tile * kTileStrips + at.strip) * kStrip + pair_row(at.lane, r);
      if (n < p.rows) store_row(p, n, r, first, alpha, sum);
      cuda::sync_warp();  // one row's addresses at a time, which take registers
    }
  }

  // The end of this block's part of a tile. Leaves the sums cleared.
  PYROBUST_DEVICE void finish(const LinearArguments& p, int64_t tile, const Place& at, Sums& sum) {
    const Schedule& s = p.schedule;
    const int64_t who = blockIdx.x, first = first_worker(s, tile), last = last_worker(s, tile);
    bool complete = first == last;
    if (!complete) {
      store_part(p, slot_of(s, who, tile), sum);
      auto* ticket = reinterpret_cast<int32_t*>(cuda::shared_memory() + S::kTicketAt);
      complete = cuda::arrive(p.arrivals + tile, ticket) == last - first;
      if (complete) {
        clear(sum);
        for (int64_t part = first; part <= last; ++part) add_part(p, slot_of(s, part, tile), sum);
      }
    }
    if (complete) store_results(p, tile, at, sum);
    clear(sum);
  }

  // --- the whole --------------------------------------------------------------------------------

  PYROBUST_DEVICE const uint32_t* make_table(const LinearArguments& p, uint8_t* shared) {
    auto* table = reinterpret_cast<uint32_t*>(shared + S::kTableAt);
    if constexpr (kFormat == Format::kCodebook) fill_table(p, table);
    return table;
  }

  PYROBUST_DEVICE void fill_table(const LinearArguments& p, uint32_t* table) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += S::kThreads) {
      const int low = i % 16 < p.levels ? i % 16 : 0, high = i / 16 < p.levels ? i / 16 : 0;
      table[i] =
          Act::pack(static_cast<float>(p.codebook[low]), static_cast<float>(p.codebook[high]));
    }
  }

  PYROBUST_DEVICE void run(const LinearArguments& p) {
    const int64_t begin = first_unit(p.schedule, blockIdx.x);
    const int64_t end = last_unit(p.schedule, blockIdx.x);
    uint8_t* shared = cuda::shared_memory();
    const uint32_t* table = make_table(p, shared);
    const Place at = place();
    Loader loader = make_loader(p, at, begin);
    int left = static_cast<int>(end - begin);
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (i < left) load(p, loader, at, shared + i * S::kStageBytes);
      advance_loader(p, at, &loader);
      cuda::commit_copies();
    }
    Sums sum, part;
    clear(sum);
    clear(part);
    uint32_t offset[8];
    set_offsets(kGroupDim == 0 && p.zero != nullptr ? 0.0f : p.symmetric_zero, offset);
    Unit unit = unit_at(p, begin);
    bool begins = true;
    int stage = 0, free = (S::kStages - 1) * S::kStageBytes;  // offsets in shared memory
    for (; left > 0; --left) {
      cuda::wait_copies<S::kStages - 2 + kLate>();
      cuda::sync_threads();
      if (left >= S::kStages) load(p, loader, at, shared + free);
      advance_loader(p, at, &loader);
      cuda::commit_copies();
      const bool leaves = unit.block == static_cast<int>(p.schedule.blocks) - 1 || left == 1;
      const bool ends = leaves || unit.within == p.group_span - 1;
      if (!idle(p, unit, at)) {
        multiply(p, shared + stage, at, begins, ends, table, offset, part, sum);
      }
      if (leaves) {
        finish(p, unit.tile, at, sum);
        clear(part);  // it is clear; said again so that it takes no registers in finish()
      }
      begins = ends;
      advance(p, &unit);
      free = stage;
      stage = stage == (S::kStages - 1) * S::kStageBytes ? 0 : stage + S::kStageBytes;
    }
    cuda::wait_copies<0>();
  }
};

template <Format kFormat, class Act, int kRows, int kGroupDim, int kLate = 0>
PYROBUST_KERNEL_OF((Shape<kFormat, kRows>::kThreads), (Shape<kFormat, kRows>::kBlocksPerSm))
packed_linear_kernel(LinearArguments p) {
  Linear<kFormat, Act, kRows, kGroupDim, kLate>::run(p);
}

// --- launching ----------------------------------------------------------------------------------

template <Format kFormat, class Act, int kRows, int kGroupDim>
cuda::Status start(const LinearArguments& p, cuda::Stream stream) {
  using S = Shape<kFormat, kRows>;
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(thread_blocks_of(p.schedule));
  shape.threads = S::kThreads;
  shape.shared_bytes = S::kSharedBytes;
  return cuda::launch(packed_linear_kernel<kFormat, Act, kRows, kGroupDim>, shape, stream, p);
}

template <Format kFormat, class Act, int kGroupDim>
cuda::Status start_rows(const LinearArguments& p, cuda::Stream stream) {
  switch (instance_rows(kFormat, kGroupDim, p.count)) {
    case 8:
      if constexpr (instance_rows(kFormat, kGroupDim, 8) == 8) {
        return start<kFormat, Act, 8, kGroupDim>(p, stream);
      }
      break;
    case 16:
      return start<kFormat, Act, 16, kGroupDim>(p, stream);
    case 32:
      if constexpr (instance_rows(kFormat, kGroupDim, 32) == 32) {
        return start<kFormat, Act, 32, kGroupDim>(p, stream);
      }
      break;
  }
  return start<kFormat, Act, 64, kGroupDim>(p, stream);
}

// The instances of one width: two types of x, two directions of groups, two to four sizes of M.
template <Format kFormat>
cuda::Status start_format(const LinearArguments& p, cuda::Stream stream) {
  if (p.x_type == FloatType::kFloat16) {
    return p.group_dim == 1 ? start_rows<kFormat, Float16, 1>(p, stream)
                            : start_rows<kFormat, Float16, 0>(p, stream);
  }
  return p.group_dim == 1 ? start_rows<kFormat, BFloat16, 1>(p, stream)
                          : start_rows<kFormat, BFloat16, 0>(p, stream);
}

}  // namespace pyrobust::matmul::gpu
