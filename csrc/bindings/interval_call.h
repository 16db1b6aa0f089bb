// What both ways into the interval kernels read the same way.
#pragma once

#include <string>

#include "interval/interval.h"

namespace pyrobust {

// The promise, and how far the arithmetic that it covers moves an operand.
struct Promise {
  interval::Rounding rounding;
  float operand_error;
};

// Throws for an unknown name.
Promise parse_rounding(const std::string& name);

// Whether radii may be multiplied in bfloat16.
bool coarse_radius_allowed();

}  // namespace pyrobust
