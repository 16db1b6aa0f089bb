// Picks the kernels and splits images over threads.
#include <algorithm>

#include "relaxation/kernels.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace relaxation {
namespace {

// Coefficients from which a thread of its own pays.
constexpr int64_t kGrain = int64_t{1} << 16;

RelaxationKernels pick_kernels() {
  const RelaxationKernels* table = &kPortableKernels;
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) table = avx2_kernels();
  if (current_isa() >= Isa::kAvx512) table = avx512_kernels();
#endif
  return *table;
}

int64_t images_of_a_thread(const Bend& work) {
  return kGrain / std::max<int64_t>(work.rows * work.size, 1) + 1;
}

}  // namespace

void bend(const Bend& work, float* pulled, float* value, int num_threads) {
  const RelaxationKernels table = pick_kernels();
  parallel_for(work.images, images_of_a_thread(work), 1, num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = 0; row < work.rows; ++row) {
                   for (int64_t image = begin; image < end; ++image) {
                     table.bend(work, row, image, pulled, value);
                   }
                 }
               });
}

void unbend(const Bend& work, const Gradients& gradients, int num_threads) {
  const RelaxationKernels table = pick_kernels();
  parallel_for(work.images, images_of_a_thread(work), 1, num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t image = begin; image < end; ++image) {
                   table.unbend(work, gradients, image);
                 }
               });
}

}  // namespace relaxation
}  // namespace pyrobust
