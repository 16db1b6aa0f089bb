// Elementwise passes of the backward pass: the two products of a layer work on centres and radii,
// autograd on ends. Plain round to nearest: a gradient promises nothing.
#pragma once

#include <cstdint>

namespace pyrobust {
namespace interval {

// What belongs to radii, in float32 or, where their products take it, in bfloat16.
struct Radii {
  void* values;
  bool bfloat16;
};

// c = (u + l) / 2 and r = (u - l) / 2 of the ends; `rectified` takes max(0, .) of the ends first.
struct SplitEnds {
  const float* lower;
  const float* upper;
  int64_t count;
  bool rectified;
  float* centre;
  Radii radius;
};
void split_ends(const SplitEnds& work, int num_threads);

// Gradients of centre and radius, u + l and u - l, from those of the ends.
struct SplitGradients {
  const float* to_lower;
  const float* to_upper;
  int64_t count;
  float* to_centre;
  Radii to_radius;
};
void split_gradients(const SplitGradients& work, int num_threads);

// The way back, (c - r) / 2 and (c + r) / 2; `lower` and `upper`, unless null, are ends before a
// ReLU, which stops the gradient where they are not positive. In place where the arrays are the
// same.
struct JoinGradients {
  const float* to_centre;
  Radii to_radius;
  const float* lower;
  const float* upper;
  int64_t count;
  float* to_lower;
  float* to_upper;
};
void join_gradients(const JoinGradients& work, int num_threads);

// |W|, which radii meet.
struct SizeOfWeight {
  const float* weight;
  int64_t count;
  Radii size;
};
void size_of_weight(const SizeOfWeight& work, int num_threads);

// from_centre += sign(weight) * from_radius
struct WeightGradient {
  float* from_centre;
  Radii from_radius;
  const float* weight;
  int64_t count;
};
void add_weight_gradient(const WeightGradient& work, int num_threads);

}  // namespace interval
}  // namespace pyrobust
