// All that kernels may use beyond C++ and core/: each primitive has a device body (PTX) and an
// emulated one (cuda/fibres.h), so that one source compiles for every GPU from compute capability
// 8.0 on, and for the tests that run the kernels on the CPU.
//
// A kernel is
//
//   PYROBUST_KERNEL(kThreads) name(Arguments by value) {
//     uint8_t* shared = cuda::shared_memory();       // 1024-byte aligned; its size: LaunchShape
//     ... threadIdx.x, blockIdx.x, blockIdx.y, gridDim, blockDim, cuda::sync_threads() ...
//   }
//
// and is started by cuda::launch (cuda/launch.h). Static __shared__ arrays, printf, textures and
// intrinsics that are not below do not exist in the emulation. Warp-wide operations take all 32
// lanes. Functions that kernels share are PYROBUST_DEVICE, or PYROBUST_HD where tests call them.
//
//   asynchronous copies   copy16_async, copy16_async_or_zero, copy16_async_if, commit_copies,
//                         wait_copies<N>
//   matrices              ldmatrix_x4, ldmatrix_x2, ldmatrix_x4_transposed,
//                         mma_m16n8k16_f16, mma_m16n8k16_bf16, mma_m16n8k32_s8
//   words                 lop3<Table>, prmt, fma_f16x2, mul_f16x2, sub_f16x2, fma_bf16x2
//   conversions           pack_f16x2, pack_bf16x2, low_f16, high_f16, low_bf16, high_bf16
//   warps                 shuffle, shuffle_xor, shuffle_down, ballot, lowest_bit (of a word that
//                         has one), sync_warp, warp_sum, warp_max
//   warpgroups            operand_of, multiply_m64n64k16_f16, multiply_m64n64k16_bf16,
//                         multiply_m64n128k16_f16, multiply_m64n128k16_bf16,
//                         multiply_m64k16_bf16 (8, 16, 32 or 64 columns), begin_products,
//                         commit_products, finish_products<N>, show_to_products (compute
//                         capability 9.0 alone)
//   blocks and grids      sync_threads, sync_group, begin_next_grid, await_grid, lock_acquire,
//                         lock_release, arrive, atomic_add, atomic_min
//   clusters              clusters_exist, sync_cluster, load16_of_cluster (compute capability 9.0)
//   signals               make_signal, show_signals, arrive_at, arrive_expecting,
//                         arrive_with_copies, await_signal, copy_bulk, send16,
//                         begin_cluster_barrier, end_cluster_barrier (compute capability 9.0)
//   memory                shared_memory, shared_place, load16_shared, load8_shared, load4_shared,
//                         load16_of_table, load8_of_table, store16_shared, load16, load16_once,
//                         store16, store8, Words4, Words2
//   directed rounding     add_up, add_down, mul_up, fma_up, fma_down
//
// Fragments, with g = lane / 4 and t = lane % 4 (a word holds two halves, low one first):
//   mma m16n8k16   a[0] (row g,     k 2t, 2t+1)    a[2] the same row, k 2t+8, 2t+9
//                  a[1] (row g + 8, k 2t, 2t+1)    a[3] the same row, k 2t+8, 2t+9
//                  b[0] (k 2t, 2t+1, column g)     b[1] (k 2t+8, 2t+9, column g)
//                  d[0], d[1] (row g, columns 2t, 2t+1)   d[2], d[3] (row g + 8, the same)
//   mma m16n8k32   the same with four bytes a word: k 4t .. 4t+3, and 16 more in a[2], a[3], b[1]
//   warpgroup      m64n64k16, m64n128k16 of four warps: a is warp w's rows 16 w .. 16 w + 15 as
//                  above; d[m] is columns 8 m .. 8 m + 7 as above; b is 64 or 128 rows (its
//                  columns) of 64 halves in shared memory, 1024-byte aligned, 16-byte chunk c of
//                  row r where c ^ (r % 8) is
//   ldmatrix       lane l passes the address of row l % 8 (16 bytes) of matrix l / 8; r[i] is
//                  (row g, columns 2t, 2t+1) of matrix i, transposed: (rows 2t, 2t+1, column g)
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {
namespace cuda {

struct alignas(16) Words4 {
  uint32_t word[4];
};

struct alignas(8) Words2 {
  uint32_t word[2];
};

// The value of a function of three bits: lop3<f(kLopA, kLopB, kLopC)>, e.g. kLopA & kLopB | kLopC.
constexpr uint32_t kLopA = 0xf0, kLopB = 0xcc, kLopC = 0xaa;

}  // namespace cuda
}  // namespace pyrobust

#if defined(__CUDACC__)
#include "cuda/primitives_device.h"
#include "cuda/signals_device.h"
#else
#include "cuda/primitives_emulated.h"
#include "cuda/products_emulated.h"
#include "cuda/signals_emulated.h"
#endif

namespace pyrobust {
namespace cuda {

// Sum and maximum over the 32 lanes of a warp, in every lane; the sum as a tree of five levels.
PYROBUST_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

PYROBUST_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace cuda
}  // namespace pyrobust
