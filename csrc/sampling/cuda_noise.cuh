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

constexpr int kNoiseThreads = 128, kNoiseBlocks = 5;  // of a multiprocessor

// `at.samples` samples, which share the high words of their numbers (samples_together); an image
// has `rows` in `out`.
struct NoiseWork {
  NoiseItems items;
  Positions at;
  int64_t rows;
  const float* x;
  const float* scale;
  void* out;
  PhiloxKeys keys;  // of at.seed: operands of the instructions that use them
  uint32_t one;     // the bits of 1.0
};

template <Noise kNoise>
PYROBUST_DEVICE constexpr uint32_t purpose_of() {
  return kNoise == Noise::kGaussian  ? kPurposeNormal
         : kNoise == Noise::kUniform ? kPurposeUniform
                                     : kPurposeLaplace;
}

// What variates need besides their bits, and whether one of them must be redrawn.
struct Variator {
  cuda::SharedPlace rows;  // of normals
  const Tables& tables;
  uint32_t one;
  uint32_t addresses;  // of all rows so far, joined; only kSettledBit of them

  template <Noise kNoise>
  __device__ __forceinline__ float variate(uint32_t bits) {
    if (kNoise == Noise::kUniform) return uniform_from_bits(bits);
    const Octave octave = octave_of(bits, one);
    if (kNoise == Noise::kLaplace) {
      addresses &= octave.row * kRowBytes + kFirstRowAt;
      return laplace_of(tables.laplace, octave, bits);
    }
    const cuda::SharedPlace row = cuda::place_of_row<kRowShift>(rows, octave.row);
    addresses &= static_cast<uint32_t>(row);
    return normal_by_table(row, octave.s, bits);
  }
};

// Four values of the output type.
template <FloatType kOut>
struct Vector {
  static constexpr int kWords = kOut == FloatType::kFloat32 ? 4 : 2;
  uint32_t word[kWords];
};

template <FloatType kOut>
PYROBUST_DEVICE Vector<kOut> vector_of(const float (&v)[4]) {
  Vector<kOut> out;
#pragma unroll
  for (int i = 0; i < Vector<kOut>::kWords; ++i) {
    if (kOut == FloatType::kFloat32) out.word[i] = bits_of_float(v[i]);
    if (kOut == FloatType::kFloat16) out.word[i] = cuda::pack_f16x2(v[2 * i % 4], v[2 * i % 4 + 1]);
    if (kOut == FloatType::kBFloat16) {
      out.word[i] = cuda::pack_bf16x2(v[2 * i % 4], v[2 * i % 4 + 1]);
    }
  }
  return out;
}

// Words w and w + 1 of the own tile to the own half of both: of lanes with the same counters of
// both tiles the even one keeps the first word and gets that of the odd tile.
template <FloatType kOut>
PYROBUST_DEVICE void exchange(bool odd, Vector<kOut>* first, Vector<kOut>* second) {
#pragma unroll
  for (int i = 0; i < Vector<kOut>::kWords; ++i) {
    const uint32_t a = first->word[i], b = second->word[i];
    const uint32_t got = cuda::shuffle_xor(odd ? a : b, static_cast<int>(kQuadsPerTile));
    first->word[i] = odd ? got : a;
    second->word[i] = odd ? b : got;
  }
}

template <FloatType kOut>
PYROBUST_DEVICE void store_vector(uint8_t* out, int element, const Vector<kOut>& v) {
  constexpr int kLast = Vector<kOut>::kWords - 1;
  if (kOut == FloatType::kFloat32) {
    cuda::store16(out + 4 * element,
                  {{v.word[0], v.word[1], v.word[2 % (kLast + 1)], v.word[kLast]}});
  } else {
    cuda::store8(out + 2 * element, {{v.word[0], v.word[1]}});
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
// stored over the provisional ones. Once in 2^13 values.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void mend_quad(const NoiseWork& work, const Tables& tables, const NoiseItem& item,
                               int64_t sample) {
  const Stream stream = {work.at.seed, work.at.first_sample + sample,
                         work.at.first_index + item.image};
  const int64_t element = element_of_quad(item.quad), x_row = item.image * work.at.elements;
  const int64_t out_row = (item.image * work.rows + sample) * work.at.elements;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const uint32_t block = block_of_quad(item.quad) + static_cast<uint32_t>(i);
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
      store_float(work.out, out_row + at, kOut, work.x[x_row + at] + work.scale[item.image] * z);
    }
  }
}

// The samples of an item; a bit for each that needs no mending, the last sample's the lowest. All
// lanes of a warp draw `most` samples, those with fewer store fewer.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE uint64_t draw_item(const NoiseWork& work, const NoiseItem& item, int samples,
                                   Variator variator) {
  constexpr int64_t kBytes = kOut == FloatType::kFloat32 ? 4 : 2;
  const int64_t stored = stored_by_quad(item.quad), left = work.at.elements - stored;
  const int count = static_cast<int>(left < kPair ? left : kPair);
  const bool odd = (item.quad & kQuadsPerTile) != 0;
  const float scale = work.scale[item.image];
  float x[4][4];
  load_quad(work, item.image * work.at.elements, element_of_quad(item.quad), x);
  const Stream stream = {work.at.seed, work.at.first_sample + item.first_sample,
                         work.at.first_index + item.image};
  const auto image = static_cast<uint32_t>(stream.image);
  PhiloxBlock blocks[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t block = block_of_quad(item.quad) + static_cast<uint32_t>(i);
    const PhiloxWords counter = stream_counter(stream, block, purpose_of<kNoise>());
    blocks[i] = philox_block(block, image, counter.word[3], work.keys);
  }
  const int64_t row = item.image * work.rows + item.first_sample;
  uint8_t* out = static_cast<uint8_t*>(work.out) + (row * work.at.elements + stored) * kBytes;
  const int64_t step = work.items.runs * work.at.elements * kBytes;
  const auto apart = static_cast<uint32_t>(work.items.runs);
  auto sample = static_cast<uint32_t>(stream.sample);
  const int most = static_cast<int>(work.items.most), lack = most - samples;
  uint64_t settled = 0;
#pragma unroll 1
  for (int ahead = most; ahead > 0; --ahead, sample += apart, out += step) {
    const PhiloxSample begun = philox_sample(sample, image, work.keys);
    PhiloxWords words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = philox4x32(blocks[i], begun, work.keys);
    variator.addresses = kSettledBit;
    const int present = ahead > lack ? count : 0;
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      Vector<kOut> vectors[2];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          value[i] = x[w + v][i] + scale * variator.variate<kNoise>(words[i].word[w + v]);
        }
        vectors[v] = vector_of<kOut>(value);
      }
      exchange<kOut>(odd, &vectors[0], &vectors[1]);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int at = store_offset(w + v);
        if (at < present) store_vector<kOut>(out, at, vectors[v]);
      }
    }
    if (kNoise != Noise::kUniform) settled = settled << 1 | variator.addresses / kSettledBit;
  }
  return settled;
}

// All lanes of a warp; those that are not `present` store nothing.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void noise_of_item(const NoiseWork& work, const Tables& tables,
                                   cuda::SharedPlace normals, const NoiseItem& item, bool present) {
  const auto samples = present ? static_cast<int>(samples_of(work.items, item.first_sample)) : 0;
  uint64_t pending = ~draw_item<kNoise, kOut>(work, item, samples, {normals, tables, work.one, 0});
  if (kNoise == Noise::kUniform) return;
  cuda::sync_warp();  // provisional values were stored by other lanes
  for (int64_t last = work.items.most - 1; last >= 0; --last, pending >>= 1) {
    if ((pending & 1) == 0 || last >= samples) continue;
    mend_quad<kNoise, kOut>(work, tables, item, item.first_sample + last * work.items.runs);
  }
}

template <Noise kNoise, FloatType kOut>
PYROBUST_KERNEL_OF(kNoiseThreads, kNoiseBlocks)
noise_kernel(const __grid_constant__ NoiseWork work, const __grid_constant__ Tables tables) {
  cuda::SharedPlace normals = {};
  if (kNoise == Noise::kGaussian) normals = fill_normal(tables.normal, cuda::shared_memory());
  const int64_t count = count_of(work.items);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kNoiseThreads;
  const int64_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x - lane;
       first < count; first += step) {
    // Lanes past the last pair of tiles draw it again.
    const int64_t index = first + lane, pair = lane % kQuadsPerPair;
    const bool present = index < count;
    const NoiseItem item = noise_item(work.items, present ? index : count - kQuadsPerPair + pair);
    noise_of_item<kNoise, kOut>(work, tables, normals, item, present);
  }
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
