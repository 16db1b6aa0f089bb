// The device bodies of cuda/primitives.h: inline PTX for compute capability 8.0 and above.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYROBUST_DEVICE static __device__ __forceinline__
#define PYROBUST_KERNEL(threads) static __global__ void __launch_bounds__(threads)
#define PYROBUST_KERNEL_OF(threads, blocks) \
  static __global__ void __launch_bounds__(threads, blocks)

namespace pyrobust {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Aligned as operands of warpgroups want it: no kernel has static shared memory, and what the
// system takes for itself on compute capability 9.0 is 1024 bytes.
PYROBUST_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t pyrobust_shared[];
  return pyrobust_shared;
}

PYROBUST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same for loads from addresses that a kernel computes: 32 bits instead of a pointer's 64.
// `offset` is a constant. Of what a barrier before has made visible.
using SharedPlace = uint32_t;

// By all lanes of a warp: of a shuffle the compiler keeps the result, an address it would find anew
// at every use.
PYROBUST_DEVICE SharedPlace shared_place(const void* pointer) {
  return __shfl_sync(kFullWarp, shared_address(pointer), 0);
}

PYROBUST_DEVICE Words4 load16_shared(SharedPlace place, int offset) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(place + static_cast<uint32_t>(offset)));
  return v;
}

PYROBUST_DEVICE Words2 load8_shared(SharedPlace place, int offset) {
  Words2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "r"(place + static_cast<uint32_t>(offset)));
  return v;
}

// The same from what nobody writes any more, a table: the compiler may move these.
PYROBUST_DEVICE Words4 load16_of_table(SharedPlace place, int offset) {
  Words4 v;
  asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "r"(place + static_cast<uint32_t>(offset)));
  return v;
}

PYROBUST_DEVICE Words2 load8_of_table(SharedPlace place, int offset) {
  Words2 v;
  asm("ld.shared.v2.u32 {%0, %1}, [%2];\n"
      : "=r"(v.word[0]), "=r"(v.word[1])
      : "r"(place + static_cast<uint32_t>(offset)));
  return v;
}

PYROBUST_DEVICE void store16_shared(SharedPlace place, const Words4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(place), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

PYROBUST_DEVICE uint32_t load4_shared(SharedPlace place) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(word) : "r"(place));
  return word;
}

// --- asynchronous copies ------------------------------------------------------------------------

// Past L1. No cache policy: with one, ptxas 13.0 addresses some copies for sm_90 through a
// descriptor in an odd uniform register, which the hardware refuses as an illegal instruction.
PYROBUST_DEVICE void copy16_async(SharedPlace shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

PYROBUST_DEVICE void copy16_async(void* shared, const void* global) {
  copy16_async(shared_address(shared), global);
}

// Sixteen zeros where not `valid`; the address is not read then, but must be aligned.
PYROBUST_DEVICE void copy16_async_or_zero(SharedPlace shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

PYROBUST_DEVICE void copy16_async_or_zero(void* shared, const void* global, bool valid) {
  copy16_async_or_zero(shared_address(shared), global, valid);
}

// The same where `wanted`, without a branch: products of warpgroups may be under way.
PYROBUST_DEVICE void copy16_async_if(bool wanted, void* shared, const void* global, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
      "@p cp.async.cg.shared.global [%1], [%2], 16, %3;\n}\n" ::"r"(static_cast<int>(wanted)),
      "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}

PYROBUST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `Left` of this thread's committed groups are under way.
template <int Left>
PYROBUST_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Left) : "memory");
}

// --- matrices -----------------------------------------------------------------------------------

PYROBUST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedPlace row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

PYROBUST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r, shared_address(row));
}

PYROBUST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

PYROBUST_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b
PYROBUST_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PYROBUST_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PYROBUST_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- warpgroups ---------------------------------------------------------------------------------
// Four warps multiply together (wgmma): code for sm_90a alone. Products are under way from their
// instruction on until finish_products; registers and shared memory that they use stay as they are.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYROBUST_WARPGROUP(types, d, a, b, onto)                                                 \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                                       \
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
      "%26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"               \
      : PYROBUST_SUMS(d, 0)                                                                      \
      : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b), "r"(static_cast<int>(onto)))
#define PYROBUST_WARPGROUP_128(types, d, a, b, onto)                                             \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                                       \
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "    \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "    \
      "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                         \
      : PYROBUST_SUMS(d, 0), PYROBUST_SUMS(d, 8)                                                 \
      : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b), "r"(static_cast<int>(onto)))
#define PYROBUST_SUM(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define PYROBUST_SUMS(d, i)                                                         \
  PYROBUST_SUM((d)[i]), PYROBUST_SUM((d)[i + 1]), PYROBUST_SUM((d)[i + 2]),         \
      PYROBUST_SUM((d)[i + 3]), PYROBUST_SUM((d)[i + 4]), PYROBUST_SUM((d)[i + 5]), \
      PYROBUST_SUM((d)[i + 6]), PYROBUST_SUM((d)[i + 7])
#endif

// The b operand at `shared`; 16 columns further on in its rows of 64: + 2; the next 64 rows of 128
// bytes: + 512. A descriptor: swizzle of 128 bytes, eight rows every 1024 bytes.
PYROBUST_DEVICE uint64_t operand_of(const void* shared) {
  return uint64_t{shared_address(shared) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

// d = a b, plus d where `onto`.
PYROBUST_DEVICE void multiply_m64n64k16_f16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                            bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYROBUST_WARPGROUP("f16.f16", d, a, b, onto);
#endif
}

PYROBUST_DEVICE void multiply_m64n64k16_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                             bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYROBUST_WARPGROUP("bf16.bf16", d, a, b, onto);
#endif
}

PYROBUST_DEVICE void multiply_m64n128k16_f16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                             bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYROBUST_WARPGROUP_128("f16.f16", d, a, b, onto);
#endif
}

PYROBUST_DEVICE void multiply_m64n128k16_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                              bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PYROBUST_WARPGROUP_128("bf16.bf16", d, a, b, onto);
#endif
}

// The same of 8, 16 or 32 columns, whose rows of 128 bytes lie on end too.
PYROBUST_DEVICE void multiply_m64k16_bf16(float (&d)[1][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, "
      "p, 1, 1, 0;\n}\n"
      : PYROBUST_SUM(d[0])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(onto)));
#endif
}

PYROBUST_DEVICE void multiply_m64k16_bf16(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"
      : PYROBUST_SUM(d[0]), PYROBUST_SUM(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(onto)));
#endif
}

PYROBUST_DEVICE void multiply_m64k16_bf16(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
      : PYROBUST_SUM(d[0]), PYROBUST_SUM(d[1]), PYROBUST_SUM(d[2]), PYROBUST_SUM(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(onto)));
#endif
}

PYROBUST_DEVICE void multiply_m64k16_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                          bool onto) {
  multiply_m64n64k16_bf16(d, a, b, onto);
}

// Before the first product that uses registers written since the last.
PYROBUST_DEVICE void begin_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// The products since the last call are one group.
PYROBUST_DEVICE void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Waits until at most `Left` groups are under way, those onto d not among them.
template <int Left>
PYROBUST_DEVICE void finish_products(float (&d)[8][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %32;\n" : PYROBUST_SUMS(d, 0) : "n"(Left) : "memory");
#endif
}

// The same of products whose sums nobody reads yet: their operands may be overwritten.
template <int Left>
PYROBUST_DEVICE void finish_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Left) : "memory");
#endif
}

template <int Left>
PYROBUST_DEVICE void finish_products(float (&d)[16][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %64;\n"
               : PYROBUST_SUMS(d, 0), PYROBUST_SUMS(d, 8)
               : "n"(Left)
               : "memory");
#endif
}

template <int Left>
PYROBUST_DEVICE void finish_products(float (&d)[4][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %16;\n"
               : PYROBUST_SUM(d[0]), PYROBUST_SUM(d[1]), PYROBUST_SUM(d[2]), PYROBUST_SUM(d[3])
               : "n"(Left)
               : "memory");
#endif
}

template <int Left>
PYROBUST_DEVICE void finish_products(float (&d)[2][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %8;\n"
               : PYROBUST_SUM(d[0]), PYROBUST_SUM(d[1])
               : "n"(Left)
               : "memory");
#endif
}

template <int Left>
PYROBUST_DEVICE void finish_products(float (&d)[1][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %4;\n" : PYROBUST_SUM(d[0]) : "n"(Left) : "memory");
#endif
}

// What this thread wrote to shared memory, its copies that have landed too, is there for products
// of warpgroups once a barrier follows.
PYROBUST_DEVICE void show_to_products() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// --- words --------------------------------------------------------------------------------------

template <uint32_t Table>
PYROBUST_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes b:a.
PYROBUST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

PYROBUST_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

PYROBUST_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

PYROBUST_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

PYROBUST_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// --- conversions: to nearest even; of a NaN, any NaN --------------------------------------------

PYROBUST_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

PYROBUST_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

PYROBUST_DEVICE float low_f16(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}

PYROBUST_DEVICE float high_f16(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

PYROBUST_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
PYROBUST_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// --- warps --------------------------------------------------------------------------------------

template <typename T>
PYROBUST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}

template <typename T>
PYROBUST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

// The value of lane + delta; a lane without such a neighbour gets its own.
template <typename T>
PYROBUST_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(kFullWarp, value, static_cast<unsigned>(delta));
}

PYROBUST_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kFullWarp, vote); }
PYROBUST_DEVICE void sync_warp() { __syncwarp(); }
PYROBUST_DEVICE int lowest_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }

// --- blocks and grids ---------------------------------------------------------------------------

PYROBUST_DEVICE void sync_threads() { __syncthreads(); }

// A barrier of kThreads threads, the `group`-th such group of the block, 0 .. 14.
template <int kThreads>
PYROBUST_DEVICE void sync_group(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(kThreads) : "memory");
}

// The grid after this one may be started when all thread blocks have come here or ended, where its
// launch says LaunchShape::overlaps. It has room once thread blocks of this one end.
PYROBUST_DEVICE void begin_next_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the grid before this one has ended and what it wrote is visible.
PYROBUST_DEVICE void await_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Waits until *lock == value, for the whole block; writes of whoever released it are then visible.
// All blocks of the grid must be resident, or the awaited ones have lower indices.
PYROBUST_DEVICE void lock_acquire(int32_t* lock, int32_t value) {
  if (threadIdx.x == 0) {
    int32_t seen;
    do {
      asm volatile("ld.global.acquire.gpu.b32 %0, [%1];\n" : "=r"(seen) : "l"(lock) : "memory");
    } while (seen != value);
  }
  __syncthreads();
}

// After all writes of the block: *lock = value for the next to see.
PYROBUST_DEVICE void lock_release(int32_t* lock, int32_t value) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("fence.acq_rel.gpu;\nst.global.release.gpu.b32 [%0], %1;\n" ::"l"(lock), "r"(value)
                 : "memory");
  }
}

// One more block has written what it has to: the count before, in all threads. What blocks that
// arrived earlier have written is then visible. `shared` is 4 bytes of shared memory.
PYROBUST_DEVICE int32_t arrive(int32_t* counter, int32_t* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t before;
    asm volatile(
        "fence.acq_rel.gpu;\natom.add.acq_rel.gpu.global.s32 %0, [%1], 1;\nfence.acq_rel.gpu;\n"
        : "=r"(before)
        : "l"(counter)
        : "memory");
    *shared = before;
  }
  __syncthreads();
  return *static_cast<volatile int32_t*>(shared);
}

// --- clusters -----------------------------------------------------------------------------------

// Whether code for this architecture knows clusters; `launched` is for the emulation.
PYROBUST_DEVICE constexpr bool clusters_exist(bool) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// A barrier of all threads of the cluster; writes to shared memory before it are visible after it.
PYROBUST_DEVICE void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
#endif
}

// Sixteen bytes at this place of the shared memory of block `rank` of the cluster.
PYROBUST_DEVICE Words4 load16_of_cluster(const void* shared, int rank) {
  Words4 value = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "r"(address)
               : "memory");
#endif
  return value;
}

// --- atomics ------------------------------------------------------------------------------------

PYROBUST_DEVICE void atomic_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

PYROBUST_DEVICE int32_t atomic_add(int32_t* to, int32_t value) { return atomicAdd(to, value); }
PYROBUST_DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }

PYROBUST_DEVICE void atomic_min(int64_t* to, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

// Maximum of floats >= 0, whose bits are ordered like integers.
PYROBUST_DEVICE void atomic_max_magnitude(float* to, float value) {
  atomicMax(reinterpret_cast<int*>(to), __float_as_int(value));
}

// --- memory -------------------------------------------------------------------------------------

PYROBUST_DEVICE Words4 load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// Of global memory that nobody reads again: past L1, first out of L2.
PYROBUST_DEVICE Words4 load16_once(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

PYROBUST_DEVICE void store16(void* to, const Words4& value) {
  *static_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

PYROBUST_DEVICE void store8(void* to, const Words2& value) {
  *static_cast<uint2*>(to) = make_uint2(value.word[0], value.word[1]);
}

// --- directed rounding of float32 ---------------------------------------------------------------

PYROBUST_DEVICE float add_up(float a, float b) { return __fadd_ru(a, b); }
PYROBUST_DEVICE float add_down(float a, float b) { return __fadd_rd(a, b); }
PYROBUST_DEVICE float mul_up(float a, float b) { return __fmul_ru(a, b); }
PYROBUST_DEVICE float fma_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }
PYROBUST_DEVICE float fma_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }

}  // namespace cuda
}  // namespace pyrobust
