// Philox4x32-10: 128 random bits as a pure function of a 128-bit counter and a 64-bit key.
// Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011; tested against the known answers of the authors' Random123 library.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

constexpr uint32_t kPhiloxMultiplier0 = 0xd2511f53u, kPhiloxMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9e3779b9u, kPhiloxWeyl1 = 0xbb67ae85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

// The whole 64 bits of a product. Written as one instruction on a GPU, where the compiler makes
// three of the C++.
PYROBUST_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

PYROBUST_HD PhiloxWords philox_round(PhiloxWords c, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = multiply_wide(c.word[0], kPhiloxMultiplier0);
  const uint64_t product1 = multiply_wide(c.word[2], kPhiloxMultiplier1);
  return {
      {static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
       static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
}

PYROBUST_HD PhiloxWords philox4x32(PhiloxWords counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  PhiloxWords c = counter;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    c = philox_round(c, key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

// The keys of all rounds, for callers that have them at hand as constants.
struct PhiloxKeys {
  uint32_t key[kPhiloxRounds][2];
};

PYROBUST_HD PhiloxKeys philox_keys(uint64_t key) {
  PhiloxKeys keys = {};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key[round][0] = static_cast<uint32_t>(key) + static_cast<uint32_t>(round) * kPhiloxWeyl0;
    keys.key[round][1] =
        static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(round) * kPhiloxWeyl1;
  }
  return keys;
}

PYROBUST_HD PhiloxWords philox4x32(PhiloxWords counter, const PhiloxKeys& keys) {
  PhiloxWords c = counter;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    c = philox_round(c, keys.key[round][0], keys.key[round][1]);
  }
  return c;
}

// Many counters that differ in the first word, `block`, times many that differ in the second,
// `sample`. Of the first three rounds all that depends on one of the two alone is found once: of
// a counter 15 wide products and 17 exclusive ors are left, of 20 each.
struct PhiloxBlock {
  uint32_t after_second;  // what each of these rounds adds to words that depend on the sample
  uint32_t third_first;
  uint32_t third_third;
  uint32_t third_last;
};
struct PhiloxSample {
  uint32_t low;  // the first product of the second round
  uint32_t high;
};

PYROBUST_HD PhiloxBlock philox_block(uint32_t block, uint32_t image, uint32_t last,
                                     const PhiloxKeys& keys) {
  const PhiloxWords first = philox_round({{block, 0, image, last}}, keys.key[0][0], keys.key[0][1]);
  const uint64_t second = multiply_wide(first.word[2], kPhiloxMultiplier1);
  const uint32_t word = static_cast<uint32_t>(second >> 32) ^ first.word[1] ^ keys.key[1][0];
  const uint64_t third = multiply_wide(word, kPhiloxMultiplier0);
  return {first.word[3] ^ keys.key[1][1], static_cast<uint32_t>(second) ^ keys.key[2][0],
          static_cast<uint32_t>(third >> 32) ^ keys.key[2][1], static_cast<uint32_t>(third)};
}

PYROBUST_HD PhiloxSample philox_sample(uint32_t sample, uint32_t image, const PhiloxKeys& keys) {
  const uint64_t first = multiply_wide(image, kPhiloxMultiplier1);
  const uint32_t word = static_cast<uint32_t>(first >> 32) ^ sample ^ keys.key[0][0];
  const uint64_t second = multiply_wide(word, kPhiloxMultiplier0);
  return {static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32)};
}

// philox4x32({{block, sample, image, last}}, keys)
PYROBUST_HD PhiloxWords philox4x32(const PhiloxBlock& block, const PhiloxSample& sample,
                                   const PhiloxKeys& keys) {
  const uint64_t third = multiply_wide(sample.high ^ block.after_second, kPhiloxMultiplier1);
  PhiloxWords c = {{static_cast<uint32_t>(third >> 32) ^ block.third_first,
                    static_cast<uint32_t>(third), sample.low ^ block.third_third,
                    block.third_last}};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 3; round < kPhiloxRounds; ++round) {
    c = philox_round(c, keys.key[round][0], keys.key[round][1]);
  }
  return c;
}

}  // namespace pyrobust
