// The AMX kernels' source over emulated tiles, and probes of the emulation itself.
#define PYROBUST_EMULATED_TILES
#include <stdexcept>

#include "matmul/amx.cpp"
#include "tiles.h"

namespace pyrobust {
namespace {

using namespace matmul;

tile::Config full_config() {
  tile::Config config;
  for (int i = 0; i < tile::kCount; ++i) config.set(i, tile::kMaxRows, tile::kMaxRowBytes);
  return config;
}

void configured_with(int index, int64_t rows, int64_t row_bytes) {
  tile::Config config = full_config();
  config.rows[index] = static_cast<uint8_t>(rows);
  config.row_bytes[index] = static_cast<uint16_t>(row_bytes);
  tile::configure(config);
  uint8_t memory[1024] = {};
  tile::load<1>(memory, 64);
  tile::load<2>(memory, 64);
  tile::zero<0>();
  tile::multiply_signed_unsigned<0, 1, 2>();
}

}  // namespace

TileCounters take_tile_counters() {
  const tile::Counters seen = tile::state().counters;
  tile::state().counters = tile::Counters();
  return {seen.configurations, seen.releases, seen.loads, seen.stores, seen.products};
}

void tile_product(const int8_t* left, const uint8_t* right, int32_t* sums) {
  tile::configure(full_config());
  tile::load<0>(sums, 64);
  tile::load<1>(left, 64);
  tile::load<2>(right, 64);
  tile::multiply_signed_unsigned<0, 1, 2>();
  tile::store<0>(sums, 64);
  tile::release();
}

void tile_fault(const std::string& name) {
  tile::release();
  uint8_t memory[1024] = {};
  if (name == "palette") {
    tile::Config config = full_config();
    config.palette = 2;
    tile::configure(config);
  } else if (name == "reserved") {
    tile::Config config = full_config();
    config.reserved[3] = 1;
    tile::configure(config);
  } else if (name == "ninth") {
    configured_with(8, 1, 4);
  } else if (name == "rows") {
    configured_with(3, 17, 64);
  } else if (name == "row_bytes") {
    configured_with(3, 16, 68);
  } else if (name == "no_bytes") {
    configured_with(3, 16, 0);
  } else if (name == "not_configured") {
    tile::load<0>(memory, 64);
  } else if (name == "released") {
    tile::configure(full_config());
    tile::release();
    tile::zero<0>();
  } else if (name == "no_rows") {
    configured_with(1, 0, 0);
  } else if (name == "not_written") {
    tile::configure(full_config());
    tile::store<0>(memory, 64);
  } else if (name == "sum_rows") {
    configured_with(0, 8, 64);
  } else if (name == "sum_columns") {
    configured_with(0, 16, 32);
  } else if (name == "common_size") {
    configured_with(1, 16, 32);
  } else if (name == "dwords") {
    configured_with(1, 16, 63);
  } else {
    throw std::invalid_argument("no such fault: " + name);
  }
}

}  // namespace pyrobust
