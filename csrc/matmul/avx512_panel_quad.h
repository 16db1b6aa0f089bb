// Included by files of AVX-512 alone: what a weight in panel order (panels.h) gives to products,
// its codes, 16 columns at a time, and its scales.
#pragma once

#include "matmul/avx512_prepare.h"
#include "matmul/panels.h"

namespace pyrobust::matmul {
namespace {

// The entries of a codebook in every sixteen bytes.
inline __m512i codebook_table(const PackedMatrix& w) {
  uint8_t entries[16] = {};
  if (w.codebook != nullptr) {
    __builtin_memcpy(entries, w.codebook, static_cast<size_t>(w.levels));
  }
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}

// Bytes ahead in the stream: past what the prefetcher of the processor does within a page.
constexpr int64_t kPanelAhead = 2048;

// A group's scales and zeros are lines of the same stream. Prefetching for codes alone would leave
// out as many lines a group, and each of those would hold up the loop.
__attribute__((always_inline)) inline void prefetch_head(const PanelLayout& layout,
                                                         const uint8_t* head) {
  for (int64_t at = 0; at < layout.head_bytes; at += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(head) + at + kPanelAhead, _MM_HINT_T0);
  }
}

// The codes of 16 columns of a panel.
// kLoadOnce: gcc loads them again for each use otherwise, which is as fast where there are few.
template <int kBits, bool kBook, bool kLoadOnce = false>
struct PanelQuad {
  __m512i raw[kBits];

  __attribute__((always_inline)) inline void load(const uint8_t* at) {
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i) {
      raw[i] = _mm512_loadu_si512(at + kLineBytes * i);
      if constexpr (kLoadOnce) __asm__("" : "+v"(raw[i]));
    }
  }

  // The bytes of step s whose lower 2 kBits bits are the codes of both halves of the panel.
  __attribute__((always_inline)) inline __m512i both(int s) const {
    if constexpr (kBits == 4) return raw[s];
    if constexpr (kBits == 2) return s % 2 == 0 ? raw[s / 2] : _mm512_srli_epi16(raw[s / 2], 4);
    if constexpr (kBits == 1) return s == 0 ? raw[0] : _mm512_srli_epi16(raw[0], 2 * s);
    if constexpr (kBits == 3) {
      if (s < 3) return raw[s];
      constexpr int kSelect = 0xe4;  // of the first where the third has ones, else of the second
      const __m512i four =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(raw[0], 6), _mm512_srli_epi16(raw[1], 4),
                                    _mm512_set1_epi8(0x03), kSelect);
      return _mm512_ternarylogic_epi32(four, _mm512_srli_epi16(raw[2], 2), _mm512_set1_epi8(0x0f),
                                       kSelect);
    }
    return raw[0];
  }

  // The codes, or entries of the codebook `table`, of rows 0..15, and of rows 16..31. Those of the
  // latter are 2^kShift times what they stand for.
  static constexpr int kShift = kBook || kBits == 8 ? 0 : kBits;
  __attribute__((always_inline)) inline void step(int s, __m512i table, __m512i* a,
                                                  __m512i* b) const {
    if constexpr (kBits == 8) {
      *a = raw[2 * s];
      *b = raw[2 * s + 1];
      return;
    }
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)), v = both(s);
    *a = _mm512_and_si512(v, mask);
    if constexpr (kBook) {
      *a = _mm512_shuffle_epi8(table, *a);
      *b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, kBits), mask));
    } else {
      *b = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << kBits)));
    }
  }

  // The registers that step s needs beside those of the steps before it. Loads keep their order and
  // happen once, which the processor's prefetcher and its two loads a cycle want.
  __attribute__((always_inline)) inline void load_step(int s, const uint8_t* at) {
    if constexpr (kBits == 8) {
      load_line(2 * s, at);
      load_line(2 * s + 1, at);
    } else if constexpr (kBits >= 3) {
      if (s < kBits) load_line(s, at);
    } else if (s % (4 / kBits) == 0) {
      load_line(s * kBits / 4, at);
    }
  }

  // Codes a, and both at once, a + 2^kBits b, times 2^unit(s): a mask less than step() takes, and
  // no shift.
  static constexpr bool kJoined = !kBook && kBits != 8;
  static constexpr int unit(int s) { return kBits > 2 ? 0 : s * 2 * kBits % 8; }
  __attribute__((always_inline)) inline void joined(int s, __m512i* a, __m512i* all) const {
    constexpr int kLow = (1 << kBits) - 1, kBoth = (1 << (2 * kBits)) - 1;
    const __m512i v = kBits == 3 ? both(s) : raw[s * kBits / 4];
    *a = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(kLow << unit(s))));
    *all = v;
    if (kBits != 4) {
      *all = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(kBoth << unit(s))));
    }
  }

 private:
  __attribute__((always_inline)) inline void load_line(int i, const uint8_t* at) {
    const auto* line = reinterpret_cast<const __m512i_u*>(at + kLineBytes * i);
    __asm__ volatile("vmovdqu64 %1, %0\n\tprefetcht0 %2"
                     : "=v"(raw[i])
                     : "m"(*line), "m"(at[kLineBytes * i + kPanelAhead]));
  }
};

// Scales of a group of 32 rows. Sums of the second half come 2^kShift times too large.
template <int kShift>
__attribute__((always_inline)) inline void load_panel_scales(const PackedMatrix& w,
                                                             const uint8_t* head, __m512d* scale) {
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    __m512 lanes;
    if (w.row_scale != nullptr) {
      const auto* bytes = reinterpret_cast<const __m128i*>(head + kLanes * t);
      lanes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
    } else {
      lanes = load_floats(head, w.scale_type, kLanes * t, 0xffff);
    }
    scale[2 * t] = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
    scale[2 * t + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1));
  }
  if constexpr (kShift > 0) {
    const __m512d unit = _mm512_set1_pd(1.0 / (1 << kShift));
    scale[2] = _mm512_mul_pd(scale[2], unit);
    scale[3] = _mm512_mul_pd(scale[3], unit);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
