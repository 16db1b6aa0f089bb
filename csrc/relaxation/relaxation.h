// Linear relaxation: coefficients of linear functions pulled back through a bend, a function of one
// number between a lower and an upper line, and the gradients of that. For training, in plain round
// to nearest; sound bounds are computed elsewhere.
//
//   a (S, B, N), lines (B, N)  ->  pulled (S, B, N), value (S, B)
//
//   pulled = a k,   value = sum_N a t + pulled bias,
//   k, t = slope and shift of the lower line where a >= 0, of the upper one where a < 0.
//
// The bias is that of the layer whose result is bent, one number for each of the N. A NaN stays
// one.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace relaxation {

// All arrays are dense and row-major.
struct Bend {
  const float* a;            // (rows, images, size)
  const float* lower_slope;  // (images, size), as the other lines
  const float* lower_shift;
  const float* upper_slope;
  const float* upper_shift;
  const float* bias;  // (size) or null
  int64_t rows;
  int64_t images;
  int64_t size;
};

// pulled (rows, images, size); value (rows, images) or null.
void bend(const Bend& work, float* pulled, float* value, int num_threads);

// What a loss changes by with each number: given for `pulled` and `value`, found for the rest.
// Every one of the latter may be null.
struct Gradients {
  const float* by_pulled;  // (rows, images, size)
  const float* by_value;   // (rows, images)
  float* by_a;             // (rows, images, size), may be by_pulled
  float* by_lower_slope;   // (images, size), as those below
  float* by_lower_shift;
  float* by_upper_slope;
  float* by_upper_shift;
  float* by_bias;  // its share of each image
};

void unbend(const Bend& work, const Gradients& gradients, int num_threads);

}  // namespace relaxation
}  // namespace pyrobust
