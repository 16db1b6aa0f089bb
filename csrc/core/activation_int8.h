// Dynamic symmetric rounding of one row of activations to 8 bits: the only definition of it.
//
//   step = max |x| / 127        (double, so that the smallest float32 rows keep their precision)
//   q    = x / step, rounded half to even: an integer in [-127, 127]
//
// The row the layer multiplies is step * q; each element differs from x by at most half a step (and
// a relative 2^-52 of it). A row of zeros has step 0 and q = 0. A row that holds a NaN or an
// infinity has step NaN and q = 0, so that everything computed from it is NaN.
#pragma once

#include <math.h>
#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

PYROBUST_HD double activation_step(const float* x, int64_t count) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = fabsf(x[i]);
    finite = finite && magnitude <= 3.4028234663852886e38f;
    largest = magnitude > largest ? magnitude : largest;
  }
  return finite ? static_cast<double>(largest) / 127.0 : static_cast<double>(NAN);
}

PYROBUST_HD int8_t quantized_activation(float x, double step) {
  if (!(step > 0.0)) return 0;
  return static_cast<int8_t>(static_cast<int>(rint(static_cast<double>(x) / step)));
}

PYROBUST_HD void quantize_activations(const float* x, int64_t count, double step, int8_t* q) {
  if (!(step > 0.0)) {
    for (int64_t i = 0; i < count; ++i) q[i] = 0;
    return;
  }
  for (int64_t i = 0; i < count; ++i) q[i] = quantized_activation(x[i], step);
}

}  // namespace pyrobust
