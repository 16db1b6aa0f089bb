// Weights as fragments: eight terms of one row at a time, as four pairs of bfloat16.
#pragma once

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

// Each source: kSecond (whether `second` is used), kBits (0: dense), kOrder (of the terms),
// begin(row, step, lane) to fetch a lane's 32 terms, eight(i) for i in 0 .. 3, scale(). What begin
// leaves in memory load(i) brings as a Part, of which convert(i) makes the same as eight(i); where
// `whole`(step), load_whole(i) does so without looking for the end of a row.

struct Float32Source {
  static constexpr bool kSecond = true;
  static constexpr int kBits = 0;
  static constexpr int kOrder = kFloat32Order;
  const float* weight;
  int64_t terms;
  bool vectors;  // rows begin on vector borders

  struct Lane {
    const float* row;
    int64_t first;
    int64_t terms;
    bool vectors;

    struct Part {
      float w[8];
    };

    __device__ __forceinline__ void load(int i, Part* out) const {
      float (&w)[8] = out->w;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = first + 32 * i + 16 * half;
        if (vectors && at < terms) {
          const cuda::Words4 four = cuda::load16_once(row + at);
#pragma unroll
          for (int k = 0; k < 4; ++k) w[4 * half + k] = float_from_bits(four.word[k]);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            w[4 * half + k] = at + k < terms ? row[at + k] : 0.0f;
          }
        }
      }
    }
    __device__ __forceinline__ void load_whole(int i, Part* out) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const cuda::Words4 four = cuda::load16_once(row + first + 32 * i + 16 * half);
#pragma unroll
        for (int k = 0; k < 4; ++k) out->w[4 * half + k] = float_from_bits(four.word[k]);
      }
    }
    __device__ __forceinline__ void convert(int, const Part& part, Eight* out) const {
      const float (&w)[8] = part.w;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t pair = cuda::pack_bf16x2(w[2 * p], w[2 * p + 1]);
        out->first[p] = pair;
        out->second[p] = cuda::pack_bf16x2(w[2 * p] - cuda::low_bf16(pair),
                                           w[2 * p + 1] - cuda::high_bf16(pair));
      }
    }
    __device__ __forceinline__ void eight(int i, Eight* out) const {
      Part part;
      load(i, &part);
      convert(i, part, out);
    }
    __device__ __forceinline__ float scale() const { return 1.0f; }
  };

  __device__ __forceinline__ Lane begin(int64_t row, int64_t step, int lane) const {
    return {weight + row * terms, step * kStep + lane * 4, terms, vectors};
  }
  __device__ __forceinline__ bool whole(int64_t step) const {
    return vectors && (step + 1) * kStep <= terms;
  }
};

struct BFloat16Source {
  static constexpr bool kSecond = false;
  static constexpr int kBits = 0;
  static constexpr int kOrder = kBFloat16Order;
  const uint16_t* weight;
  int64_t terms;
  bool vectors;

  struct Lane {
    const uint16_t* row;
    int64_t first;
    int64_t terms;
    bool vectors;

    struct Part {
      uint32_t word[4];
    };

    __device__ __forceinline__ void load(int i, Part* out) const {
      const int64_t at = first + 8 * i;
      if (vectors && at < terms) {
        const cuda::Words4 words = cuda::load16_once(row + at);
#pragma unroll
        for (int p = 0; p < 4; ++p) out->word[p] = words.word[p];
        return;
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t low = at + 2 * p < terms ? row[at + 2 * p] : 0u;
        const uint32_t high = at + 2 * p + 1 < terms ? row[at + 2 * p + 1] : 0u;
        out->word[p] = low | high << 16;
      }
    }
    __device__ __forceinline__ void load_whole(int i, Part* out) const {
      const cuda::Words4 words = cuda::load16_once(row + first + 8 * i);
#pragma unroll
      for (int p = 0; p < 4; ++p) out->word[p] = words.word[p];
    }
    __device__ __forceinline__ void convert(int, const Part& part, Eight* out) const {
#pragma unroll
      for (int p = 0; p < 4; ++p) out->first[p] = part.word[p];
    }
    __device__ __forceinline__ void eight(int i, Eight* out) const {
      Part part;
      load(i, &part);
      convert(i, part, out);
    }
    __device__ __forceinline__ float scale() const { return 1.0f; }
  };

  __device__ __forceinline__ Lane begin(int64_t row, int64_t step, int lane) const {
    return {weight + row * terms, step * kStep + lane * kTermsOfLane, terms, vectors};
  }
  __device__ __forceinline__ bool whole(int64_t step) const {
    return vectors && (step + 1) * kStep <= terms;
  }
};

// The canonical layout of core/bit_layout.h as it is: a lane's 32 codes are kBits_ whole words.
template <int kBits_>
struct PackedSource {
  static constexpr bool kSecond = false;
  static constexpr int kBits = kBits_;
  static constexpr int kOrder = kBits_;
  const uint8_t* codes;
  int64_t row_bytes;
  const void* scales;
  FloatType scale_type;
  const uint8_t* zeros;
  int64_t groups;  // of a row
  int64_t steps_a_group;

  struct Lane {
    uint32_t word[kBits_];
    uint32_t minus_zero;  // twice, as bfloat16
    float scale_of_group;

    struct Part {};
    __device__ __forceinline__ void load(int, Part*) const {}
    __device__ __forceinline__ void load_whole(int, Part*) const {}
    __device__ __forceinline__ void convert(int i, const Part&, Eight* out) const { eight(i, out); }

    // word[first + i] for i in 0 .. 3, by selection, so that a loop over i need not be unrolled.
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
      constexpr uint32_t kOnes = 0x3f803f80u, kMinus128 = 0xc300c300u, k128 = 0x43004300u;
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
        } else {  // a code below 128 in the low bits of 128.0 is 128 + code; all sums are exact
          const uint32_t code = cuda::fma_bf16x2(pair | k128, kOnes, kMinus128);
          out->first[q] = cuda::fma_bf16x2(code, kOnes, minus_zero);
        }
      }
    }
    __device__ __forceinline__ float scale() const { return scale_of_group; }
  };

  __device__ __forceinline__ bool whole(int64_t) const { return true; }

  __device__ __forceinline__ Lane begin(int64_t row, int64_t step, int lane) const {
    Lane out;
    const auto* from = reinterpret_cast<const uint32_t*>(codes + row * row_bytes) +
                       (step * kStep / kTermsOfLane + lane) * kBits_;
    if (kBits_ % 4 == 0) {
#pragma unroll
      for (int v = 0; v < kBits_ / 4; ++v) {
        const cuda::Words4 four = cuda::load16_once(from + 4 * v);
#pragma unroll
        for (int k = 0; k < 4; ++k) out.word[(4 * v + k) % kBits_] = four.word[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kBits_; ++k) out.word[k] = from[k];
    }
    // 32 bits are enough for steps: a division of 64 costs about 70 instructions.
    const auto past = static_cast<uint32_t>(step) / static_cast<uint32_t>(steps_a_group);
    const int64_t group = row * groups + past;
    const int zero = zeros != nullptr ? zeros[group] : 1 << (kBits_ - 1);
    out.minus_zero = bfloat16_from_float(static_cast<float>(-zero)) * 0x10001u;
    out.scale_of_group = load_float(scales, group, scale_type);
    return out;
  }
};

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
