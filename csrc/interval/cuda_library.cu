// Launches before and after a library's products, and the constants of their proof.
#include "cuda/launch.h"
#include "interval/cuda_finish.cuh"
#include "interval/cuda_library.h"
#include "interval/cuda_patches.cuh"
#include "interval/cuda_split.cuh"

namespace pyrobust {
namespace interval {
namespace gpu {
namespace {

Constants library_constants(const LibrarySum& sum) {
  const double of_chunk = static_cast<double>(sum.padded / sum.chunks) * kTensorUnit;
  const double of_all = static_cast<double>(sum.padded) * kTensorUnit;
  const double tensor = 1.008 * of_chunk + 2.0 * 1.008 / 256.0 * of_all;
  const double gamma = rounding::gamma_bound(static_cast<double>(sum.chunks + 2));
  double centre = tensor + (kMagnitudes + tensor) * gamma;
  constexpr double kWithoutThird = 2.1 / 65536.0;  // W2 c_lo, and W less W1 + W2
  if (sum.two_parts) centre += kWithoutThird;
  return constants_of({centre, of_all}, sum.terms, sum.rounding, sum.packed);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

cuda::LaunchShape rows_shape(int64_t rows, int64_t inner) {
  return {static_cast<unsigned>(rows * segments_of(inner)), 1, kPrepareThreads, 0};
}

}  // namespace

cuda::Status split_weight(const SplitWeight& work, const cuda::Queue& queue) {
  if (work.rows == 0 || work.padded == 0) return 0;
  const SplitWeightWork with = {work, work.terms % kFour == 0 && aligned(work.weight)};
  return cuda::launch(split_weight_kernel, rows_shape(work.rows, work.padded), queue.stream, with);
}

cuda::Status split_rows(const SplitRows& work, const cuda::Queue& queue) {
  if (work.batch == 0 || work.sum.padded == 0) return 0;
  const bool vectors = work.sum.terms % kFour == 0 && aligned(work.lower) && aligned(work.upper);
  const SplitRowsWork with = {work, library_constants(work.sum), vectors};
  if (work.extra != nullptr) {
    const cuda::LaunchShape shape = {static_cast<unsigned>(work.batch), 1, kPrepareThreads, 128};
    const cuda::Status status = cuda::launch(extra_rows_kernel, shape, queue.stream, with);
    if (status != 0) return status;
  }
  return cuda::launch(split_rows_kernel, rows_shape(work.batch, work.sum.padded), queue.stream,
                      with);
}

bool split_patches_fits(int64_t groups, int64_t padded) {
  return groups * ((padded + kTermsOfBlock - 1) / kTermsOfBlock) <= kMostBlocks;
}

cuda::Status split_patches(const SplitPatches& work, const cuda::Queue& queue) {
  const Constants constants = library_constants(work.sum);
  const Images& images = work.images;
  const int64_t count = images.batch * images.channels * images.height * images.width;
  const SplitPixelsWork pixels = {work.lower, work.upper,
                                  count,      aligned(work.lower) && aligned(work.upper),
                                  constants,  work.pixels};
  cuda::Status status =
      cuda::launch(split_pixels_kernel, {blocks_of(count, kTermsOfSegment), 1, kPrepareThreads, 0},
                   queue.stream, pixels);
  if (status != 0) return status;
  const PatchesWork with = {work, constants};
  const auto groups = static_cast<unsigned>(work.window.groups);
  if (work.extra != nullptr) {
    status = cuda::launch(extra_patches_kernel,
                          {blocks_of(work.columns, kPatchThreads), groups, kPatchThreads, 0},
                          queue.stream, with);
    if (status != 0) return status;
  }
  const unsigned blocks = groups * blocks_of(work.sum.padded, kTermsOfBlock);
  return cuda::launch(unfold_kernel,
                      {blocks_of(work.columns, kPatchesOfBlock), blocks, kPatchThreads, 0},
                      queue.stream, with);
}

cuda::Status finish(const Finish& work, const cuda::Queue& queue) {
  if (work.outer == 0 || work.inner == 0) return 0;
  const Constants constants = library_constants(work.sum);
  const bool whole = work.inner % kFour == 0;
  const bool outputs = (work.pixels != 0 ? work.pixels : work.stride) % kFour == 0 &&
                       aligned(work.out_lower) && aligned(work.out_upper);
  const FinishWork with = {work, constants,
                           flush_of(work.sum.terms, work.sum.rounding, work.sum.packed),
                           whole && aligned(work.first) && aligned(work.low) &&
                               aligned(work.second) && aligned(work.radius),
                           whole && outputs};
  return cuda::launch(finish_kernel, rows_shape(work.outer, work.inner), queue.stream, with);
}

}  // namespace gpu
}  // namespace interval
}  // namespace pyrobust
