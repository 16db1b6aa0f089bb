// Included by avx512.cpp alone: the sums of a few inputs with packed weights, decoded in registers.
//
// 64 codes become 64 bytes (matmul/avx512_decode.h), then four vectors of 16 indices. At up to 16
// levels the weights that one group can hold, exact floats, fill one register and a permutation
// looks them up; 8-bit codes are converted, shifted and scaled, all exactly. The inputs are put
// into the order of the codes once a call. No term passes more roundings than in avx512.cpp.
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

void fused_order(const matmul::PackedMatrix& w, const float* x, float* out) {
  const int bits = code_bits(w.levels);
  const int64_t columns = fused_columns(w);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    for (int p = 0; p < kBlock; ++p) {
      const int64_t k = begin + matmul::wide_order(bits, p);
      out[begin + p] = k < w.cols ? x[k] : 0.0f;
    }
  }
}

// What turns a code of one row and group into its weight.
struct Decoder {
  __m512 table;               // at most 16 levels
  __m512 zero, scale, outer;  // 8 bits
};

template <int kBits>
inline Decoder decoder_of(const matmul::PackedMatrix& w, int64_t n, int64_t group) {
  const int64_t at = matmul::scale_row(w, n) + group;
  const float scale = matmul::scale_at(w, at);
  const float outer = w.row_scale != nullptr ? w.row_scale[n] : 1.0f;
  const auto zero = static_cast<float>(matmul::zero_at(w, at));
  if constexpr (kBits == 8) {
    return {_mm512_setzero_ps(), _mm512_set1_ps(zero), _mm512_set1_ps(scale),
            _mm512_set1_ps(outer)};
  }
  __m512 values;
  if (w.codebook != nullptr) {
    uint8_t entries[16] = {};
    __builtin_memcpy(entries, w.codebook, static_cast<size_t>(w.levels));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
    values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  } else {
    const __m512 index = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    values = _mm512_mul_ps(index, _mm512_set1_ps(static_cast<float>(matmul::code_multiplier(w))));
  }
  const __m512 integers = _mm512_sub_ps(values, _mm512_set1_ps(zero));
  const __m512 inner = _mm512_mul_ps(integers, _mm512_set1_ps(scale));
  return {_mm512_mul_ps(inner, _mm512_set1_ps(outer)), inner, inner, inner};
}

template <int kBits>
inline __m512 decode(__m512i bytes, int quarter, const Decoder& decoder) {
  __m128i part;
  switch (quarter) {
    case 0:
      part = _mm512_castsi512_si128(bytes);
      break;
    case 1:
      part = _mm512_extracti32x4_epi32(bytes, 1);
      break;
    case 2:
      part = _mm512_extracti32x4_epi32(bytes, 2);
      break;
    default:
      part = _mm512_extracti32x4_epi32(bytes, 3);
  }
  const __m512i codes = _mm512_cvtepu8_epi32(part);
  if constexpr (kBits == 8) {
    const __m512 integers = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), decoder.zero);
    return _mm512_mul_ps(_mm512_mul_ps(integers, decoder.scale), decoder.outer);
  }
  return _mm512_permutexvar_ps(codes, decoder.table);
}

// The bytes of block b of a row; the last block may be cut short.
template <int kBits>
inline __m512i block_bytes(const uint8_t* row, int64_t row_bytes, int64_t b) {
  constexpr int64_t kSize = 8 * kBits;
  if ((b + 1) * kSize <= row_bytes) return matmul::wide_bytes<kBits>(row + b * kSize);
  uint8_t rest[kSize] = {};
  __builtin_memcpy(rest, row + b * kSize, static_cast<size_t>(row_bytes - b * kSize));
  return matmul::wide_bytes<kBits>(rest);
}

template <int kBits, int R>
void fused_rows(const PackedDots& work, int64_t n) {
  const matmul::PackedMatrix& w = *work.weight;
  const int64_t blocks = matmul::ceil_div(w.cols, kBlock);
  const int64_t per_group = w.group_size >= w.cols ? blocks : w.group_size / kBlock;
  const int64_t row_bytes = packed_row_bytes(w.cols, w.levels);
  const uint8_t* codes = matmul::code_row(w, work.first + n);
  __m512 total_c[R], total_r[R];
  for (int i = 0; i < R; ++i) total_c[i] = total_r[i] = _mm512_setzero_ps();
  Decoder decoder[R];
  for (int64_t begin = 0; begin < blocks; begin += kBlocksOfRun) {
    const int64_t end = blocks < begin + kBlocksOfRun ? blocks : begin + kBlocksOfRun;
    __m512 c[R], r[R];
    for (int i = 0; i < R; ++i) c[i] = r[i] = _mm512_setzero_ps();
    for (int64_t b = begin; b < end; ++b) {
      if (b % per_group == 0) {
        for (int i = 0; i < R; ++i) {
          decoder[i] = decoder_of<kBits>(w, work.first + n + i, b / per_group);
        }
      }
      __m512i bytes[R];
      for (int i = 0; i < R; ++i) {
        bytes[i] = block_bytes<kBits>(codes + i * row_bytes, row_bytes, b);
      }
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512 x = _mm512_loadu_ps(work.centre + b * kBlock + quarter * 16);
        const __m512 y = _mm512_loadu_ps(work.radius + b * kBlock + quarter * 16);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const __m512 value = decode<kBits>(bytes[i], quarter, decoder[i]);
          c[i] = _mm512_fmadd_ps(value, x, c[i]);
          r[i] = _mm512_fmadd_ps(magnitude(value), y, r[i]);
        }
      }
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

template <int kBits>
void fused_dots_of(const PackedDots& work) {
  int64_t n = 0;
  for (; n + kFusedRows <= work.rows; n += kFusedRows) fused_rows<kBits, kFusedRows>(work, n);
  for (; n < work.rows; ++n) fused_rows<kBits, 1>(work, n);
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
