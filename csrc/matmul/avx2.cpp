// Differs from portable.cpp in working on tiles and in 256-bit registers; see avx2_paths.h.
#include "matmul/avx2_gradient.h"
#include "matmul/avx2_paths.h"
#include "matmul/avx2_rows.h"
#include "matmul/gradient_sums.h"
#include "matmul/gradient_tile.h"

namespace pyrobust::matmul {
namespace {

constexpr MatmulKernels kKernels = {nullptr,
                                    prepared_bytes,
                                    scratch_bytes,
                                    prepare,
                                    multiply,
                                    kTile,
                                    decode_span<Avx2Codes>,
                                    add_span<Avx2Codes>,
                                    add_levels_span<Avx2Codes>,
                                    add_values_run,
                                    sparse_prepare,
                                    sparse_multiply,
                                    complex_order,
                                    complex_multiply,
                                    0,
                                    nullptr,
                                    nullptr,
                                    expand_row<Avx2Codes>,
                                    nullptr,
                                    lane_gradient_tile,
                                    add_gradient_tile,
                                    lane_gradient_order};

}  // namespace

const MatmulKernels* avx2_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
