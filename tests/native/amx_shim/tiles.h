// What kernels.cpp, the one file of the module that knows tiles, offers to module.cpp.
#pragma once

#include <cstdint>
#include <string>

namespace pyrobust {

struct TileCounters {
  int64_t configurations, releases, loads, stores, products;
};

// Of the calling thread, since the last call.
TileCounters take_tile_counters();

// sums (16, 16) += left (16, 64) times right (64, 16), the latter as (16, 16, 4): [k / 4][n][k %
// 4].
void tile_product(const int8_t* left, const uint8_t* right, int32_t* sums);

// Does the one thing that the processor would fault on; throws what the emulation throws.
void tile_fault(const std::string& name);

}  // namespace pyrobust
