// From stored codes to the A operand of a tensor core: a step of a lane (cuda_layout.h) becomes
// four tiles of 16 x 16 halves. Included by kernels only.
//
// A field of a half word is masked and set into the mantissa of a power of two, P + K code, and one
// fused multiply-add gives code - zero exactly: (P + K code) / K + off with off = -P / K - zero. K
// and the constant part of off depend on the row alone (see the table of cuda_layout.h). P is 1024
// for float16 and 128 for bfloat16, whose mantissa has only 7 bits: more shifts there, and 8 bits
// go through float32. Source: Y. Kim et al., "Who Says Elephants Can't Run", 2022, arXiv 2211.10017
// (the magic number).
//
// With Denormal16 a masked field is the operand: as a float16 it is the denormal K code 2^-24,
// which tensor cores multiply as exactly as any other. That saves half an instruction a weight; K,
// 2^-24 and the zero are then the matter of whoever has the sums (cuda_multiply.cuh).
#pragma once

#include "core/float_types.h"
#include "cuda/primitives.h"
#include "matmul/cuda_layout.h"

namespace pyrobust::matmul::gpu {

struct Float16 {
  static constexpr FloatType kType = FloatType::kFloat16;
  static constexpr float kBase = 1024.0f;
  static constexpr uint32_t kMagic = 0x64006400u, kOne = 0x3c003c00u;
  static constexpr uint32_t kUnit = 0x04000400u;  // of the exponent
  PYROBUST_DEVICE uint32_t pack(float low, float high) { return cuda::pack_f16x2(low, high); }
  PYROBUST_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return cuda::fma_f16x2(a, b, c);
  }
  PYROBUST_DEVICE float low(uint32_t pair) { return cuda::low_f16(pair); }
  PYROBUST_DEVICE float high(uint32_t pair) { return cuda::high_f16(pair); }
  PYROBUST_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cuda::mma_m16n8k16_f16(d, a, b);
  }
  PYROBUST_DEVICE void multiply_warpgroup(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
    cuda::multiply_m64n64k16_f16(d, a, b, onto);
  }
  PYROBUST_DEVICE void multiply_warpgroup(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
    cuda::multiply_m64n128k16_f16(d, a, b, onto);
  }
};

struct Denormal16 : Float16 {
  static constexpr float kBase = 0.0f;
  static constexpr uint32_t kMagic = 0;
};

struct BFloat16 {
  static constexpr FloatType kType = FloatType::kBFloat16;
  static constexpr float kBase = 128.0f;
  static constexpr uint32_t kMagic = 0x43004300u, kOne = 0x3f803f80u;
  static constexpr uint32_t kUnit = 0x00800080u;
  PYROBUST_DEVICE uint32_t pack(float low, float high) { return cuda::pack_bf16x2(low, high); }
  PYROBUST_DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return cuda::fma_bf16x2(a, b, c);
  }
  PYROBUST_DEVICE float low(uint32_t pair) { return cuda::low_bf16(pair); }
  PYROBUST_DEVICE float high(uint32_t pair) { return cuda::high_bf16(pair); }
  PYROBUST_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cuda::mma_m16n8k16_bf16(d, a, b);
  }
  PYROBUST_DEVICE void multiply_warpgroup(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
    cuda::multiply_m64n64k16_bf16(d, a, b, onto);
  }
  PYROBUST_DEVICE void multiply_warpgroup(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
    cuda::multiply_m64n128k16_bf16(d, a, b, onto);
  }
};

// K of row r: the weight of a field's lowest bit within the mantissa.
template <Format kFormat, class Act>
PYROBUST_HD constexpr float field_weight(int r) {
  constexpr bool kHalf = Act::kType == FloatType::kFloat16;
  if (kFormat == Format::k1 && Act::kBase == 0.0f) return static_cast<float>(1 << r);
  if (kFormat == Format::k4) return kHalf && r % 2 == 1 ? 16.0f : 1.0f;
  if (kFormat == Format::k2) {
    constexpr float kWeights[4] = {1.0f, 4.0f, 16.0f, kHalf ? 64.0f : 1.0f};
    return kWeights[r % 4];
  }
  if (kFormat == Format::k3) return r < 3 ? 1.0f : r < 6 ? 8.0f : kHalf ? 64.0f : 1.0f;
  return 1.0f;
}

// The addend of row r, a pair of halves (for 8 bits in bfloat16: one float32).
template <Format kFormat, class Act>
PYROBUST_DEVICE uint32_t offset_of(int r, float zero) {
  if (kFormat == Format::k8 && Act::kType == FloatType::kBFloat16) {
    return bits_of_float(-8388608.0f - zero);
  }
  const float base = kFormat == Format::kCodebook ? 0.0f : Act::kBase;
  const float offset = -base / field_weight<kFormat, Act>(r) - zero;
  return Act::pack(offset, offset);
}

// Two fields in place: (word & mask) | magic.
template <class Act>
PYROBUST_DEVICE uint32_t field(uint32_t word, uint32_t mask) {
  return cuda::lop3<(cuda::kLopA & cuda::kLopB) | cuda::kLopC>(word, mask, Act::kMagic);
}

// A pair with K = 2^kShift.
template <class Act, int kShift>
PYROBUST_DEVICE uint32_t scaled(uint32_t pair, uint32_t offset) {
  if (Act::kBase == 0.0f) return pair;
  return Act::fma(pair, Act::kOne - kShift * Act::kUnit, offset);
}

template <int kBits>
PYROBUST_HD constexpr uint32_t field_mask(int position) {
  return (((1u << kBits) - 1) * 0x00010001u) << position;
}

template <Format kFormat, class Act>
struct Decoder;

// `a[tile][r % 2 + 2 h]` is pair (r, h).
using Tiles = uint32_t[4][4];

PYROBUST_DEVICE uint32_t& pair_of(Tiles& a, int r, int h) { return a[r / 2][r % 2 + 2 * h]; }

template <class Act>
struct Decoder<Format::k1, Act> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t*, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int p = 0; p < 16; ++p) {
      pair_of(a, p % 8, p / 8) = cuda::lop3<(cuda::kLopA & cuda::kLopB) | cuda::kLopC>(
          words[0] << (15 - p), 0x80008000u, Act::kOne);
    }
  }
};

template <>
struct Decoder<Format::k1, Denormal16> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t*, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = words[0] >> (8 * h);
#pragma unroll
      for (int r = 0; r < 8; ++r) pair_of(a, r, h) = word & field_mask<1>(0) << r;
    }
  }
};

template <class Act>
struct Decoder<Format::k2, Act> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t*, Tiles& a) {
    constexpr bool kHalf = Act::kType == FloatType::kFloat16;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = words[w] >> (8 * h);
        const uint32_t* offset = off + 4 * w;
        pair_of(a, 4 * w, h) = scaled<Act, 0>(field<Act>(word, field_mask<2>(0)), offset[0]);
        pair_of(a, 4 * w + 1, h) = scaled<Act, 2>(field<Act>(word, field_mask<2>(2)), offset[1]);
        pair_of(a, 4 * w + 2, h) = scaled<Act, 4>(field<Act>(word, field_mask<2>(4)), offset[2]);
        pair_of(a, 4 * w + 3, h) =
            kHalf
                ? scaled<Act, 6>(field<Act>(word, field_mask<2>(6)), offset[3])
                : scaled<Act, 0>(field<Act>(words[w] >> (8 * h + 6), field_mask<2>(0)), offset[3]);
      }
    }
  }
};

template <class Act>
struct Decoder<Format::k3, Act> {
  static constexpr bool kHalf = Act::kType == FloatType::kFloat16;

  PYROBUST_DEVICE uint32_t last(uint32_t pair, uint32_t offset) {
    return kHalf ? scaled<Act, 6>(pair, offset) : scaled<Act, 0>(pair, offset);
  }

  // The pair whose three bits are the bits 15 of three words.
  PYROBUST_DEVICE uint32_t gathered(const uint32_t* words) {
    constexpr int kShift = kHalf ? 9 : 15, kAt = 15 - kShift;
    uint32_t pair = field<Act>(words[0] >> kShift, field_mask<1>(kAt));
    constexpr uint32_t kOr = (cuda::kLopA & cuda::kLopB) | cuda::kLopC;
    pair = cuda::lop3<kOr>(words[1] >> (kShift - 1), field_mask<1>(kAt + 1), pair);
    return cuda::lop3<kOr>(words[2] >> (kShift - 2), field_mask<1>(kAt + 2), pair);
  }

  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int w = 0; w < 3; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = words[w] >> (9 * h);
        pair_of(a, w, h) = scaled<Act, 0>(field<Act>(word, field_mask<3>(0)), off[w]);
        pair_of(a, w + 3, h) = scaled<Act, 3>(field<Act>(word, field_mask<3>(3)), off[w + 3]);
      }
      const uint32_t middle = kHalf ? words[w] : words[w] >> 6;
      pair_of(a, w < 2 ? 6 : 7, w % 2) =
          last(field<Act>(middle, field_mask<3>(kHalf ? 6 : 0)), off[w < 2 ? 6 : 7]);
    }
    pair_of(a, 7, 1) = last(gathered(words), off[7]);
  }
};

template <class Act>
struct Decoder<Format::k4, Act> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t*, Tiles& a) {
    constexpr bool kHalf = Act::kType == FloatType::kFloat16;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = words[w] >> (8 * h);
        pair_of(a, 2 * w, h) = scaled<Act, 0>(field<Act>(word, field_mask<4>(0)), off[2 * w]);
        pair_of(a, 2 * w + 1, h) =
            kHalf ? scaled<Act, 4>(field<Act>(word, field_mask<4>(4)), off[2 * w + 1])
                  : scaled<Act, 0>(field<Act>(words[w] >> (8 * h + 4), field_mask<4>(0)),
                                   off[2 * w + 1]);
      }
    }
  }
};

template <>
struct Decoder<Format::k8, Float16> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      pair_of(a, r, 0) = scaled<Float16, 0>(cuda::prmt(words[r], Float16::kMagic, 0x5150u), off[r]);
      pair_of(a, r, 1) = scaled<Float16, 0>(cuda::prmt(words[r], Float16::kMagic, 0x5352u), off[r]);
    }
  }
};

template <>
struct Decoder<Format::k8, Denormal16> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t*, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      pair_of(a, r, 0) = cuda::prmt(words[r], 0u, 0x4140u);
      pair_of(a, r, 1) = cuda::prmt(words[r], 0u, 0x4342u);
    }
  }
};

// A byte in the mantissa of 2^23; the upper halves of the differences are the bfloat16 values.
template <>
struct Decoder<Format::k8, BFloat16> {
  PYROBUST_DEVICE uint32_t difference(uint32_t word, int byte, uint32_t offset) {
    const uint32_t bits = cuda::prmt(word, 0x4b000000u, 0x7540u + static_cast<uint32_t>(byte));
    return bits_of_float(float_from_bits(bits) + float_from_bits(offset));
  }
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t*, Tiles& a) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        pair_of(a, r, h) = cuda::prmt(difference(words[r], 2 * h, off[r]),
                                      difference(words[r], 2 * h + 1, off[r]), 0x7632u);
      }
    }
  }
};

// `table` holds the 256 pairs of entries that a byte can name.
template <class Act>
struct Decoder<Format::kCodebook, Act> {
  PYROBUST_DEVICE void step(const uint32_t* words, const uint32_t* off, const uint32_t* table,
                            Tiles& a) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t pair = table[words[r / 2] >> (16 * (r % 2) + 8 * h) & 0xffu];
        pair_of(a, r, h) = scaled<Act, 0>(pair, off[r]);
      }
    }
  }
};

// 2 u and 2 v of matmul/complex.h: the sign and the one exponent bit of 2.0, or a zero.
PYROBUST_DEVICE void complex_step(const uint32_t* words, Tiles& u, Tiles& v) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = words[r / 4] << (14 - 2 * (r % 4) - 8 * h);
      pair_of(u, r, h) = word & 0xc000c000u;
      pair_of(v, r, h) =
          cuda::lop3<(cuda::kLopA ^ cuda::kLopB) & cuda::kLopC>(word, 0x40004000u, 0xc000c000u);
    }
  }
}

}  // namespace pyrobust::matmul::gpu
