// Eight lanes: portable.cpp's loops, compiled for the set.
#include "relaxation/loops.h"

namespace pyrobust {
namespace relaxation {
namespace {

constexpr RelaxationKernels kKernels = {bend_of_row, unbend_image};

}  // namespace

const RelaxationKernels* avx2_kernels() { return &kKernels; }

}  // namespace relaxation
}  // namespace pyrobust
