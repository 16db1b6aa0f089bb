// Included by avx512.cpp alone: the sums of a few inputs with packed weights, decoded in registers.
//
// A block of 64 codes becomes 16 dwords that hold four codes each, lowest first; shifting them by
// one code at a time gives the indices of 16 weights. At up to 16 levels the weights that one group
// can hold, exact floats, fill one register, repeated where they are fewer: a permutation looks at
// the lowest four bits of an index only, so no mask is needed. 8-bit codes are converted, shifted
// and scaled, all exactly. The inputs are put into the order of the codes once a call. No term
// passes more roundings than in avx512.cpp.
#pragma once

#include <immintrin.h>

#include "interval/kernels.h"
#include "matmul/avx512_decode.h"
#include "matmul/weights.h"

namespace pyrobust {
namespace interval {
namespace {

inline __m512 magnitude(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

constexpr int64_t kBlock = matmul::kBlock;
constexpr int kFusedRows = 4;
constexpr int64_t kBlocksOfRun = kRun / 4;  // a block adds four terms to a lane

bool fused_format(const matmul::PackedMatrix& w) {
  const bool whole = w.group_size % kBlock == 0 || w.group_size >= w.cols;
  return w.group_dim == 1 && whole && w.levels != kTernaryLevels && w.remainder.offsets == nullptr;
}

int64_t fused_columns(const matmul::PackedMatrix& w) {
  return fused_format(w) ? matmul::ceil_div(w.cols, kBlock) * kBlock : 0;
}

// Column, within its block, of lane `lane` of the dwords' code `step`.
inline int column_of(int bits, int step, int lane) {
  switch (bits) {
    case 1:
      return lane % 2 * 32 + lane / 2 * 4 + step;
    case 3:
      return lane % 8 * 8 + lane / 8 * 4 + step;
    case 8:
      return step * 16 + lane;
    default:
      return lane * 4 + step;
  }
}

void fused_order(const matmul::PackedMatrix& w, const float* x, float* out) {
  const int bits = code_bits(w.levels);
  const int64_t columns = fused_columns(w);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    for (int p = 0; p < kBlock; ++p) {
      const int64_t k = begin + column_of(bits, p / 16, p % 16);
      out[begin + p] = k < w.cols ? x[k] : 0.0f;
    }
  }
}

// The four codes of every lane, in its lowest bits; for 8 bits a quarter of the block at a time.
template <int kBits>
inline __m512i four_codes(const uint8_t* codes) {
  if constexpr (kBits == 1) {
    int64_t bits;
    __builtin_memcpy(&bits, codes, sizeof(bits));
    const __m512i shift =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_srlv_epi32(_mm512_set1_epi64(bits), shift);
  } else if constexpr (kBits == 2) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  } else if constexpr (kBits == 3) {
    const __m512i both = _mm512_broadcast_i64x4(matmul::load_words<3>(codes).low);
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 12, 12, 12, 12, 12, 12, 12, 12);
    return _mm512_srlv_epi32(both, shift);
  } else {
    static_assert(kBits == 4, "8 bits: bytes themselves");
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
}

// What turns a code of one row and group into its weight.
struct Decoder {
  __m512 table;               // at most 16 levels
  __m512 zero, scale, outer;  // 8 bits
};

// Values of the codes before zero and scale, repeated to 16.
inline __m512 code_values(const matmul::PackedMatrix& w) {
  float values[16];
  for (int i = 0; i < 16; ++i) {
    const int code = i % (w.levels < 16 ? w.levels : 16);
    values[i] = static_cast<float>(w.codebook != nullptr ? w.codebook[code]
                                                         : matmul::code_multiplier(w) * code);
  }
  return _mm512_loadu_ps(values);
}

// `zero` and `scale` of the row's group; every product is an exact float, `outer` last.
template <int kBits>
inline Decoder decoder_of(__m512 values, float zero, float scale, float outer) {
  if constexpr (kBits == 8) {
    return {values, _mm512_set1_ps(zero), _mm512_set1_ps(scale), _mm512_set1_ps(outer)};
  }
  const __m512 inner =
      _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
  return {_mm512_mul_ps(inner, _mm512_set1_ps(outer)), inner, inner, inner};
}

// One row's block: 16 weights a step.
template <int kBits>
struct Codes {
  __m512i dwords;
  uint8_t bytes[kBits == 8 ? kBlock : 1];

  // The last block of a row may be cut short.
  void load(const uint8_t* row, int64_t row_bytes, int64_t b) {
    constexpr int64_t kSize = 8 * kBits;
    const uint8_t* from = row + b * kSize;
    uint8_t rest[kSize] = {};
    if ((b + 1) * kSize > row_bytes) {
      __builtin_memcpy(rest, from, static_cast<size_t>(row_bytes - b * kSize));
      from = rest;
    }
    if constexpr (kBits == 8) {
      __builtin_memcpy(bytes, from, kBlock);
    } else {
      dwords = four_codes<kBits>(from);
    }
  }

  template <int kStep>
  __m512 weights(const Decoder& decoder) const {
    if constexpr (kBits == 8) {
      const __m512i codes = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + kStep * 16)));
      const __m512 integers = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), decoder.zero);
      return _mm512_mul_ps(_mm512_mul_ps(integers, decoder.scale), decoder.outer);
    } else {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, kStep * kBits), decoder.table);
    }
  }
};

template <int kBits, int kStep, int R>
inline void fused_step(const PackedDots& work, int64_t b, const Codes<kBits> (&codes)[R],
                       const Decoder (&decoder)[R], __m512 (&c)[R], __m512 (&r)[R]) {
  const __m512 x = _mm512_loadu_ps(work.centre + b * kBlock + kStep * 16);
  const __m512 y = _mm512_loadu_ps(work.radius + b * kBlock + kStep * 16);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const __m512 value = codes[i].template weights<kStep>(decoder[i]);
    c[i] = _mm512_fmadd_ps(value, x, c[i]);
    r[i] = _mm512_fmadd_ps(magnitude(value), y, r[i]);
  }
}

// Scales and zeros of all groups of the rows as floats.
struct Groups {
  const float* scales;  // (rows, count)
  const float* zeros;
  int64_t count;
};

template <int kBits, int R>
void fused_rows(const PackedDots& work, const Groups& groups, __m512 values, int64_t n) {
  const matmul::PackedMatrix& w = *work.weight;
  const int64_t blocks = matmul::ceil_div(w.cols, kBlock);
  const int64_t per_group = w.group_size >= w.cols ? blocks : w.group_size / kBlock;
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  const uint8_t* row = matmul::code_row(w, work.first + n);
  __m512 total_c[R], total_r[R];
  for (int i = 0; i < R; ++i) total_c[i] = total_r[i] = _mm512_setzero_ps();
  Decoder decoder[R];
  int64_t group = 0, border = 0;
  for (int64_t begin = 0; begin < blocks; begin += kBlocksOfRun) {
    const int64_t end = blocks < begin + kBlocksOfRun ? blocks : begin + kBlocksOfRun;
    __m512 c[R], r[R];
    for (int i = 0; i < R; ++i) c[i] = r[i] = _mm512_setzero_ps();
    for (int64_t b = begin; b < end; ++b) {
      if (b == border) {
        for (int i = 0; i < R; ++i) {
          const int64_t at = (n + i) * groups.count + group;
          const float outer = w.row_scale != nullptr ? w.row_scale[work.first + n + i] : 1.0f;
          decoder[i] = decoder_of<kBits>(values, groups.zeros[at], groups.scales[at], outer);
        }
        ++group;
        border += per_group;
      }
      Codes<kBits> codes[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) codes[i].load(row + i * row_bytes, row_bytes, b);
      fused_step<kBits, 0>(work, b, codes, decoder, c, r);
      fused_step<kBits, 1>(work, b, codes, decoder, c, r);
      fused_step<kBits, 2>(work, b, codes, decoder, c, r);
      fused_step<kBits, 3>(work, b, codes, decoder, c, r);
    }
    for (int i = 0; i < R; ++i) {
      total_c[i] = _mm512_add_ps(total_c[i], c[i]);
      total_r[i] = _mm512_add_ps(total_r[i], r[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    work.centre_sums[n + i] = _mm512_reduce_add_ps(total_c[i]);
    work.radius_sums[n + i] = _mm512_reduce_add_ps(total_r[i]);
  }
}

// Scales and zeros of rows [first, first + rows), converted once: in the loop over groups their
// types would cost more than the weights.
Groups groups_of(const PackedDots& work) {
  const matmul::PackedMatrix& w = *work.weight;
  const int64_t count = matmul::scale_cols(w), total = work.rows * count;
  const int64_t at = matmul::scale_row(w, work.first);
  float *scales = work.scratch, *zeros = scales + total;
  for (int64_t i = 0; i < total; ++i) scales[i] = matmul::scale_at(w, at + i);
  for (int64_t i = 0; i < total; ++i) zeros[i] = static_cast<float>(matmul::zero_at(w, at + i));
  return {scales, zeros, count};
}

template <int kBits>
void fused_dots_of(const PackedDots& work) {
  const Groups groups = groups_of(work);
  const __m512 values = code_values(*work.weight);
  int64_t n = 0;
  for (; n + kFusedRows <= work.rows; n += kFusedRows) {
    fused_rows<kBits, kFusedRows>(work, groups, values, n);
  }
  for (; n < work.rows; ++n) fused_rows<kBits, 1>(work, groups, values, n);
}

void fused_dots(const PackedDots& work) {
  switch (code_bits(work.weight->levels)) {
    case 1:
      return fused_dots_of<1>(work);
    case 2:
      return fused_dots_of<2>(work);
    case 3:
      return fused_dots_of<3>(work);
    case 4:
      return fused_dots_of<4>(work);
    default:
      return fused_dots_of<8>(work);
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
