// What kernels.cpp and interval.cpp, the files of the module that know tiles, offer to module.cpp.
#pragma once

#include <cstdint>
#include <string>

namespace pyrobust {

struct TileCounters {
  int64_t configurations, releases, loads, stores, products;
};

// Of the calling thread, since the last call: of packed products, and of interval products.
TileCounters take_tile_counters();
TileCounters take_interval_counters();

// Whether products of bfloat16 add in the worst way that interval.h allows for, or as the manual
// says.
void cut_bfloat16_sums(bool cut);

// sums (16, 16) += left (16, 32) times right (32, 16) in bfloat16, the latter as (16, 16, 2):
// [k / 2][n][k % 2].
void bfloat16_product(const uint16_t* left, const uint16_t* right, float* sums);

// sums (16, 16) += left (16, 64) times right (64, 16), the latter as (16, 16, 4): [k / 4][n][k %
// 4].
void tile_product(const int8_t* left, const uint8_t* right, int32_t* sums);

// Does the one thing that the processor would fault on; throws what the emulation throws.
void tile_fault(const std::string& name);

}  // namespace pyrobust
