// 32 random bits to a uniform variate on [-1, 1], symmetric.
//
// With v the bits as a signed number the variate is v * 2^-31 rounded to float32; the exact uniform
// variate whose first 32 bits these are lies in [v, v + 1) * 2^-31. Error: at most kUniformError.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

constexpr double kUniformError = 3.1e-8;  // 2^-25 of the rounding and 2^-31 of the cut
constexpr float kUniformStep = 4.656612873077392578125e-10f;  // 2^-31

PYROBUST_HD float uniform_from_bits(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits)) * kUniformStep;
}

}  // namespace pyrobust
