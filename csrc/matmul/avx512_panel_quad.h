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

// Bytes of the stream that products ask for ahead of themselves. Zen 5 wants 1 to 4 KiB, past what
// its own prefetcher does within a page. That of Zen 4 (family 19h; Zen 3 there has no AVX-512)
// does more by itself, and far requests are in its way: 8 bits from the third cache took 262 us
// with 2048 and 205 with 256, from memory 5700 and 4260 (one thread).
inline int64_t panel_ahead() {
  constexpr int64_t kFar = 2048, kNear = 256;
  return __builtin_cpu_is("amdfam19h") != 0 ? kNear : kFar;
}

__attribute__((always_inline)) inline void prefetch_lines(const uint8_t* at, int64_t bytes) {
  for (const uint8_t* end = at + bytes; at < end; at += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
}

// A group's scales and zeros are lines of the same stream. Prefetching for codes alone would leave
// out as many lines a group, and each of those would hold up the loop.
__attribute__((always_inline)) inline void prefetch_head(const PanelLayout& layout,
                                                         const uint8_t* head, int64_t ahead) {
  prefetch_lines(head + ahead, layout.head_bytes);
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
  __attribute__((always_inline)) inline void load_step(int s, const uint8_t* at, int64_t ahead) {
    if constexpr (kBits == 8) {
      load_line(2 * s, at, ahead);
      load_line(2 * s + 1, at, ahead);
    } else if constexpr (kBits >= 3) {
      if (s < kBits) load_line(s, at, ahead);
    } else if (s % (4 / kBits) == 0) {
      load_line(s * kBits / 4, at, ahead);
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
  __attribute__((always_inline)) inline void load_line(int i, const uint8_t* at, int64_t ahead) {
    const auto* line = reinterpret_cast<const __m512i_u*>(at + kLineBytes * i);
    __asm__ volatile("vmovdqu64 %1, %0\n\tprefetcht0 %2"
                     : "=v"(raw[i])
                     : "m"(*line), "m"(at[kLineBytes * i + ahead]));
  }
};

// Scales of rows 8 l .. 8 l + 7 of a group. Eight at a time need no halves of registers, which
// shuffles would have to take apart.
__attribute__((always_inline)) inline __m256 eight_panel_scales(const PackedMatrix& w,
                                                                const uint8_t* head, int l) {
  if (w.row_scale != nullptr) {
    const auto* bytes = reinterpret_cast<const __m128i*>(head + 8 * l);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes)));
  }
  if (w.scale_type == FloatType::kFloat32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(head) + 8 * l);
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(head) + l);
  if (w.scale_type == FloatType::kFloat16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Scales of a group of 32 rows. Sums of the second half come 2^kShift times too large.
template <int kShift>
__attribute__((always_inline)) inline void load_panel_scales(const PackedMatrix& w,
                                                             const uint8_t* head, __m512d* scale) {
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) scale[l] = _mm512_cvtps_pd(eight_panel_scales(w, head, l));
  if constexpr (kShift > 0) {
    const __m512d unit = _mm512_set1_pd(1.0 / (1 << kShift));
    scale[2] = _mm512_mul_pd(scale[2], unit);
    scale[3] = _mm512_mul_pd(scale[3], unit);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
