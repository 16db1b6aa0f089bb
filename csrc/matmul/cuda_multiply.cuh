// The arithmetic of a stage of the fused product: decoding and tensor cores.
#pragma once

#include <cmath>
#include <type_traits>

#include "matmul/cuda_decode.cuh"
#include "matmul/cuda_stage.cuh"

namespace pyrobust::matmul::gpu {

// Whether codes are multiplied as denormals, and zeros by the sums of x:
//
//     sum_k x (code - zero) = 2^24 / K sum_k x (K code 2^-24) - zero sum_k x
//
// The sums of x are one product more for every four, where subtracting zeros first takes as many
// instructions as masking.
template <Format kFormat, class Act, int kGroupDim>
constexpr bool kDenormal = kGroupDim == 1 && Act::kBase == 1024.0f &&
                           kFormat != Format::kCodebook && kFormat != Format::kComplex;

// S: sizes of an instance and the places of its stages, as Shape (cuda_stage.cuh) has them.
template <Format kFormat, class Act, class S, int kGroupDim>
struct Multiplier {
  static constexpr bool kUnits = kDenormal<kFormat, Act, kGroupDim>;
  using Coded = std::conditional_t<kUnits, Denormal16, Act>;
  static constexpr int kEights = S::kEights;
  using Sums = float[S::kSums][4][kEights][4];

  // Of a group: products with codes and, of lane 4 g + t for row g of each eight of x, two parts of
  // the sum of x in elements 0 and 2.
  struct Part {
    Sums sum;
    float x[kEights][4];
  };

  PYROBUST_DEVICE void set_offsets(float zero, uint32_t (&offset)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) offset[r] = offset_of<kFormat, Act>(r, zero);
  }

  // The zeros of a lane's eight rows, group `which` of the block.
  PYROBUST_DEVICE void load_zeros(cuda::SharedPlace stage, const WarpPlace& at, int which,
                                  float (&zero)[8]) {
    const cuda::Words2 bytes = cuda::load8_shared(
        stage + at.strip * S::kStripZeros + which * kStrip + at.lane / 4 * kPairRows, S::kZerosAt);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      zero[r] = static_cast<float>(bytes.word[r / 4] >> (8 * (r % 4)) & 0xffu);
    }
  }

  PYROBUST_DEVICE void load_offsets(cuda::SharedPlace stage, const WarpPlace& at, int which,
                                    uint32_t (&offset)[8]) {
    float zero[8];
    load_zeros(stage, at, which, zero);
#pragma unroll
    for (int r = 0; r < 8; ++r) offset[r] = offset_of<kFormat, Act>(r, zero[r]);
  }

  PYROBUST_DEVICE void load_row_scales(const LinearArguments& p, cuda::SharedPlace stage,
                                       const WarpPlace& at, int which, float (&scale)[8]) {
    const cuda::SharedPlace strip = stage + at.strip * S::kStripScales;
    const int first = which * kStrip + at.lane / 4 * kPairRows;
    if (p.scale_type == FloatType::kFloat32) {
      const cuda::Words4 a = cuda::load16_shared(strip + first * 4, S::kScalesAt),
                         b = cuda::load16_shared(strip + first * 4, S::kScalesAt + 16);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scale[r] = float_from_bits(a.word[r]);
        scale[r + 4] = float_from_bits(b.word[r]);
      }
      return;
    }
    const cuda::Words4 pairs = cuda::load16_shared(strip + first * 2, S::kScalesAt);
    const bool half = p.scale_type == FloatType::kFloat16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = pairs.word[i];
      scale[2 * i] = half ? cuda::low_f16(pair) : cuda::low_bf16(pair);
      scale[2 * i + 1] = half ? cuda::high_f16(pair) : cuda::high_bf16(pair);
    }
  }

  // sum += scale * part, part = 0; with denormals sums are in units of 2^24.
  PYROBUST_DEVICE void fold(const LinearArguments& p, cuda::SharedPlace stage, const WarpPlace& at,
                            int which, Part& part, Sums& sum) {
    float scale[8];
    load_row_scales(p, stage, at, which, scale);
    if constexpr (kUnits) {
      if (p.zero == nullptr) {
        float zero[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) zero[r] = kFormat == Format::k1 ? -1.0f : p.symmetric_zero;
        subtract_zeros(at, zero, part);
      } else {
        float zero[8];
        load_zeros(stage, at, which, zero);
        subtract_zeros(at, zero, part);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[0][tile][m][i] =
              fmaf(scale[2 * tile + i / 2], part.sum[0][tile][m][i], sum[0][tile][m][i]);
        }
      }
    }
    clear(part);
  }

  // Products with fields less zeros times the sums of x. A stored code of one bit is 1 - code, and
  // stands for 1 - 2 (1 - code).
  PYROBUST_DEVICE void subtract_zeros(const WarpPlace& at, const float (&zero)[8], Part& part) {
    constexpr float kUnit = 1.0f / 16777216.0f, kOfCode = kFormat == Format::k1 ? -2.0f : 1.0f;
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
      const float own = -kUnit * (part.x[m][0] + part.x[m][2]);
      const float x[2] = {cuda::shuffle(own, at.lane % 4 * 8),
                          cuda::shuffle(own, at.lane % 4 * 8 + 4)};
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * tile + i / 2;
          float& product = part.sum[0][tile][m][i];
          product = fmaf(kOfCode / field_weight<kFormat, Coded>(r), product, zero[r] * x[i % 2]);
        }
      }
    }
  }

  // Sums out of their units.
  PYROBUST_DEVICE void complete(Sums& sum) {
    if constexpr (kUnits) {
#pragma unroll
      for (int i = 0; i < 16 * kEights; ++i) {
        sum[0][i / (4 * kEights)][i / 4 % kEights][i % 4] *= 16777216.0f;
      }
    }
  }

  // Groups along output features: subtracts zeros, multiplies by scales, both one a column.
  PYROBUST_DEVICE void scale_columns(const LinearArguments& p, cuda::SharedPlace stage,
                                     const WarpPlace& at, int step, Tiles& a) {
    const cuda::SharedPlace scale = stage + S::kScalesAt + at.strip * S::kStripScales;
    const cuda::SharedPlace zero = stage + S::kZerosAt + at.strip * S::kStripZeros;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = step * kStepColumns + pair_column(at.lane, h);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int first = (p.two_groups ? which : 0) * kBlock + column;
        const uint32_t factor = cuda::load4_shared(scale + first * 2);
        uint32_t less = 0;
        if (p.zero != nullptr) {
          const uint32_t two = cuda::load4_shared(zero + first / 4 * 4) >> (8 * (first % 4));
          less = Act::pack(-static_cast<float>(two & 0xffu), -static_cast<float>(two >> 8 & 0xffu));
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

  // The B operands of columns [32 half, 32 half + 32): for each eight rows of x, two steps. The
  // second half's chunks are those of the first with one bit of their place turned.
  PYROBUST_DEVICE void load_operands(cuda::SharedPlace stage, const WarpPlace& at, int half,
                                     uint32_t (&x)[kEights][4]) {
    const auto first = static_cast<uint32_t>(activation_offset(at.lane % 8, at.lane / 8));
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
      cuda::ldmatrix_x4(x[m], stage + (first ^ 64 * half) + m * kEightBytes);
    }
  }

  // Sums over those columns: with ones as the right operand it does not matter which element of the
  // left one is which column.
  PYROBUST_DEVICE void add_activations(const uint32_t (&x)[kEights][4], float (&sum)[kEights][4]) {
    const uint32_t ones[2] = {Act::kOne, Act::kOne};
#pragma unroll
    for (int m = 0; m < kEights; ++m) Act::mma(sum[m], x[m], ones);
  }

  PYROBUST_DEVICE void multiply_tiles(const Tiles& a, const uint32_t (&x)[kEights][4], int step,
                                      float (&sum)[4][kEights][4]) {
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
      const uint32_t b[2] = {x[m][step % 2 * 2], x[m][step % 2 * 2 + 1]};
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) Act::mma(sum[tile][m], a[tile], b);
    }
  }

  // Columns [32 half, 32 half + 32) of the stage onto the group's sums; `rows` are those of x.
  PYROBUST_DEVICE void multiply_half(const LinearArguments& p, cuda::SharedPlace rows,
                                     cuda::SharedPlace stage, const WarpPlace& at, int half,
                                     uint32_t (&words)[kSteps * S::kBits],
                                     const uint32_t (&offset)[8], const uint32_t* table,
                                     Part& part) {
    uint32_t x[kEights][4];
    load_operands(rows, at, half, x);
    if constexpr (kUnits) add_activations(x, part.x);
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; ++step) {
      // Of two steps at a time where that leaves registers enough.
      constexpr int kTogether = S::kBits == 8 ? 1 : 2;
      if (step % kTogether == 0) {
        load_words(stage, at, (step * S::kBits + 3) / 4, ((step + kTogether) * S::kBits + 3) / 4,
                   words);
      }
      Tiles a;
      if constexpr (kFormat == Format::kComplex) {
        Tiles v;
        complex_step(words + step * S::kBits, a, v);
        multiply_tiles(v, x, step, part.sum[S::kSums - 1]);
      } else {
        Decoder<kFormat, Coded>::step(words + step * S::kBits, offset, table, a);
        if (kGroupDim == 0) scale_columns(p, stage, at, step, a);
      }
      multiply_tiles(a, x, step, part.sum[0]);
    }
  }

  // Vectors [first, last) of the lane's codes into their words.
  PYROBUST_DEVICE void load_words(cuda::SharedPlace stage, const WarpPlace& at, int first, int last,
                                  uint32_t (&words)[kSteps * S::kBits]) {
    const cuda::SharedPlace codes = stage + at.strip * S::kStripCodes + at.lane * 16;
#pragma unroll
    for (int j = first; j < last; ++j) {
      const cuda::Words4 vector = cuda::load16_shared(codes, S::kCodesAt + j * kLanes * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * j + i] = vector.word[i];
    }
  }

  // One unit. `begins`: a group begins with it; `ends`: a group, or this block's part of it, ends.
  PYROBUST_DEVICE void multiply(const LinearArguments& p, cuda::SharedPlace stage,
                                const WarpPlace& at, bool begins, bool ends, const uint32_t* table,
                                uint32_t (&offset)[8], Part& part, Sums& sum) {
    uint32_t words[kSteps * S::kBits];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kGroupDim == 1) {
        const int which = p.two_groups ? half : 0;
        if (!kUnits && p.zero != nullptr && (p.two_groups || (half == 0 && begins))) {
          load_offsets(stage, at, which, offset);
        }
        multiply_half(p, stage, stage, at, half, words, offset, table, part);
        if (p.two_groups || (half == 1 && ends)) fold(p, stage, at, which, part, sum);
      } else {
        multiply_half(p, stage, stage, at, half, words, offset, table, part);
      }
    }
  }

  PYROBUST_DEVICE void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < S::kSums * 16 * kEights; ++i) {
      sum[i / (16 * kEights)][i / (4 * kEights) % 4][i / 4 % kEights][i % 4] = 0.0f;
    }
  }

  PYROBUST_DEVICE void clear(Part& part) {
    clear(part.sum);
#pragma unroll
    for (int i = 0; i < 4 * kEights; ++i) part.x[i / 4][i % 4] = 0.0f;
  }

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
};

}  // namespace pyrobust::matmul::gpu
