// Philox4x32-10 for sixteen or thirty-two counters at once, in registers. Included by avx512.cpp
// only.
//
// A state vector holds one 32-bit word of eight counters, one per 64-bit lane; upper halves collect
// rubbish that no multiplication reads. Two vectors (even and odd counters) make a tile, and two
// tiles are run together: the ten rounds are one chain of 70 cycles, of which a tile alone would
// wait for a third. The last round leaves its words merged, even and odd, ready to be used.
#pragma once

#include <immintrin.h>

#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

constexpr int kMiddleRounds = kPhiloxRounds - 3;  // all but the first two and the last
constexpr __mmask16 kOddWords = 0xaaaa, kEvenWords = 0x5555;
constexpr _MM_PERM_ENUM kLowUp = _MM_PERM_ENUM(0xa0), kHighDown = _MM_PERM_ENUM(0xf5);

inline __m512i broadcast(uint32_t word) { return _mm512_set1_epi64(word); }

inline __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// What does not change along a row: the round keys, and the half of the first two rounds that is
// the same in every counter (only word 0 differs between the counters of a row).
struct RowKeys {
  __m512i key0[kMiddleRounds + 1];
  __m512i key1[kMiddleRounds + 1];
  __m512i second2;
  __m512i third0;
  __m512i third2;
  __m512i third3;
};

inline RowKeys row_keys(const Stream& stream, uint32_t purpose) {
  const PhiloxWords first = stream_counter(stream, 0, purpose);
  const uint32_t key0 = static_cast<uint32_t>(stream.seed);
  const uint32_t key1 = static_cast<uint32_t>(stream.seed >> 32);
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * first.word[2];
  const uint32_t second0 = static_cast<uint32_t>(product1 >> 32) ^ first.word[1] ^ key0;
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * second0;
  RowKeys keys;
  keys.second2 = broadcast(first.word[3] ^ key1);
  keys.third0 = broadcast(static_cast<uint32_t>(product1) ^ (key0 + kPhiloxWeyl0));
  keys.third2 = broadcast(static_cast<uint32_t>(product0 >> 32) ^ (key1 + kPhiloxWeyl1));
  keys.third3 = broadcast(static_cast<uint32_t>(product0));
  for (uint32_t round = 0; round <= kMiddleRounds; ++round) {  // in both halves, for the last round
    keys.key0[round] = _mm512_set1_epi32(static_cast<int>(key0 + (round + 2) * kPhiloxWeyl0));
    keys.key1[round] = _mm512_set1_epi32(static_cast<int>(key1 + (round + 2) * kPhiloxWeyl1));
  }
  return keys;
}

inline void first_rounds(const RowKeys& keys, __m512i block, __m512i c[kWords]) {
  const __m512i product0 = _mm512_mul_epu32(broadcast(kPhiloxMultiplier0), block);
  const __m512i second2 = _mm512_xor_si512(_mm512_srli_epi64(product0, 32), keys.second2);
  const __m512i product1 = _mm512_mul_epu32(broadcast(kPhiloxMultiplier1), second2);
  c[0] = _mm512_xor_si512(_mm512_srli_epi64(product1, 32), keys.third0);
  c[1] = product1;
  c[2] = _mm512_xor_si512(product0, keys.third2);
  c[3] = keys.third3;
}

inline void middle_round(const RowKeys& keys, int round, __m512i c[kWords]) {
  const __m512i product0 = _mm512_mul_epu32(broadcast(kPhiloxMultiplier0), c[0]);
  const __m512i product1 = _mm512_mul_epu32(broadcast(kPhiloxMultiplier1), c[2]);
  c[0] = xor3(_mm512_srli_epi64(product1, 32), c[1], keys.key0[round]);
  c[2] = xor3(_mm512_srli_epi64(product0, 32), c[3], keys.key1[round]);
  c[1] = product1;
  c[3] = product0;
}

inline __m512i low_halves(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(even, kOddWords, odd, kLowUp);
}

inline __m512i high_halves(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(odd, kEvenWords, even, kHighDown);
}

// The last round of both halves of a tile; merging before the exclusive-or saves four operations.
inline void last_round(const RowKeys& keys, const __m512i even[kWords], const __m512i odd[kWords],
                       __m512i* bits) {
  const __m512i multiplier0 = broadcast(kPhiloxMultiplier0);
  const __m512i multiplier1 = broadcast(kPhiloxMultiplier1);
  const __m512i even0 = _mm512_mul_epu32(multiplier0, even[0]);
  const __m512i odd0 = _mm512_mul_epu32(multiplier0, odd[0]);
  const __m512i even1 = _mm512_mul_epu32(multiplier1, even[2]);
  const __m512i odd1 = _mm512_mul_epu32(multiplier1, odd[2]);
  bits[0] = xor3(high_halves(even1, odd1), low_halves(even[1], odd[1]), keys.key0[kMiddleRounds]);
  bits[1] = low_halves(even1, odd1);
  bits[2] = xor3(high_halves(even0, odd0), low_halves(even[3], odd[3]), keys.key1[kMiddleRounds]);
  bits[3] = low_halves(even0, odd0);
}

// The words of kTiles tiles from `tile` on: bits[4 t + w] holds word w of tile t, lane by lane.
template <int kTiles>
inline void random_words(const RowKeys& keys, int64_t tile, __m512i* bits) {
  __m512i c[2 * kTiles][kWords];
  const __m512i start = _mm512_set1_epi64(tile * kLanes);
#pragma GCC unroll 4
  for (int half = 0; half < 2 * kTiles; ++half) {
    const int64_t at = half / 2 * kLanes + half % 2;
    const __m512i offsets =
        _mm512_setr_epi64(at, at + 2, at + 4, at + 6, at + 8, at + 10, at + 12, at + 14);
    first_rounds(keys, _mm512_add_epi64(start, offsets), c[half]);
  }
#pragma GCC unroll 8
  for (int round = 0; round < kMiddleRounds; ++round) {
#pragma GCC unroll 4
    for (int half = 0; half < 2 * kTiles; ++half) middle_round(keys, round, c[half]);
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) last_round(keys, c[2 * t], c[2 * t + 1], bits + kWords * t);
}

}  // namespace
}  // namespace sampling
}  // namespace pyrobust
