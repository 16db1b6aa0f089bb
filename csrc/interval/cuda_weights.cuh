// Weights as fragments: eight terms of one row at a time, as four pairs of bfloat16, from a stage
// in shared memory that holds a step of a block's rows.
#pragma once

#include "core/bit_layout.h"
#include "cuda/primitives.h"
#include "interval/cuda_layout.h"

namespace pyrobust {
namespace interval {
namespace gpu {

// Pairs of eight terms; `second` is what the first bfloat16 of a float32 leaves, rounded again.
struct Eight {
  uint32_t first[4];
  uint32_t second[4];
};

// What a group of codes shares; 1 and nothing of dense weights.
struct Factor {
  float scale = 1.0f;
  uint32_t minus_zero = 0u;  // twice, as bfloat16; of codes of 2 to 4 bits, less 128
};

// Each source: kSecond (whether `second` is used), kBits (0: dense), kOrder (of the terms),
// kChunks (16-byte chunks of a row and step), kRowTiles (of 16 rows, of a warp).
//   copy(place, n, step, chunk)  brings a chunk of row n to shared memory; n < 0: zeros
//   factor(n, step)
//   Lane(stage, row, lane, factor).eight(i, out)  terms 8 i .. 8 i + 7 of the lane's

// Chunks of rows of dense weights. Rows that do not begin on vector borders are read a value at a
// time; an asynchronous copy wants an aligned address even where it only writes zeros.
template <typename T>
struct DenseRows {
  static constexpr int kOfChunk = 16 / static_cast<int>(sizeof(T));
  const T* weight;
  int64_t terms;
  bool vectors;  // rows begin on vector borders

  __device__ __forceinline__ void copy(cuda::SharedPlace place, int64_t n, int64_t step,
                                       int chunk) const {
    const int64_t at = step * kStep + chunk * kOfChunk;
    const T* from = weight + n * terms + at;
    const int64_t left = n < 0 ? 0 : terms - at;
    if (vectors) {
      cuda::copy16_async_or_zero(place, left > 0 ? from : weight, left > 0);
      return;
    }
    cuda::Words4 words = {};
#pragma unroll
    for (int i = 0; i < kOfChunk; ++i) {
      if (i < left) {
        words.word[i * 4 / kOfChunk] |= bits_of(from[i]) << (i * 32 / (kOfChunk / 4) % 32);
      }
    }
    cuda::store16_shared(place, words);
  }
  static __device__ __forceinline__ uint32_t bits_of(uint16_t value) { return value; }
  static __device__ __forceinline__ uint32_t bits_of(float value) { return bits_of_float(value); }

  __device__ __forceinline__ Factor factor(int64_t, int64_t) const { return {}; }
};

struct Float32Source : DenseRows<float> {
  static constexpr bool kSecond = true;
  static constexpr int kBits = 0;
  static constexpr int kOrder = kFloat32Order;
  static constexpr int kChunks = 32;
  static constexpr int kRowTiles = 1;

  struct Lane {
    cuda::SharedPlace row;
    int flip;  // of weight_vector
    int lane;

    __device__ __forceinline__ void eight(int i, Eight* out) const {
      float w[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const cuda::Words4 four =
            cuda::load16_shared(row + (((8 * i + 4 * half) ^ flip) + lane) * 16, 0);
#pragma unroll
        for (int k = 0; k < 4; ++k) w[4 * half + k] = float_from_bits(four.word[k]);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t pair = cuda::pack_bf16x2(w[2 * p], w[2 * p + 1]);
        out->first[p] = pair;
        out->second[p] = cuda::pack_bf16x2(w[2 * p] - cuda::low_bf16(pair),
                                           w[2 * p + 1] - cuda::high_bf16(pair));
      }
    }
  };
  static __device__ __forceinline__ Lane lane(cuda::SharedPlace stage, int row, int lane,
                                              const Factor&) {
    return {stage + row * kChunks * 16, row % 2 * 4, lane};
  }
};

struct BFloat16Source : DenseRows<uint16_t> {
  static constexpr bool kSecond = false;
  static constexpr int kBits = 0;
  static constexpr int kOrder = kBFloat16Order;
  static constexpr int kChunks = 16;
  static constexpr int kRowTiles = 2;

  struct Lane {
    cuda::SharedPlace row;
    int flip;
    int lane;

    __device__ __forceinline__ void eight(int i, Eight* out) const {
      const cuda::Words4 words = cuda::load16_shared(row + (((4 * i) ^ flip) + lane) * 16, 0);
#pragma unroll
      for (int p = 0; p < 4; ++p) out->first[p] = words.word[p];
    }
  };
  static __device__ __forceinline__ Lane lane(cuda::SharedPlace stage, int row, int lane,
                                              const Factor&) {
    return {stage + row * kChunks * 16, row % 2 * 4, lane};
  }
};

// The canonical layout of core/bit_layout.h as it is: a lane's 32 codes are kBits_ whole words.
template <int kBits_>
struct PackedSource {
  static constexpr bool kSecond = false;
  static constexpr int kBits = kBits_;
  static constexpr int kOrder = kBits_;
  static constexpr int kChunks = kBits_;
  static constexpr int kRowTiles = 2;
  const uint8_t* codes;
  int64_t row_bytes;
  const void* scales;
  FloatType scale_type;
  const uint8_t* zeros;
  int64_t groups;  // of a row
  int64_t steps_a_group;

  struct Lane {
    uint32_t word[kBits_];
    uint32_t minus_zero;

    // word[first + i] for i in 0 .. 3, by selection, so that i need not be known.
    template <int kStride>
    __device__ __forceinline__ uint32_t pick(int first, int i) const {
      const uint32_t low = i == 0 ? word[first] : word[(first + kStride) % kBits_];
      const uint32_t high =
          i == 2 ? word[(first + 2 * kStride) % kBits_] : word[(first + 3 * kStride) % kBits_];
      return i < 2 ? low : high;
    }
    // The bits of eight terms: pair q of them is at pair_of(bits, q).
    struct Bits {
      uint32_t word[2];
    };
    __device__ __forceinline__ Bits bits_of_eight(int i) const {
      if (kBits_ == 8) return {{pick<2>(0, i), pick<2>(1, i)}};
      if (kBits_ == 4) return {{pick<1>(0, i), 0}};
      if (kBits_ == 2) return {{(i < 2 ? word[0] : word[1 % kBits_]) >> (i % 2 * 8), 0}};
      if (kBits_ == 1) return {{word[0] >> (i * 4), 0}};
      // 24 of 96 bits, from bit 24 i on
      const uint32_t low = i < 2 ? word[0] : word[1 % kBits_],
                     high = i < 2 ? word[1 % kBits_] : word[2 % kBits_];
      const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
      if (i == 3) return {{high >> 8, 0}};
      return {{static_cast<uint32_t>(both >> (i == 0 ? 0 : i == 1 ? 24 : 16)), 0}};
    }
    // Two codes of the order of place_of_term, as integers in the halves of a word.
    __device__ __forceinline__ uint32_t pair_of(const Bits& bits, int q) const {
      constexpr uint32_t kMask = ((1u << kBits_) - 1) * 0x10001u;
      if (kBits_ == 3)
        return (bits.word[0] >> (6 * q) & 7u) | (bits.word[0] >> (6 * q + 3) & 7u) << 16;
      if (kBits_ == 8) return bits.word[q / 2] >> (q % 2 * 8) & kMask;
      return bits.word[0] >> (q * kBits_) & kMask;
    }
    __device__ __forceinline__ void eight(int i, Eight* out) const {
      constexpr uint32_t kOnes = 0x3f803f80u, k128 = 0x43004300u;
      const Bits bits = bits_of_eight(i);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t pair = pair_of(bits, q);
        if (kBits_ == 1) {  // -1, or 1 where the code is 1
          out->first[q] = pair << 15 ^ 0xbf80bf80u;
        } else if (kBits_ == 8) {
          const uint32_t floats =
              cuda::pack_bf16x2(static_cast<float>(pair & 0xffffu), static_cast<float>(pair >> 16));
          out->first[q] = cuda::fma_bf16x2(floats, kOnes, minus_zero);
        } else {  // a code in the low bits of 128.0 is 128 + code; the sum is exact
          out->first[q] = cuda::fma_bf16x2(pair | k128, kOnes, minus_zero);
        }
      }
    }
  };

  __device__ __forceinline__ void copy(cuda::SharedPlace place, int64_t n, int64_t step,
                                       int chunk) const {
    const uint8_t* from = codes + n * row_bytes + (step * kBits_ + chunk) * 16;
    cuda::copy16_async_or_zero(place, n >= 0 ? from : codes, n >= 0);
  }

  __device__ __forceinline__ Factor factor(int64_t n, int64_t step) const {
    // 32 bits are enough for steps: a division of 64 costs about 70 instructions.
    const auto past = static_cast<uint32_t>(step) / static_cast<uint32_t>(steps_a_group);
    const int64_t group = n * groups + past;
    const int zero = zeros != nullptr ? zeros[group] : 1 << (kBits_ - 1);
    const int less = kBits_ == 8 ? zero : zero + 128;  // at most 143 below 8 bits
    return {load_float(scales, group, scale_type),
            bfloat16_from_float(static_cast<float>(-less)) * 0x10001u};
  }

  static __device__ __forceinline__ Lane lane(cuda::SharedPlace stage, int row, int lane,
                                              const Factor& factor) {
    Lane out;
    const cuda::SharedPlace from = stage + (row * 4 + lane) * kBits_ * 4;
    if (kBits_ % 4 == 0) {
#pragma unroll
      for (int v = 0; v < kBits_ / 4; ++v) {
        const cuda::Words4 four = cuda::load16_shared(from, 16 * v);
#pragma unroll
        for (int k = 0; k < 4; ++k) out.word[(4 * v + k) % kBits_] = four.word[k];
      }
    } else if (kBits_ == 2) {
      const cuda::Words2 two = cuda::load8_shared(from, 0);
      out.word[0] = two.word[0];
      out.word[1 % kBits_] = two.word[1];
    } else {
#pragma unroll
      for (int k = 0; k < kBits_; ++k) out.word[k] = cuda::load4_shared(from + 4 * k);
    }
    out.minus_zero = factor.minus_zero;
    return out;
  }
};

// --- of a call ----------------------------------------------------------------------------------

inline bool aligned(const void* pointer, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
}

template <int kBits>
PackedSource<kBits> packed_source(const matmul::PackedMatrix& weight) {
  const bool whole_rows = weight.group_size >= weight.cols;
  return {weight.codes,
          packed_row_bytes(weight.cols, weight.levels),
          weight.scale,
          weight.scale_type,
          weight.zero,
          whole_rows ? 1 : weight.cols / weight.group_size + (weight.cols % weight.group_size != 0),
          whole_rows ? weight.cols / kStep : weight.group_size / kStep};
}

inline BFloat16Source bfloat16_source(const LinearCall& call) {
  return {
      {static_cast<const uint16_t*>(call.dense), call.terms, aligned(call.dense, call.terms * 2)}};
}

inline Float32Source float32_source(const LinearCall& call) {
  return {{static_cast<const float*>(call.dense), call.terms, aligned(call.dense, call.terms * 4)}};
}

// PackedSource::kOrder and the others'.
inline int order_of(const LinearCall& call) {
  if (call.kind == WeightKind::kFloat32) return Float32Source::kOrder;
  if (call.kind == WeightKind::kBFloat16) return BFloat16Source::kOrder;
  return code_bits(call.packed.levels);
}

// function(source) of a packed weight.
template <class Function>
cuda::Status with_packed_source(const LinearCall& call, const Function& function) {
  switch (code_bits(call.packed.levels)) {
    case 1:
      return function(packed_source<1>(call.packed));
    case 2:
      return function(packed_source<2>(call.packed));
    case 3:
      return function(packed_source<3>(call.packed));
    case 4:
      return function(packed_source<4>(call.packed));
    default:
      return function(packed_source<8>(call.packed));
  }
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
