// A register of doubles from and to floats, the last of an array among them.
#pragma once

#include <cstring>

#include "interval/double_lanes.h"

namespace pyrobust {
namespace interval {
namespace {

inline HalfFloats to_nearest(Doubles value) { return __builtin_convertvector(value, HalfFloats); }

// Lanes of what is left of an array, the others one, where every function is finite.
struct Rest {
  float values[kDoubleLanes];
  Rest(const float* from, int64_t count) {
    for (float& value : values) value = 1.0f;
    std::memcpy(values, from, static_cast<size_t>(count) * sizeof(float));
  }
};

inline void store_lanes_of(float* to, int64_t count, HalfFloats values) {
  const int64_t lanes = count < kDoubleLanes ? count : kDoubleLanes;
  if (lanes == kDoubleLanes) {
    std::memcpy(to, &values, sizeof(values));
  } else {
    std::memcpy(to, &values, static_cast<size_t>(lanes) * sizeof(float));
  }
}

inline Doubles load_lanes_of(const float* from, int64_t count) {
  return count >= kDoubleLanes ? load_doubles(from) : load_doubles(Rest(from, count).values);
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
