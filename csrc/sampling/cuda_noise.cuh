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

// Of one block, all that a multiprocessor is to hold: its warps take the items of the block one
// after another, so that they end together. Normals get 128 registers a thread, so that table
// look-ups are under way while others are used; the rest 96.
constexpr int noise_threads(Noise noise) { return noise == Noise::kGaussian ? 512 : 640; }

// `at.samples` samples, which share the high words of their numbers (samples_together); an image
// has `rows` in `out`.
struct NoiseWork {
  NoiseItems items;
  Positions at;
  int64_t rows;
  int64_t step;  // bytes from a sample of an item to the next
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

// What variates need besides their bits, and what tells whether one of a sample's must be redrawn.
template <Noise kNoise>
struct Variator {
  // Normals are drawn 2^kLift times too large, uniform numbers 2^31 times, and multiplied by a
  // scale that much too small, which is exact but where it is below the least normal number: there
  // all values are mended.
  static constexpr float kScale = kNoise == Noise::kGaussian  ? kLiftDown
                                  : kNoise == Noise::kUniform ? kUniformStep
                                                              : 1.0f;
  static constexpr float kLeastScale = kScale < 1.0f ? 1.17549435e-38f : 0.0f;
  cuda::SharedPlace rows;  // of normals
  const Tables& tables;
  uint32_t one;
  uint32_t joined;

  __device__ __forceinline__ void begin() { joined = kNoise == Noise::kGaussian ? kSettledBit : 0; }

  template <int kCount>
  __device__ __forceinline__ void draw(const uint32_t (&bits)[kCount], float (&value)[kCount]) {
    if (kNoise == Noise::kGaussian) {
      lifted_normals(rows, bits, value, &joined);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = kNoise == Noise::kUniform ? static_cast<float>(static_cast<int32_t>(bits[i]))
                                           : laplace_of(tables.laplace, bits[i], one, &joined);
    }
  }

  // A bit more for a sample.
  __device__ __forceinline__ uint32_t note(uint32_t record) const {
    if (kNoise == Noise::kUniform) return 0;
    if (kNoise == Noise::kGaussian) return record * 2 + joined;
    return static_cast<uint32_t>((uint64_t{record} << 32 | joined) >> 31);
  }

  // Of `samples` noted, a bit for each to be mended, the last sample's the lowest.
  static __device__ __forceinline__ uint32_t pending(uint32_t record, int samples) {
    const uint32_t of_all = (1u << samples) - 1;
    return (kNoise == Noise::kGaussian ? ~(record / kSettledBit) : record) & of_all;
  }
};
static_assert((kSettledBit << kLongestRun) != 0 && kLongestRun < 32, "a record of a run");

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

// What a lane keeps of its quad over a run of samples.
struct Quad {
  float x[4][4];
  PhiloxBlock blocks[4];
  float scale;  // times Variator::kScale
  uint32_t image;
  int64_t left;  // elements of the image from its first one on
};

template <Noise kNoise>
PYROBUST_DEVICE Quad load_quad(const NoiseWork& work, const NoiseItem& item) {
  const Stream stream = {work.at.seed, work.at.first_sample + item.first_sample,
                         work.at.first_index + item.image};
  const int64_t element = element_of_quad(item.quad);
  const float* x = work.x + item.image * work.at.elements + element;
  Quad quad;
  quad.scale = work.scale[item.image] * Variator<kNoise>::kScale;
  quad.image = static_cast<uint32_t>(stream.image);
  quad.left = work.at.elements - element;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cuda::Words4 four = {{0, 0, 0, 0}};
    if (i * kLanes < quad.left) four = cuda::load16(x + i * kLanes);
#pragma unroll
    for (int j = 0; j < 4; ++j) quad.x[i][j] = float_from_bits(four.word[j]);
    const uint32_t block = block_of_quad(item.quad) + static_cast<uint32_t>(i);
    const PhiloxWords counter = stream_counter(stream, block, purpose_of<kNoise>());
    quad.blocks[i] = philox_block(block, quad.image, counter.word[3], work.keys);
  }
  return quad;
}

// The values of a quad whose word is too small to decide, or all, drawn again with their refinement
// and stored over the provisional ones. Once in 2^13 values.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void mend_quad(const NoiseWork& work, const Tables& tables, const NoiseItem& item,
                               int64_t sample, bool all) {
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
      const bool small = kNoise != Noise::kUniform && normal_needs_refinement(words.word[w]);
      if (!(all || small) || at >= work.at.elements) continue;
      const Place place = {block, w};
      const uint32_t word = words.word[w];
      const float z = kNoise == Noise::kGaussian  ? normal_at(tables.normal, stream, place, word)
                      : kNoise == Noise::kUniform ? uniform_from_bits(word)
                                                  : laplace_at(tables.laplace, stream, place, word);
      store_float(work.out, out_row + at, kOut, work.x[x_row + at] + work.scale[item.image] * z);
    }
  }
}

// `most` samples of an item, of which the last `lack` are not stored, and no element past the end;
// of kWhole items all are. What variator.note made of them.
template <Noise kNoise, FloatType kOut, bool kWhole>
PYROBUST_DEVICE uint32_t draw_samples(const NoiseWork& work, const Quad& quad,
                                      Variator<kNoise> variator, uint8_t* out, uint32_t sample,
                                      int most, int lack) {
  const int left = static_cast<int>(quad.left < kTile ? quad.left : kTile);
  uint32_t record = 0;
#pragma unroll 1
  for (int ahead = most; ahead > 0; --ahead) {
    const PhiloxSample begun = philox_sample(sample, quad.image, work.keys);
    PhiloxWords words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = philox4x32(quad.blocks[i], begun, work.keys);
    const int present = kWhole || ahead > lack ? left : 0;
    variator.begin();
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = words[i].word[w];
      float value[4];
      variator.draw(bits, value);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = quad.x[w][i] + quad.scale * value[i];
      const int at = w * static_cast<int>(kLanes);
      if (kWhole || at < present) store_vector<kOut>(out, at, vector_of<kOut>(value));
    }
    record = variator.note(record);
    sample += static_cast<uint32_t>(work.items.runs);
    out += work.step;
  }
  return record;
}

// All lanes of a warp draw `most` samples; those that are not `present` store nothing.
template <Noise kNoise, FloatType kOut>
PYROBUST_DEVICE void noise_of_item(const NoiseWork& work, const Variator<kNoise>& variator,
                                   const NoiseItem& item, bool present) {
  const Quad quad = load_quad<kNoise>(work, item);
  const auto samples = present ? static_cast<int>(samples_of(work.items, item.first_sample)) : 0;
  const int most = static_cast<int>(work.items.most), lack = most - samples;
  const int64_t first = (item.image * work.rows + item.first_sample) * work.at.elements;
  constexpr int64_t kBytes = kOut == FloatType::kFloat32 ? 4 : 2;
  uint8_t* out = static_cast<uint8_t*>(work.out) + (first + element_of_quad(item.quad)) * kBytes;
  const auto sample = static_cast<uint32_t>(work.at.first_sample + item.first_sample);
  const bool whole = lack == 0 && quad.left > kTile - kLanes;
  const uint32_t record =
      cuda::ballot(whole) == 0xffffffffu
          ? draw_samples<kNoise, kOut, true>(work, quad, variator, out, sample, most, lack)
          : draw_samples<kNoise, kOut, false>(work, quad, variator, out, sample, most, lack);
  uint32_t pending = Variator<kNoise>::pending(record, most);
  const float size = quad.scale < 0.0f ? -quad.scale : quad.scale;
  const bool all = size < Variator<kNoise>::kLeastScale && work.scale[item.image] != 0.0f;
  if (all) pending = (1u << most) - 1;
  pending = pending >> lack << lack;
#pragma unroll 1
  while (pending != 0) {
    const int64_t index = most - 1 - cuda::lowest_bit(pending);
    pending &= pending - 1;
    const int64_t own = item.first_sample + index * work.items.runs;
    mend_quad<kNoise, kOut>(work, variator.tables, item, own, all);
  }
}

constexpr size_t kNoiseShared = 16;  // at the beginning of shared memory, before rows of normals
static_assert(kNoiseShared <= kFirstRowAt, "the count of items taken");

template <Noise kNoise, FloatType kOut>
PYROBUST_KERNEL(noise_threads(kNoise))
noise_kernel(const __grid_constant__ NoiseWork work, const __grid_constant__ Tables tables) {
  auto* taken = reinterpret_cast<int32_t*>(cuda::shared_memory());  // of 32 items, by this block
  if (threadIdx.x == 0) *taken = 0;
  Variator<kNoise> variator = {{}, tables, work.one, 0};
  if (kNoise == Noise::kGaussian) {
    variator.rows = fill_normal(tables.normal, cuda::shared_memory());
  } else {
    cuda::sync_threads();
  }
  const int64_t count = count_of(work.items), lane = threadIdx.x % 32;
#pragma unroll 1
  while (true) {
    int32_t turn = lane == 0 ? cuda::atomic_add(taken, 1) : 0;
    turn = cuda::shuffle(turn, 0);
    const int64_t first = (int64_t{turn} * gridDim.x + blockIdx.x) * 32;
    if (first >= count) break;
    const int64_t index = first + lane;
    const bool present = index < count;
    const NoiseItem item = noise_item(work.items, present ? index : count - 1);
    noise_of_item<kNoise, kOut>(work, variator, item, present);
  }
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
