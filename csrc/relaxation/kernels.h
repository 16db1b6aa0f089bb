// Internal to the relaxation family: what an instruction set supplies.
#pragma once

#include "relaxation/relaxation.h"

namespace pyrobust {
namespace relaxation {

struct RelaxationKernels {
  // One row of one image.
  void (*bend)(const Bend& work, int64_t row, int64_t image, float* pulled, float* value);
  // All rows of one image.
  void (*unbend)(const Bend& work, const Gradients& gradients, int64_t image);
};

// A null table: the build has no such path.
extern const RelaxationKernels kPortableKernels;
const RelaxationKernels* avx2_kernels();
const RelaxationKernels* avx512_kernels();

}  // namespace relaxation
}  // namespace pyrobust
