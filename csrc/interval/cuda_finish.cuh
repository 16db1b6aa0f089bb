// Sums of a library's products to outward ends, four outputs a thread (cuda_library.h: Finish).
#pragma once

#include "interval/cuda_split.cuh"
#include "interval/ends.h"

namespace pyrobust {
namespace interval {
namespace gpu {

struct FinishWork {
  Finish to;
  Constants constants;
  float offset;
  bool load_vectors;
  bool store_vectors;
};

PYROBUST_DEVICE void store_ends(const float (&ends)[kFour], int64_t left, bool vectors, float* to) {
  if (vectors && left >= kFour) {
    cuda::store16(to, {{bits_of_float(ends[0]), bits_of_float(ends[1]), bits_of_float(ends[2]),
                        bits_of_float(ends[3])}});
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < left) to[i] = ends[i];
  }
}

// Where column m of row `output` goes, in images.
PYROBUST_DEVICE int64_t image_place(const Finish& to, int64_t output, int64_t m) {
  const auto pixels = static_cast<uint32_t>(to.pixels), patch = static_cast<uint32_t>(m);
  return (int64_t{patch / pixels} * to.outer + output) * to.pixels + patch % pixels;
}

PYROBUST_DEVICE void add_four(const float* from, int64_t left, bool vectors, float (&sum)[kFour]) {
  float more[kFour];
  load_four(from, left, vectors, more);
#pragma unroll
  for (int i = 0; i < kFour; ++i) sum[i] += more[i];
}

// The sum of `count` results, each `apart` from the one before.
PYROBUST_DEVICE void load_parts(const float* from, int64_t count, int64_t apart, int64_t left,
                                bool vectors, float (&sum)[kFour]) {
  load_four(from, left, vectors, sum);
  for (int64_t i = 1; i < count; ++i) add_four(from + i * apart, left, vectors, sum);
}

PYROBUST_KERNEL(kPrepareThreads) finish_kernel(const __grid_constant__ FinishWork work) {
  const Finish& to = work.to;
  const int64_t segments = segments_of(to.inner), row = blockIdx.x / segments;
  const int64_t at = (blockIdx.x % segments * kPrepareThreads + threadIdx.x) * kFour;
  const int64_t left = (to.pixels != 0 ? to.patches : to.inner) - at;
  if (left <= 0) return;
  const int64_t rows = to.outer / to.groups, chunk_size = rows * to.inner;
  const int64_t place = row * to.inner + at;
  const int64_t chunked = (row / rows * to.sum.chunks * rows + row % rows) * to.inner + at;
  const int64_t parts = to.in_chunks ? to.sum.chunks : 1, part = to.in_chunks ? chunked : place;
  float centre[kFour], radius[kFour], low[kFour];
  load_parts(to.first + chunked, to.sum.chunks, chunk_size, left, work.load_vectors, centre);
  load_parts(to.low + part, parts, chunk_size, left, work.load_vectors, low);
#pragma unroll
  for (int i = 0; i < kFour; ++i) centre[i] += low[i];
  if (to.second != nullptr) add_four(to.second + place, left, work.load_vectors, centre);
  load_parts(to.radius + part, parts, chunk_size, left, work.load_vectors, radius);
  float lower[kFour], upper[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    float shift = 0.0f;
    if (to.bias != nullptr && i < left) shift = to.bias[to.pixels != 0 ? row : at + i];
    finish_one(centre[i], radius[i], shift, work.offset, work.constants, lower + i, upper + i);
  }
  if (to.pixels == 0 || work.store_vectors) {
    const int64_t out = to.pixels == 0 ? row * to.stride + at : image_place(to, row, at);
    store_ends(lower, left, work.store_vectors, to.out_lower + out);
    store_ends(upper, left, work.store_vectors, to.out_upper + out);
    return;
  }
  for (int i = 0; i < kFour && i < left; ++i) {
    const int64_t out = image_place(to, row, at + i);
    to.out_lower[out] = lower[i];
    to.out_upper[out] = upper[i];
  }
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
