// A uniform choice among `count` things: floor(count * u) for u uniform on [0, 1) with 64 bits, so
// that each probability is 1 / count to within 2^-64. The first 32 bits of u decide unless the bits
// that follow could carry into the next choice, which happens with probability count / 2^32.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

PYROBUST_HD bool choice_needs_more(uint32_t count, uint32_t bits) {
  const uint32_t below = static_cast<uint32_t>(static_cast<uint64_t>(count) * bits);
  return below > 0u - count;  // below + count > 2^32
}

// For bits that need no more; 0 where count is 0.
PYROBUST_HD uint32_t choice_from_bits(uint32_t count, uint32_t bits) {
  return static_cast<uint32_t>(static_cast<uint64_t>(count) * bits >> 32);
}

PYROBUST_HD uint32_t choice_refined(uint32_t count, uint32_t bits, uint32_t extra) {
  const uint64_t carry = static_cast<uint64_t>(count) * extra >> 32;
  return static_cast<uint32_t>((static_cast<uint64_t>(count) * bits + carry) >> 32);
}

}  // namespace pyrobust
