// Both sums of a block's rows of W for up to 64 inputs on the tensor cores of warpgroups (compute
// capability 9.0): each warpgroup multiplies 64 rows, W from registers and |W| as the same
// registers without signs, with images of the inputs (cuda_layout.h) that all warpgroups of a block
// share. Blocks that take parts of the terms of the same outputs leave their sums in memory; the
// last one to come adds them up, always in the same order.
#pragma once

#include "interval/cuda_product.cuh"
#include "interval/cuda_wide.h"

namespace pyrobust {
namespace interval {
namespace gpu {

// kEights: of the inputs of a block.
template <class Source, int kEights_>
struct WideShape {
  static constexpr int kEights = kEights_, kInputs = 8 * kEights;
  static constexpr bool kDense = Source::kBits == 0;
  static constexpr int kGroups = wide_groups(kDense, kInputs);
  static constexpr int kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kImages = wide_images(kDense);         // of a stage
  static constexpr int kChunks = kDense ? 8 : Source::kBits;  // of a row and stage
  static constexpr int kImageBytes = image_bytes(kInputs), kPlaneBytes = plane_bytes(kInputs);
  static constexpr int kInputBytes = kImages * kImageBytes;
  static constexpr int kStageBytes = kInputBytes + kRows * kChunks * 16;
  static constexpr int kFit = 226 * 1024 / kStageBytes, kMostStages = 6;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kTicketAt = kStages * kStageBytes;
  static constexpr size_t kShared = kTicketAt + 16;
  static_assert(kStages >= 3 && kStageBytes % 1024 == 0, "aligned images, two stages under way");
};

template <class Source>
struct WideWork : ProductWork<Source> {
  float* partials;    // 8 kEights floats a thread
  int32_t* counters;  // of blocks that have come, one for each set of outputs
};

// The sums of a thread: rows g and g + 8 of its warp's 16, inputs 8 m + 2 t and the next.
template <int kEights>
struct WideSums {
  float centre[kEights][4], radius[kEights][4];
};

template <class Source, int kEights>
struct WideBlock {
  using S = WideShape<Source, kEights>;
  int64_t outputs;  // index of the set of outputs
  int64_t row, first;
  int part, present;

  static __device__ __forceinline__ WideBlock of(const WideWork<Source>& work) {
    const int64_t groups = (work.batch + S::kInputs - 1) / S::kInputs;
    const int64_t outputs = blockIdx.x / static_cast<unsigned>(work.parts);
    const BlockPlace place = block_place(outputs, groups);
    const int64_t first = place.inputs * S::kInputs, left = work.batch - first;
    return {outputs, place.rows * S::kRows, first,
            static_cast<int>(blockIdx.x % static_cast<unsigned>(work.parts)),
            static_cast<int>(left < S::kInputs ? left : S::kInputs)};
  }

  __device__ __forceinline__ void copy_weights(const WideWork<Source>& work, int64_t unit,
                                               cuda::SharedPlace stage) const {
    constexpr int kAll = S::kRows * S::kChunks;
    constexpr int kCopies = (kAll + S::kThreads - 1) / S::kThreads;
    const int64_t step = S::kDense ? unit / 2 : unit;
    const int before = S::kDense ? static_cast<int>(unit % 2) * S::kChunks : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * S::kThreads + static_cast<int>(threadIdx.x);
      if (kAll % S::kThreads != 0 && index >= kAll) break;
      const int own = index / S::kChunks, chunk = index % S::kChunks;
      const int place = S::kDense ? weight_vector(S::kChunks, own, chunk) : index;
      work.source.copy(stage + S::kInputBytes + place * 16, row + own < work.rows ? row + own : -1,
                       step, before + chunk);
    }
  }

  __device__ __forceinline__ void copy_inputs(const WideWork<Source>& work, int64_t unit,
                                              cuda::SharedPlace stage) const {
    const int64_t images = padded(work.terms, kStep) / kImageTerms;
    const int64_t image = first / S::kInputs * images + unit * S::kImages;
    const uint16_t* from = work.operands + image * (S::kImageBytes / 2);
    constexpr int kAll = S::kInputBytes / 16;
#pragma unroll
    for (int i = 0; i < (kAll + S::kThreads - 1) / S::kThreads; ++i) {
      const int index = i * S::kThreads + static_cast<int>(threadIdx.x);
      if (kAll % S::kThreads != 0 && index >= kAll) break;
      const bool valid = index / 8 % S::kInputs < present;
      cuda::copy16_async_or_zero(stage + index * 16, valid ? from + index * 8 : work.operands,
                                 valid);
    }
  }
};

// Fragments of two eighths, with and without signs: four products of 16 terms.
struct WideFragments {
  uint32_t first[4][4], size[4][4];
};

template <class Source>
PYROBUST_DEVICE typename Source::Lane wide_lane(cuda::SharedPlace weights, int row, int t,
                                                const Factor& factor) {
  if constexpr (Source::kBits == 0) {
    return {weights + row * 128, row % 2 * 4, t};
  } else {
    return Source::lane(weights, row, t, factor);
  }
}

template <class Lane>
PYROBUST_DEVICE void load_fragments(const Lane (&lanes)[2], int eighth, WideFragments* out) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    Eight top, bottom;
    lanes[0].eight(eighth + e, &top);
    lanes[1].eight(eighth + e, &bottom);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      fragment(top.first, bottom.first, s, out->first[2 * e + s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out->size[2 * e + s][i] = out->first[2 * e + s][i] & 0x7fff7fffu;
      }
    }
  }
}

// One image: 64 terms onto the accumulators.
template <int kEights>
PYROBUST_DEVICE void multiply_centre(const WideFragments& a, uint64_t image, bool onto,
                                     float (&centre)[kEights][4]) {
  constexpr auto kPlane = static_cast<uint64_t>(plane_bytes(8 * kEights) / 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t high = image + static_cast<uint64_t>(2 * k);
    cuda::multiply_m64k16_bf16(centre, a.first[k], high, onto || k != 0);
    cuda::multiply_m64k16_bf16(centre, a.first[k], high + kPlane, true);
  }
}

template <int kEights>
PYROBUST_DEVICE void multiply_radius(const WideFragments& a, uint64_t image, bool onto,
                                     float (&radius)[kEights][4]) {
  constexpr auto kPlane = static_cast<uint64_t>(plane_bytes(8 * kEights) / 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    cuda::multiply_m64k16_bf16(radius, a.size[k], image + 2 * kPlane + static_cast<uint64_t>(2 * k),
                               onto || k != 0);
  }
}

template <int kEights>
PYROBUST_DEVICE void add_scaled(const float (&sum)[kEights][4], const Factor (&factors)[2],
                                float (&total)[kEights][4]) {
#pragma unroll
  for (int m = 0; m < kEights; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) total[m][j] += factors[j / 2].scale * sum[m][j];
  }
}

template <int kEights>
PYROBUST_DEVICE void add_plain(const float (&sum)[kEights][4], float (&total)[kEights][4]) {
#pragma unroll
  for (int m = 0; m < kEights; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) total[m][j] += sum[m][j];
  }
}

// A stage. Dense weights: the centre's sum of 64 terms joins its total, the radius goes on in one
// sum. Packed ones: both sums of 128 terms join their totals, times the scale. No branch while
// products are under way: the compiler would wait for every one of them.
template <class Source, int kEights>
PYROBUST_DEVICE void multiply_stage(const uint8_t* stage, const Factor (&factors)[2],
                                    WideSums<kEights>* totals) {
  using S = WideShape<Source, kEights>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  const cuda::SharedPlace weights = cuda::shared_place(stage) + S::kInputBytes;
  const typename Source::Lane lanes[2] = {
      wide_lane<Source>(weights, row, lane % 4, factors[0]),
      wide_lane<Source>(weights, row + 8, lane % 4, factors[1])};
  const uint64_t image = cuda::operand_of(stage);
  float centre[kEights][4], radius[kEights][4];
  WideFragments a;
  load_fragments(lanes, 0, &a);
  cuda::begin_products();
  multiply_centre(a, image, false, centre);
  if (S::kDense) {
    cuda::commit_products();
    multiply_radius(a, image, true, totals->radius);
    cuda::commit_products();
    cuda::finish_products<1>(centre);
    add_plain(centre, totals->centre);
    cuda::finish_products<0>(totals->radius);
    return;
  }
  multiply_radius(a, image, false, radius);
  cuda::commit_products();
  // Of many warps others fill the time, and registers suffice for one set of fragments.
  if (kEights < 8) cuda::finish_products<0>(centre);
  WideFragments b;
  load_fragments(lanes, 2, &b);
  const uint64_t second = image + static_cast<uint64_t>(S::kImageBytes / 16);
  cuda::begin_products();
  multiply_centre(b, second, true, centre);
  cuda::commit_products();
  multiply_radius(b, second, true, radius);
  cuda::commit_products();
  cuda::finish_products<1>(centre);
  add_scaled(centre, factors, totals->centre);
  cuda::finish_products<0>(radius);
  add_scaled(radius, factors, totals->radius);
}

template <class Source, int kEights>
PYROBUST_DEVICE float* wide_partial(const WideWork<Source>& work, int64_t outputs, int part,
                                    int v) {
  constexpr int kThreads = WideShape<Source, kEights>::kThreads;
  return work.partials + (((outputs * work.parts + part) * 2 * kEights + v) * kThreads +
                          static_cast<int>(threadIdx.x)) *
                             4;
}

template <class Source, int kEights>
PYROBUST_DEVICE void store_partials(const WideWork<Source>& work, int64_t outputs, int part,
                                    const WideSums<kEights>& sums) {
#pragma unroll
  for (int v = 0; v < 2 * kEights; ++v) {
    const float (&four)[4] = v < kEights ? sums.centre[v % kEights] : sums.radius[v % kEights];
    cuda::store16(wide_partial<Source, kEights>(work, outputs, part, v),
                  {{bits_of_float(four[0]), bits_of_float(four[1]), bits_of_float(four[2]),
                    bits_of_float(four[3])}});
  }
}

template <class Source, int kEights>
PYROBUST_DEVICE void load_partials(const WideWork<Source>& work, int64_t outputs,
                                   WideSums<kEights>* sums) {
#pragma unroll
  for (int v = 0; v < 2 * kEights; ++v) {
    float (&four)[4] = v < kEights ? sums->centre[v % kEights] : sums->radius[v % kEights];
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = 0.0f;
    for (int part = 0; part < work.parts; ++part) {
      const cuda::Words4 words =
          cuda::load16(wide_partial<Source, kEights>(work, outputs, part, v));
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] += float_from_bits(words.word[j]);
    }
  }
}

template <class Source, int kEights, int kFault>
PYROBUST_DEVICE void run_wide(const WideWork<Source>& work) {
  using S = WideShape<Source, kEights>;
  constexpr int kAhead = S::kStages - 1;
  uint8_t* shared = cuda::shared_memory();
  const cuda::SharedPlace ring = cuda::shared_place(shared);
  const auto block = WideBlock<Source, kEights>::of(work);
  const int64_t units = padded(work.terms, kStep) / (kImageTerms * S::kImages);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = block.row + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  Rotation now =
      rotation_of((units - block.part + work.parts - 1) / work.parts, block.row / S::kRows);
  Rotation ahead = now;
  const auto unit_at = [&](const Rotation& rotation) {
    return block.part + int64_t{rotation.at} * work.parts;
  };
  for (int i = 0; i < kAhead; ++i, advance(&ahead)) {
    if (i < now.count) block.copy_weights(work, unit_at(ahead), ring + i * S::kStageBytes);
  }
  Factor factors[2], next[2];
  const auto load_factors = [&](int64_t step, Factor(&to)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t n = row + 8 * i;
      to[i] = work.source.factor(n < work.rows ? n : work.rows - 1, step);
    }
  };
  load_factors(unit_at(now), factors);
  if (kFault != kEarlyInputs) cuda::await_grid();
  ahead = now;
  for (int i = 0; i < kAhead; ++i, advance(&ahead)) {
    if (i < now.count) block.copy_inputs(work, unit_at(ahead), ring + i * S::kStageBytes);
    cuda::commit_copies();
  }
  WideSums<kEights> totals = {};
  int stage = 0, free = kAhead;
#pragma unroll 1
  for (int i = 0; i < now.count; ++i, advance(&ahead)) {
    cuda::wait_copies<kAhead - 1 + (kFault == kLateCopies ? 1 : 0)>();
    if (kFault != kNoFence) cuda::show_to_products();
    cuda::sync_threads();
    if (i + kAhead < now.count) {
      const cuda::SharedPlace to = ring + free * S::kStageBytes;
      block.copy_weights(work, unit_at(ahead), to);
      block.copy_inputs(work, unit_at(ahead), to);
    }
    cuda::commit_copies();
    next[0] = factors[0], next[1] = factors[1];
    advance(&now);
    if (!S::kDense && i + 1 < now.count) load_factors(unit_at(now), next);
    multiply_stage<Source>(shared + stage * S::kStageBytes, factors, &totals);
    factors[0] = next[0], factors[1] = next[1];
    free = stage;
    stage = stage == kAhead ? 0 : stage + 1;
  }
  cuda::wait_copies<0>();
  if (work.parts > 1) {
    store_partials<Source>(work, block.outputs, block.part, totals);
    auto* ticket = reinterpret_cast<int32_t*>(shared + S::kTicketAt);
    if (cuda::arrive(work.counters + block.outputs, ticket) != work.parts - 1) return;
    load_partials<Source>(work, block.outputs, &totals);
  }
#pragma unroll
  for (int m = 0; m < kEights; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      finish_output(work, row + j / 2 * 8, block.first + 8 * m + lane % 4 * 2 + j % 2,
                    totals.centre[m][j], totals.radius[m][j]);
    }
  }
}

template <class Source, int kEights, int kFault = kNoFault>
PYROBUST_KERNEL_OF((WideShape<Source, kEights>::kThreads), 1)
wide_kernel(const __grid_constant__ WideWork<Source> work) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_wide<Source, kEights, kFault>(work);
#endif
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
