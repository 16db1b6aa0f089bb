// A coin that falls on "keep" with probability exactly threshold / 2^64. The first 32 bits decide
// all but one in 2^32 draws, those 32 more.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

PYROBUST_HD bool keep_needs_more(uint64_t threshold, uint32_t bits) {
  return bits == static_cast<uint32_t>(threshold >> 32);
}

// For bits that need no more.
PYROBUST_HD bool keep_from_bits(uint64_t threshold, uint32_t bits) {
  return bits < static_cast<uint32_t>(threshold >> 32);
}

PYROBUST_HD bool keep_refined(uint64_t threshold, uint32_t bits, uint32_t extra) {
  return (static_cast<uint64_t>(bits) << 32 | extra) < threshold;
}

}  // namespace pyrobust
