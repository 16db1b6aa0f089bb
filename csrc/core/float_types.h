// float16 and bfloat16 as bit patterns, and their conversions: exact to float32, to nearest even
// from it.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/host_device.h"

namespace pyrobust {

enum class FloatType : int { kFloat32, kFloat16, kBFloat16 };

PYROBUST_HD int64_t float_type_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

PYROBUST_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PYROBUST_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PYROBUST_HD float float_from_bfloat16(uint16_t half) {
  return float_from_bits(static_cast<uint32_t>(half) << 16);
}

PYROBUST_HD uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PYROBUST_HD float float_from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return float_from_bits(sign | bits_of_float(magnitude));
  }
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

PYROBUST_HD uint16_t float16_from_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: 2^-14 and above
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return static_cast<uint16_t>(sign | half);
}

PYROBUST_HD float load_float(const void* data, int64_t index, FloatType type) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return type == FloatType::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

PYROBUST_HD void store_float(void* data, int64_t index, FloatType type, float value) {
  if (type == FloatType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        type == FloatType::kFloat16 ? float16_from_float(value) : bfloat16_from_float(value);
  }
}

}  // namespace pyrobust
