// Included by avx512.cpp alone: panels of one bit as words of indices (sign_tables.h), several
// panels side by side, and their scales. They are made from the panel order for each block of x:
// that takes an eighth of the time of 16 rows and no second copy of the weight.
#pragma once

#include "matmul/avx512_panel_quad.h"
#include "matmul/sign_tables.h"

namespace pyrobust::matmul {
namespace {

// A word in lane 2 i is of row i, in lane 2 i + 1 of row 16 + i. Those lanes, four to a qword, are
// taken for doubles where they stand: scales and totals of a panel lie word by word,
//
//   rows 0 2 4 ... 14 | 16 18 ... 30 | 1 3 ... 15 | 17 19 ... 31
//
// and scales of the second and third eight are divided by 2 to the power of 16 and 32.
constexpr double kWordUnits[4] = {1.0, 0x1p-16, 0x1p-32, 1.0};

// From this order to that of the panel, and back.
inline __m512d even_doubles(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
}
inline __m512d odd_doubles(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
}
inline void to_panel_order(const double* total, double* out) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  for (int64_t t = 0; t < 2; ++t) {
    const __m512d even = _mm512_load_pd(total + 8 * t), odd = _mm512_load_pd(total + 8 * t + 16);
    _mm512_store_pd(out + 16 * t, _mm512_permutex2var_pd(even, low, odd));
    _mm512_store_pd(out + 16 * t + 8, _mm512_permutex2var_pd(even, high, odd));
  }
}

inline void write_word_scales(const PackedMatrix& w, const uint8_t* head, double* out) {
  __m512d scale[4];
  load_panel_scales<0>(w, head, scale);
  for (int t = 0; t < 2; ++t) {
    const __m512d even = even_doubles(scale[2 * t], scale[2 * t + 1]);
    const __m512d odd = odd_doubles(scale[2 * t], scale[2 * t + 1]);
    _mm512_store_pd(out + 8 * t, _mm512_mul_pd(even, _mm512_set1_pd(kWordUnits[t])));
    _mm512_store_pd(out + 8 * t + 16, _mm512_mul_pd(odd, _mm512_set1_pd(kWordUnits[t + 2])));
  }
}

// The words of a quad: bits 16 + 2 j and 1 + 2 j of each dword change places.
inline __m512i quad_words(__m512i codes) {
  const __m512i kept = _mm512_set1_epi32(static_cast<int32_t>(0xaaaa5555));
  const __m512i moved = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(codes, 15),
                                                _mm512_slli_epi32(codes, 15));
  constexpr int kChoose = 0xca;  // of the second where the first has ones, else of the third
  return _mm512_ternarylogic_epi32(kept, codes, moved, kChoose);
}

// The words of a run, `apart` registers from one another; asks for what lies `ahead`. Returns where
// the next run's go.
inline __m512i* write_run_words(const uint8_t* codes, int64_t quads, int64_t apart, int64_t ahead,
                                __m512i* out) {
  __m512i last = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int64_t i = 0; i < quads; ++i, codes += kLineBytes, out += apart) {
    const __m512i words = quad_words(_mm512_loadu_si512(codes));
    _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T1);
    _mm512_store_si512(out, words);
    last = _mm512_or_si512(_mm512_add_epi16(last, last), _mm512_srli_epi16(words, 15));
  }
  _mm512_store_si512(out, last);
  return out + apart;
}

// Groups [from, to) of `count` panels from `panel` on: words (words of these groups, count) and
// scales (groups, count, 32).
void write_words(const PackedMatrix& w, const PanelLayout& layout, const uint8_t* panel,
                 int64_t count, int64_t from, int64_t to, __m512i* words, double* scale) {
  const int64_t ahead = layout.panel_bytes;  // a new stream, of which the processor does not know
  for (int64_t p = 0; p < count; ++p, panel += layout.panel_bytes) {
    __m512i* out = words + p;
    for (int64_t g = from; g < to; ++g) {
      const uint8_t* head = panel + g * layout.group_bytes;
      const uint8_t* codes = head + layout.head_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(head + ahead), _MM_HINT_T1);
      write_word_scales(w, head, scale + ((g - from) * count + p) * kPanelRows);
      for (int64_t left = group_quads(layout, g); left > 0; left -= kRunQuads) {
        out = write_run_words(codes, run_quads(left), count, ahead, out);
        codes += run_quads(left) * kLineBytes;
      }
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
