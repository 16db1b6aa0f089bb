// The arithmetic of a stage of the fused product: decoding and tensor cores.
#pragma once

#include <cmath>

#include "matmul/cuda_decode.cuh"
#include "matmul/cuda_stage.cuh"

namespace pyrobust::matmul::gpu {

template <Format kFormat, class Act, int kRows, int kGroupDim>
struct Multiplier {
  using S = Shape<kFormat, kRows>;
  static constexpr int kEights = S::kEights;
  using Sums = float[S::kSums][4][kEights][4];

  PYROBUST_DEVICE void set_offsets(float zero, uint32_t (&offset)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) offset[r] = offset_of<kFormat, Act>(r, zero);
  }

  PYROBUST_DEVICE void load_offsets(const uint8_t* stage, const WarpPlace& at, int which,
                                    uint32_t (&offset)[8]) {
    const uint8_t* zero =
        stage + S::kZerosAt + at.strip * S::kStripZeros + which * kStrip + at.lane / 4 * kPairRows;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      offset[r] = offset_of<kFormat, Act>(r, static_cast<float>(zero[r]));
    }
  }

  PYROBUST_DEVICE void load_row_scales(const LinearArguments& p, const uint8_t* stage,
                                       const WarpPlace& at, int which, float (&scale)[8]) {
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
  PYROBUST_DEVICE void fold(const LinearArguments& p, const uint8_t* stage, const WarpPlace& at,
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
                                     const WarpPlace& at, int step, Tiles& a) {
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
  PYROBUST_DEVICE void load_operands(const uint8_t* stage, const WarpPlace& at, int chunk,
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
                                     const WarpPlace& at, int half, const uint32_t* words,
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
  PYROBUST_DEVICE void load_words(const uint8_t* stage, const WarpPlace& at, int first, int last,
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
  PYROBUST_DEVICE void multiply(const LinearArguments& p, const uint8_t* stage, const WarpPlace& at,
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

  PYROBUST_DEVICE void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < S::kSums * 16 * kEights; ++i) {
      sum[i / (16 * kEights)][i / (4 * kEights) % 4][i / 4 % kEights][i % 4] = 0.0f;
    }
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
