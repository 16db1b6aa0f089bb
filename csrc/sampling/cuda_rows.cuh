// The distributions without a rate to keep: split Gaussians, coins, grid noise and choices, and
// noise for inputs whose rows do not begin on vector borders. One counter, four elements, a thread.
#pragma once

#include "cuda/primitives.h"
#include "sampling/cuda_items.h"
#include "sampling/cuda_variates.cuh"
#include "sampling/sampling.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

constexpr int kRowThreads = 256;

// What a distribution gets to know of one element.
struct Element {
  Stream stream;
  Place place;
  uint32_t bits;
  int64_t from;   // index into x
  int64_t to;     // index into out
  int64_t index;  // within its row
  int64_t image;
};

// The tables, wherever they are.
struct Variates {
  const Tables& tables;
  cuda::SharedPlace shared;
};

// Each distribution: kNormals (whether it looks normals up), purpose() of its random words.
struct OddNoise {
  static constexpr bool kNormals = true;
  NoiseCall call;
  __device__ __forceinline__ uint32_t purpose() const {
    return call.noise == Noise::kGaussian  ? kPurposeNormal
           : call.noise == Noise::kUniform ? kPurposeUniform
                                           : kPurposeLaplace;
  }
  __device__ __forceinline__ void operator()(const Variates& variates, const Element& e) const {
    float z;
    if (call.noise == Noise::kGaussian) {
      z = normal_here(variates.shared, variates.tables.normal, e.stream, e.place, e.bits);
    } else if (call.noise == Noise::kUniform) {
      z = uniform_from_bits(e.bits);
    } else {
      z = laplace_at(variates.tables.laplace, e.stream, e.place, e.bits);
    }
    const float value = call.x[e.from] + call.scale[e.image] * z;
    store_float(call.out, e.to, call.out_type, value);
  }
};

struct Split {
  static constexpr bool kNormals = true;
  __device__ __forceinline__ static uint32_t purpose() { return kPurposeNormal; }
  SplitCall call;
  __device__ __forceinline__ void operator()(const Variates& variates, const Element& e) const {
    const float z = normal_here(variates.shared, variates.tables.normal, e.stream, e.place, e.bits);
    const float x = call.x[e.from];
    const bool left = call.mask[e.index] != 0;
    call.left[e.to] = left ? x + call.scale_left * z : 0.0f;
    call.right[e.to] = left ? 0.0f : x + call.scale_right * z;
  }
};

struct Keep {
  static constexpr bool kNormals = false;
  __device__ __forceinline__ static uint32_t purpose() { return kPurposeKeep; }
  KeepCall call;
  __device__ __forceinline__ void operator()(const Variates&, const Element& e) const {
    const bool kept = keep_at(e.stream, e.place, call.keep, e.bits);
    store_float(call.out, e.to, call.out_type, kept ? call.x[e.from] : call.fill);
  }
};

struct Grid {
  static constexpr bool kNormals = true;
  __device__ __forceinline__ static uint32_t purpose() { return kPurposeNormal; }
  GridCall call;
  __device__ __forceinline__ void operator()(const Variates& variates, const Element& e) const {
    const int32_t n =
        call.x[e.from] + grid_at(variates.tables.normal, e.stream, e.place, call.table, e.bits);
    if (call.integers) {
      static_cast<int16_t*>(call.out)[e.to] = static_cast<int16_t>(n);
    } else {
      store_float(call.out, e.to, call.out_type, static_cast<float>(n) / call.levels);
    }
  }
};

struct Choice {
  static constexpr bool kNormals = false;
  __device__ __forceinline__ static uint32_t purpose() { return kPurposeChoice; }
  ChoiceCall call;
  int64_t candidates;
  __device__ __forceinline__ void operator()(const Variates&, const Element& e) const {
    const int64_t token = call.tokens[e.from];
    call.out[e.to] = token;
    if (token < 0 || token >= call.lists) return;
    const int64_t first = call.offsets[token], last = call.offsets[token + 1];
    if (first < 0 || last <= first || last > candidates) return;
    const auto count = static_cast<uint32_t>(last - first);
    call.out[e.to] = call.candidates[first + choice_at(e.stream, e.place, count, e.bits)];
  }
};

template <class Distribution>
PYROBUST_KERNEL(kRowThreads)
rows_kernel(const __grid_constant__ Distribution distribution, int64_t channels,
            const __grid_constant__ Tables tables) {
  Variates variates = {tables, {}};
  if (Distribution::kNormals) {
    variates.shared = fill_normal(tables.normal, cuda::shared_memory());
  }
  const Positions& at = distribution.call.at;
  const int64_t blocks = tiles_of(at.elements) * kLanes;
  const int64_t count = at.images * at.samples * channels * blocks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < count;
       i += step) {
    const RowItem item = row_item(i, at.samples, channels, blocks);
    const Stream stream = {at.seed, at.first_sample + item.sample, at.first_index + item.image};
    const auto block = static_cast<uint32_t>(item.block);
    const PhiloxWords words =
        philox4x32(stream_counter(stream, block, distribution.purpose()), at.seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t index = element_of_block(item.block, w);
      if (index >= at.elements) continue;
      const int64_t from = (item.image * channels + item.channel) * at.elements + index;
      distribution(variates, {stream,
                              {block, w},
                              words.word[w],
                              from,
                              item.row * at.elements + index,
                              index,
                              item.image});
    }
  }
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
