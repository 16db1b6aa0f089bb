// Philox4x32-10 for eight counters at once, in registers. Included by avx2.cpp only.
//
// A state vector holds one 32-bit word of four counters, one per 64-bit lane.
#pragma once

#include <immintrin.h>

#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

struct TileBits {
  alignas(32) uint32_t bits[kTile];
};

// The state of eight consecutive counters: `even` holds counters 0, 2, 4, 6 and `odd` the others,
// one 32-bit word per 64-bit lane. The upper halves collect rubbish that no multiplication reads.
struct Eight {
  __m256i even[kWords];
  __m256i odd[kWords];
};

inline __m256i broadcast(uint32_t word) { return _mm256_set1_epi64x(word); }

inline __m256i high_product(__m256i product) { return _mm256_srli_epi64(product, 32); }

inline void philox_round(__m256i c[kWords], __m256i key0, __m256i key1) {
  const __m256i product0 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier0), c[0]);
  const __m256i product1 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier1), c[2]);
  c[0] = _mm256_xor_si256(high_product(product1), _mm256_xor_si256(c[1], key0));
  c[2] = _mm256_xor_si256(high_product(product0), _mm256_xor_si256(c[3], key1));
  c[1] = product1;
  c[3] = product0;
}

// The first two rounds: only word 0 differs between the counters of a tile, so half of each round
// is the same in every lane and done once, in scalar registers.
inline void first_rounds(const PhiloxWords& first, uint32_t key0, uint32_t key1, __m256i block,
                         __m256i c[kWords]) {
  const uint64_t uniform1 = static_cast<uint64_t>(kPhiloxMultiplier1) * first.word[2];
  const uint32_t second0 = static_cast<uint32_t>(uniform1 >> 32) ^ first.word[1] ^ key0;
  const uint64_t uniform0 = static_cast<uint64_t>(kPhiloxMultiplier0) * second0;
  const __m256i product0 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier0), block);
  const __m256i second2 = _mm256_xor_si256(high_product(product0), broadcast(first.word[3] ^ key1));
  const __m256i product1 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier1), second2);
  const uint32_t next0 = static_cast<uint32_t>(uniform1) ^ (key0 + kPhiloxWeyl0);
  const uint32_t next2 = static_cast<uint32_t>(uniform0 >> 32) ^ (key1 + kPhiloxWeyl1);
  c[0] = _mm256_xor_si256(high_product(product1), broadcast(next0));
  c[1] = product1;
  c[2] = _mm256_xor_si256(product0, broadcast(next2));
  c[3] = broadcast(static_cast<uint32_t>(uniform0));
}

// The round keys from the third round on, ready to be used from memory.
struct KeySchedule {
  __m256i key0[kPhiloxRounds - 2];
  __m256i key1[kPhiloxRounds - 2];
};

KeySchedule schedule_keys(uint64_t seed) {
  KeySchedule keys;
  for (uint32_t round = 2; round < kPhiloxRounds; ++round) {
    keys.key0[round - 2] = broadcast(static_cast<uint32_t>(seed) + round * kPhiloxWeyl0);
    keys.key1[round - 2] = broadcast(static_cast<uint32_t>(seed >> 32) + round * kPhiloxWeyl1);
  }
  return keys;
}

// Eight counters from `block` on; word w goes to out[16 w .. 16 w + 7].
inline void random_eight(const Stream& stream, const KeySchedule& keys, const PhiloxWords& first,
                         uint32_t block, uint32_t* out) {
  const uint32_t key0 = static_cast<uint32_t>(stream.seed);
  const uint32_t key1 = static_cast<uint32_t>(stream.seed >> 32);
  const __m256i start = broadcast(block);
  Eight c;
  first_rounds(first, key0, key1, _mm256_add_epi64(start, _mm256_setr_epi64x(0, 2, 4, 6)), c.even);
  first_rounds(first, key0, key1, _mm256_add_epi64(start, _mm256_setr_epi64x(1, 3, 5, 7)), c.odd);
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds - 2; ++round) {
    philox_round(c.even, keys.key0[round], keys.key1[round]);
    philox_round(c.odd, keys.key0[round], keys.key1[round]);
  }
#pragma GCC unroll 4
  for (int word = 0; word < kWords; ++word) {
    const __m256i high = _mm256_slli_epi64(c.odd[word], 32);
    const __m256i lanes = _mm256_blend_epi32(c.even[word], high, 0b10101010);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + word * kLanes), lanes);
  }
}

void random_words(const Stream& stream, const KeySchedule& keys, uint32_t purpose, int64_t tile,
                  TileBits& out) {
  const uint32_t block = static_cast<uint32_t>(tile * kLanes);
  const PhiloxWords first = stream_counter(stream, block, purpose);
  random_eight(stream, keys, first, block, out.bits);
  random_eight(stream, keys, first, block + 8, out.bits + 8);
}

}  // namespace
}  // namespace sampling
}  // namespace pyrobust
