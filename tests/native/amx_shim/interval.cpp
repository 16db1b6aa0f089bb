// The AMX kernels of interval bounds over emulated tiles.
#define PYROBUST_EMULATED_TILES
#include "interval/amx.cpp"
#include "tiles.h"

namespace pyrobust {

using namespace interval;

TileCounters take_interval_counters() {
  const tile::Counters seen = tile::state().counters;
  tile::state().counters = tile::Counters();
  return {seen.configurations, seen.releases, seen.loads, seen.stores, seen.products};
}

void cut_bfloat16_sums(bool cut) {
  tile::additions() = cut ? tile::Additions::kCut : tile::Additions::kManual;
}

void bfloat16_product(const uint16_t* left, const uint16_t* right, float* sums) {
  configure_tiles();
  tile::load<0>(sums, 64);
  tile::load<1>(left, 64);
  tile::load<2>(right, 64);
  tile::multiply_bfloat16<0, 1, 2>();
  tile::store<0>(sums, 64);
  tile::release();
}

}  // namespace pyrobust
