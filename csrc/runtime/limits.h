// What this machine can do at most, for measurements: reading memory, and 8-bit products of
// registers. The caller takes the time.
#pragma once

#include <cstdint>

namespace pyrobust {

// Reads `bytes` of `data`, aligned to 8 bytes, on `num_threads` threads; whole 512 bytes only.
// Returns the exclusive or of all 64-bit words read, so that no load can be dropped.
uint64_t read_words(const void* data, int64_t bytes, int num_threads);

// Multiplies registers of 64 bytes, 16 times a round, and returns how many products of two bytes
// were made and added; 0 where the processor has no AVX-512 VNNI.
int64_t multiply_bytes(int64_t rounds);

// Looks 32 sums of five bytes up and adds them (matmul/sign_tables.h), from registers, 16 times a
// round, and returns how many products of a byte and a sign these are; 0 as above.
int64_t look_words_up(int64_t rounds);

}  // namespace pyrobust
