// The tile instructions of AMX as functions, so that the kernel (amx_int8.h) has one source: asm
// statements here, or, where PYROBUST_EMULATED_TILES is defined, plain C++ in amx_tile_emulated.h,
// which also checks what the processor would fault on.
//
// A tile is up to 16 rows of up to 64 bytes; a Config gives the eight tiles their sizes, and none
// may be used before configure() or after release(), which a thread calls in pairs.
//
// gcc 12's own header is not used: its ldtilecfg reads 8 bytes as far as the compiler knows, and
// its tileloadd none, so that stores to the configuration or to a tile's memory may be dropped.
#pragma once

#include <cstdint>

namespace pyrobust::matmul {
namespace {
namespace tile {

constexpr int kCount = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxRowBytes = 64;

// The operand of LDTILECFG. Entries past kCount stay zero.
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int index, int64_t row_count, int64_t bytes) {
    rows[index] = static_cast<uint8_t>(row_count);
    row_bytes[index] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

#if !defined(PYROBUST_EMULATED_TILES)

inline void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows of the tile from `base` on, `stride` bytes apart.
template <int kTile>
inline void load(const void* base, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* base, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(kTile)
                   : "memory");
}

// sum[m][n] += the four products of signed bytes left[m][4 k ..] and unsigned ones
// right[k][4 n ..], over all k; int32 sums.
template <int kSum, int kLeft, int kRight>
inline void multiply_signed_unsigned() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// sum[m][n] += the products of bfloat16 left[m][2 k], left[m][2 k + 1] and right[k][2 n],
// right[k][2 n + 1], over all k; float32 sums, rounded to nearest, denormals taken for zero,
// whatever MXCSR says.
template <int kSum, int kLeft, int kRight>
inline void multiply_bfloat16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace tile
}  // namespace
}  // namespace pyrobust::matmul

#if defined(PYROBUST_EMULATED_TILES)
#include "matmul/amx_tile_emulated.h"
#endif
