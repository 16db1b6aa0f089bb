// Two of the four tiles of 16 rows that a strip has: what one warp of a warpgroup decodes. All
// warps run the same instructions, since they must not part ways while products are under way: the
// words of a warp's own tiles are presented as those of the first two.
#pragma once

#include "matmul/cuda_decode.cuh"

namespace pyrobust::matmul::gpu {

template <Format kFormat, class Act>
struct TwoTiles {
  static constexpr int kBits = stored_bits(kFormat);
  using Words = uint32_t[kMaxStepWords];
  using Offsets = uint32_t[kPairRows];  // four are used
  using Fragments = uint32_t[2][4];

  // Of a step, from the lane's codes of a block on; `tile`: 0 or 2, the first of the two. With 3
  // bits all words of the step.
  PYROBUST_DEVICE void load(const uint8_t* codes, int tile, int step, Words& words) {
    constexpr int kOwn = kBits == 3 ? 3 : (kBits + 1) / 2;
    constexpr int kApart = kBits == 8 ? kLanes * 16 : kBits == 1 ? 0 : kOwn * 4;
    const uint8_t* own = codes + (kBits == 3 ? 0 : tile / 2 * kApart);
#pragma unroll
    for (int w = 0; w < kMaxStepWords; ++w) words[w] = 0;
#pragma unroll
    for (int w = 0; w < kOwn; ++w) {
      const int word = step * kBits + w;
      words[w] = *reinterpret_cast<const uint32_t*>(own + word / 4 * kLanes * 16 + word % 4 * 4);
    }
    if (kBits == 1) words[0] >>= 2 * tile;
  }

  // The addends of the four rows whose zeros are the bytes of a word.
  PYROBUST_DEVICE void make_offsets(uint32_t zeros, Offsets& offset) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float weight = kBits == 3 ? 1.0f : field_weight<kFormat, Act>(r);
      if (Act::kType == FloatType::kFloat16) {  // 1024 + zero is a half with the zero's bits
        const uint32_t zero = cuda::prmt(zeros, 0x64646464u, 0x4040u + 0x0101u * r);
        const float base = 1024.0f - Act::kBase / weight;
        offset[r] = cuda::sub_f16x2(Act::pack(base, base), zero);
        continue;
      }
      const auto zero = static_cast<float>(zeros >> (8 * r) & 0xffu);
      const float addend = -Act::kBase / weight - zero;
      offset[r] = kBits == 8 ? offset_of<kFormat, Act>(r, zero) : Act::pack(addend, addend);
    }
  }

  PYROBUST_DEVICE void decode(const Words& words, int tile, const Offsets& offset, Fragments& a) {
    if constexpr (kBits == 3) {
      decode_three(words, tile != 0, offset, a);
    } else {
      Tiles all;
      Decoder<kFormat, Act>::step(words, offset, nullptr, all);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = all[i / 4][i % 4];
    }
  }

  // Every field is shifted to bit 0, whatever its row: cuda_layout.h has their places.
  PYROBUST_DEVICE void decode_three(const Words& words, bool second, const Offsets& offset,
                                    Fragments& a) {
    constexpr uint32_t kOr = (cuda::kLopA & cuda::kLopB) | cuda::kLopC;
    uint32_t last = words[0] >> 15 & field_mask<1>(0);
    last = cuda::lop3<kOr>(words[1] >> 14, field_mask<1>(1), last);
    last = cuda::lop3<kOr>(words[2] >> 13, field_mask<1>(2), last);
    const int shift = second ? 3 : 0;
    const uint32_t row0 = (second ? words[1] : words[0]) >> shift;
    const uint32_t row1 = (second ? words[2] : words[1]) >> shift;
    const uint32_t row2 = second ? words[0] >> 6 : words[2];
    const uint32_t row3 = second ? words[2] >> 6 : words[0] >> 3;
    const uint32_t fields[2][4] = {
        {row0, row1, row0 >> 9, row1 >> 9},
        {row2, row3, second ? words[1] >> 6 : words[2] >> 9, second ? last : words[0] >> 12}};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = field<Act>(fields[i / 4][i % 4], field_mask<3>(0));
      a[i / 4][i % 4] = scaled<Act, 0>(pair, offset[i / 4 * 2 + i % 2]);
    }
  }
};

}  // namespace pyrobust::matmul::gpu
