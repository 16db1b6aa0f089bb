// Gaussian, uniform and Laplace noise for inputs of 4 k elements, so that rows begin on vector
// borders: x in registers, sixteen values a thread and sample. Other inputs: cuda_rows.cuh.
#pragma once

#include "cuda/primitives.h"
#include "sampling/cuda_items.h"
#include "sampling/cuda_variates.cuh"
#include "sampling/sampling.h"

namespace pyrobust {
namespace sampling {
namespace gpu {

constexpr int kNoiseThreads = 256;

struct NoiseWork {
  NoiseItems items;
  Positions at;
  const float* x;
  const float* scale;
  void* out;
  PhiloxKeys keys;  // of at.seed: operands of the instructions that use them
};

template <Noise kNoise>
PYROBUST_DEVICE constexpr uint32_t purpose_of() {
  return kNoise == Noise::kGaussian  ? kPurposeNormal
         : kNoise == Noise::kUniform ? kPurposeUniform
                                     : kPurposeLaplace;
}

// The variate of bits that need no refinement.
template <Noise kNoise>
PYROBUST_DEVICE float variate(const NormalRow* shared, const Tables& tables, uint32_t bits) {
  if (kNoise == Noise::kGaussian) return normal_by_table(shared, bits);
  if (kNoise == Noise::kUniform) return uniform_from_bits(bits);
  return laplace_from_bits(tables.laplace, bits);
}

template <FloatType kOut>
PYROBUST_DEVICE void store_four(void* out, int64_t index, const float (&v)[4]) {
  if (kOut == FloatType::kFloat32) {
    cuda::store16(static_cast<float*>(out) + index, {{bits_of_float(v[0]), bits_of_float(v[1]),
                                                      bits_of_float(v[2]), bits_of_float(v[3])}});
  } else if (kOut == FloatType::kFloat16) {
    cuda::store8(static_cast<uint16_t*>(out) + index,
                 {{cuda::pack_f16x2(v[0], v[1]), cuda::pack_f16x2(v[2], v[3])}});
  } else {
    cuda::store8(static_cast<uint16_t*>(out) + index,
                 {{cuda::pack_bf16x2(v[0], v[1]), cuda::pack_bf16x2(v[2], v[3])}});
  }
}

PYROBUST_DEVICE void load_quad(const NoiseWork& work, int64_t row, int64_t element,
                               float (&x)[4][4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int64_t at = element + w * kLanes;
    cuda::Words4 four = {{0, 0, 0, 0}};
    if (at < work.at.elements) four = cuda::load16(work.x + row + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[w][i] = float_from_bits(four.word[i]);
  }
}

// The values of a quad whose word is too small to decide, drawn again with their refinement and
// stored over the provisional ones. Once in 2^13 values; not inlined into the loop's registers.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void mend_quad(const NoiseWork& work, const Tables& tables, const Stream& stream,
                               int64_t x_row, int64_t out_row, int64_t quad, float scale) {
  const int64_t element = element_of_quad(quad);
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const uint32_t block = block_of_quad(quad) + static_cast<uint32_t>(i);
    const PhiloxWords words =
        philox4x32(stream_counter(stream, block, purpose_of<kNoise>()), stream.seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t at = element + w * kLanes + i;
      if (!normal_needs_refinement(words.word[w]) || at >= work.at.elements) continue;
      const Place place = {block, w};
      const float z = kNoise == Noise::kGaussian
                          ? normal_at(tables.normal, stream, place, words.word[w])
                          : laplace_at(tables.laplace, stream, place, words.word[w]);
      store_float(work.out, out_row + at, kOut, work.x[x_row + at] + scale * z);
    }
  }
}

template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void noise_of_item(const NoiseWork& work, const Tables& tables,
                                   const NormalRow* shared, const NoiseItem& item) {
  const int64_t element = element_of_quad(item.quad);
  const int64_t x_row = item.image * work.at.elements;
  const float scale = work.scale[item.image];
  float x[4][4];
  load_quad(work, x_row, element, x);
  for (int64_t sample = item.first_sample; sample < item.last_sample; ++sample) {
    const Stream stream = {work.at.seed, work.at.first_sample + sample,
                           work.at.first_index + item.image};
    PhiloxWords words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t block = block_of_quad(item.quad) + static_cast<uint32_t>(i);
      words[i] = philox4x32(stream_counter(stream, block, purpose_of<kNoise>()), work.keys);
    }
    const int64_t out_row = (item.image * work.at.samples + sample) * work.at.elements;
    bool mend = false;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = words[i].word[w];
        v[i] = x[w][i] + scale * variate<kNoise>(shared, tables, bits);
        if (kNoise != Noise::kUniform) mend = mend | normal_needs_refinement(bits);
      }
      const int64_t at = element + w * kLanes;
      if (at < work.at.elements) store_four<kOut>(work.out, out_row + at, v);
    }
    if (kNoise != Noise::kUniform && mend) {
      mend_quad<kNoise, kOut>(work, tables, stream, x_row, out_row, item.quad, scale);
    }
  }
}

template <Noise kNoise, FloatType kOut>
PYROBUST_KERNEL(kNoiseThreads)
noise_kernel(const __grid_constant__ NoiseWork work, const __grid_constant__ Tables tables) {
  const NormalRow* shared = nullptr;
  if (kNoise == Noise::kGaussian) shared = fill_normal(tables.normal, cuda::shared_memory());
  const int64_t count = count_of(work.items);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kNoiseThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x; i < count;
       i += step) {
    noise_of_item<kNoise, kOut>(work, tables, shared, noise_item(work.items, i));
  }
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
