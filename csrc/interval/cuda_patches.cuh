// Patches of images as columns of bfloat16 operands: each pixel is split once, then only copied.
#pragma once

#include "interval/cuda_split.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {

struct SplitPixelsWork {
  const float* lower;
  const float* upper;
  int64_t count;
  bool vectors;
  Constants constants;
  uint32_t* pixels;
};

PYROBUST_KERNEL(kPrepareThreads) split_pixels_kernel(const __grid_constant__ SplitPixelsWork work) {
  const int64_t at = (int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x) * kFour;
  const int64_t left = work.count - at;
  if (left <= 0) return;
  float low[kFour], high[kFour];
  load_four(work.lower + at, left, work.vectors, low);
  load_four(work.upper + at, left, work.vectors, high);
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < left) {
      cuda::store8(work.pixels + 2 * (at + i), split_term(low[i], high[i], 0.0f, work.constants));
    }
  }
}

struct PatchesWork {
  SplitPatches to;
  Constants constants;
};

// Place of a patch's first value, of the first channel of its group.
PYROBUST_DEVICE int64_t patch_base(const SplitPatches& to, int64_t group, int64_t patch) {
  const auto pixels = static_cast<uint32_t>(to.window.out_height * to.window.out_width);
  const auto width = static_cast<uint32_t>(to.window.out_width), m = static_cast<uint32_t>(patch);
  const int64_t y = m % pixels / width * to.window.stride_height;
  const int64_t x = m % pixels % width * to.window.stride_width;
  const int64_t channel =
      m / pixels * to.images.channels + group * (to.images.channels / to.window.groups);
  return (channel * to.images.height + y) * to.images.width + x;
}

// Distance of a term's value from there.
PYROBUST_DEVICE int64_t term_offset(const SplitPatches& to, int64_t term) {
  const auto across = static_cast<uint32_t>(to.window.kernel_width),
             k = static_cast<uint32_t>(term);
  const auto area = static_cast<uint32_t>(to.window.kernel_height) * across;
  const int64_t y = k % area / across * to.window.dilation_height;
  const int64_t x = k % area % across * to.window.dilation_width;
  return (int64_t{k / area} * to.images.height + y) * to.images.width + x;
}

PYROBUST_DEVICE cuda::Words2 load_pixel(const uint32_t* pixels, int64_t place) {
  const uint64_t both = reinterpret_cast<const uint64_t*>(pixels)[place];
  return {{static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)}};
}

constexpr int kPatchThreads = 128;
constexpr int64_t kPatchesOfBlock = kPatchThreads * kFour;

// A thread a patch and group: what the rounding of activations adds to its radii.
PYROBUST_KERNEL(kPatchThreads) extra_patches_kernel(const __grid_constant__ PatchesWork work) {
  const SplitPatches& to = work.to;
  const int64_t patch = int64_t{blockIdx.x} * kPatchThreads + threadIdx.x, group = blockIdx.y;
  if (patch >= to.images.batch * to.window.out_height * to.window.out_width) return;
  const int64_t base = patch_base(to, group, patch);
  float widest = 0.0f;
  for (int64_t k = 0; k < to.sum.terms; ++k) {
    const cuda::Words2 part = load_pixel(to.pixels, base + term_offset(to, k));
    const float centre =
        cuda::add_up(fabsf(cuda::low_bf16(part.word[0])), fabsf(cuda::high_bf16(part.word[0])));
    const float reach = cuda::add_up(centre, cuda::low_bf16(part.word[1]));
    widest = reach > widest ? reach : widest;
  }
  to.extra[group * to.columns + patch] = extra_of(widest, work.constants);
}

// A block copies kTermsOfBlock terms of 512 patches, four patches a thread.
PYROBUST_KERNEL(kPatchThreads) unfold_kernel(const __grid_constant__ PatchesWork work) {
  const SplitPatches& to = work.to;
  const int64_t blocks = (to.sum.padded + kTermsOfBlock - 1) / kTermsOfBlock;
  const int64_t group = blockIdx.y / blocks, begin = blockIdx.y % blocks * kTermsOfBlock;
  const int64_t first = (int64_t{blockIdx.x} * kPatchThreads + threadIdx.x) * kFour;
  if (first >= to.columns) return;
  const int64_t patches = to.images.batch * to.window.out_height * to.window.out_width;
  int64_t base[kFour];
  float extra[kFour];
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const int64_t patch = first + i < patches ? first + i : 0;
    base[i] = patch_base(to, group, patch);
    extra[i] = to.extra != nullptr ? to.extra[group * to.columns + patch] : 0.0f;
  }
  const int64_t plane = to.window.groups * to.sum.padded * to.columns;
  const int64_t end = begin + kTermsOfBlock < to.sum.padded ? begin + kTermsOfBlock : to.sum.padded;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t offset = term_offset(to, k < to.sum.terms ? k : 0);
    cuda::Words2 parts[kFour];
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      parts[i] = load_pixel(to.pixels, base[i] + offset);
      if (to.extra != nullptr) {
        parts[i].word[1] =
            radius_half(cuda::low_bf16(parts[i].word[1]), extra[i], work.constants.outward);
      }
      if (k >= to.sum.terms || first + i >= patches) parts[i] = cuda::Words2{{0u, 0u}};
    }
    store_four(parts, to.planes + (group * to.sum.padded + k) * to.columns + first, plane);
  }
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
