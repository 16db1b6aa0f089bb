// Included by avx2.cpp and avx512.cpp: the complex product. Codes become bytes u + 1 and v + 1 by
// shuffles, so that unsigned times signed byte products apply; the sum of x is taken off at the
// end.
#pragma once

#include "matmul/avx2_decode.h"
#include "matmul/complex_block.h"

namespace pyrobust::matmul {
namespace {

int complex_order(int p) { return byte_order(2, p); }

inline int32_t total_of(__m256i sums) {
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Eight int32 sums of 64 products; pairs and their sum are at most 4 * 2 * 128 in 16 bits.
inline __m256i complex_dot(const Bytes& weight, const int8_t* x) {
  const auto* bytes = reinterpret_cast<const __m256i*>(x);
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(weight.even, _mm256_loadu_si256(bytes)),
                       _mm256_maddubs_epi16(weight.odd, _mm256_loadu_si256(bytes + 1)));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

void complex_multiply(const ComplexBlock& x, int64_t begin, int64_t end) {
  const __m256i u_table = _mm256_set1_epi32(0x01000102);  // bytes 2 1 0 1: u + 1 of codes 0 to 3
  const __m256i v_table = _mm256_set1_epi32(0x00010201);  // bytes 1 2 1 0
  const int64_t stride = x.blocks * kComplexBlock;
  for (int64_t n = begin; n < end; ++n) {
    ComplexRow row;
    load_complex_row(*x.problem, n, &row);
    for (int64_t m = 0; m < x.problem->count; ++m) {
      const int8_t *a = x.real + m * stride, *b = x.imag + m * stride;
      __m256i au = _mm256_setzero_si256(), av = au, bu = au, bv = au;
      for (int64_t k = 0; k < x.blocks; ++k) {
        const Bytes codes = load_bytes<2>(complex_codes(row, k));
        const Bytes u = {_mm256_shuffle_epi8(u_table, codes.even),
                         _mm256_shuffle_epi8(u_table, codes.odd)};
        const Bytes v = {_mm256_shuffle_epi8(v_table, codes.even),
                         _mm256_shuffle_epi8(v_table, codes.odd)};
        au = _mm256_add_epi32(au, complex_dot(u, a + k * kComplexBlock));
        av = _mm256_add_epi32(av, complex_dot(v, a + k * kComplexBlock));
        bu = _mm256_add_epi32(bu, complex_dot(u, b + k * kComplexBlock));
        bv = _mm256_add_epi32(bv, complex_dot(v, b + k * kComplexBlock));
      }
      const int32_t a_all = x.sum_real[m], b_all = x.sum_imag[m];
      store_complex(x, m, n, total_of(au) - a_all, total_of(bv) - b_all, total_of(av) - a_all,
                    b_all - total_of(bu));
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
