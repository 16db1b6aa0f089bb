// The emulated bodies of cuda/primitives.h, over cuda/fibres.h. Warp-wide ones are in
// primitives_emulated.cpp.
#pragma once

#include <string.h>

#include "core/float_types.h"
#include "core/fused.h"
#include "core/rounding.h"
#include "cuda/fibres.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define PYROBUST_DEVICE static inline
#define PYROBUST_KERNEL(threads) static void
#define PYROBUST_KERNEL_OF(threads, blocks) static void

namespace pyrobust {
namespace cuda {

PYROBUST_DEVICE uint8_t* shared_memory() { return fibres::shared_memory(); }

using SharedPlace = uintptr_t;

PYROBUST_DEVICE SharedPlace shared_place(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

// Bytes of shared memory, at a multiple of their size, as the hardware demands.
template <typename Words>
PYROBUST_DEVICE Words load_shared(SharedPlace place, const char* what) {
  const auto* from = reinterpret_cast<const Words*>(place);
  fibres::check_shared(from, sizeof(Words), what);
  if (place % sizeof(Words) != 0) fibres::fault("a misaligned load from shared memory");
  return *from;
}

PYROBUST_DEVICE Words4 load16_shared(SharedPlace place, int offset) {
  return load_shared<Words4>(place + static_cast<uintptr_t>(offset), "load16_shared");
}

PYROBUST_DEVICE Words2 load8_shared(SharedPlace place, int offset) {
  return load_shared<Words2>(place + static_cast<uintptr_t>(offset), "load8_shared");
}

PYROBUST_DEVICE Words4 load16_of_table(SharedPlace place, int offset) {
  return load_shared<Words4>(place + static_cast<uintptr_t>(offset), "load16_of_table");
}

PYROBUST_DEVICE Words2 load8_of_table(SharedPlace place, int offset) {
  return load_shared<Words2>(place + static_cast<uintptr_t>(offset), "load8_of_table");
}

PYROBUST_DEVICE void store16_shared(SharedPlace place, const Words4& value) {
  auto* to = reinterpret_cast<Words4*>(place);
  fibres::check_shared(to, sizeof(value), "store16_shared");
  *to = value;
  fibres::note_write(to, sizeof(value));
}

PYROBUST_DEVICE uint32_t load4_shared(SharedPlace place) {
  return load_shared<uint32_t>(place, "load4_shared");
}

// --- asynchronous copies ------------------------------------------------------------------------

PYROBUST_DEVICE void copy16_async(void* shared, const void* global) {
  fibres::start_copy(shared, global, 16, 0);
}

PYROBUST_DEVICE void copy16_async(SharedPlace shared, const void* global) {
  copy16_async(reinterpret_cast<void*>(shared), global);
}

PYROBUST_DEVICE void copy16_async_or_zero(void* shared, const void* global, bool valid) {
  fibres::start_copy(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}

PYROBUST_DEVICE void copy16_async_or_zero(SharedPlace shared, const void* global, bool valid) {
  copy16_async_or_zero(reinterpret_cast<void*>(shared), global, valid);
}

PYROBUST_DEVICE void copy16_async_if(bool wanted, void* shared, const void* global, bool valid) {
  if (wanted) copy16_async_or_zero(shared, global, valid);
}

PYROBUST_DEVICE void commit_copies() { fibres::commit_copies(); }

template <int Left>
PYROBUST_DEVICE void wait_copies() {
  fibres::wait_copies(Left);
}

// --- matrices -----------------------------------------------------------------------------------

void emulate_ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row);
void emulate_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void emulate_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void emulate_mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

PYROBUST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulate_ldmatrix(r, 4, false, row);
}

PYROBUST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedPlace row) {
  ldmatrix_x4(r, reinterpret_cast<const void*>(row));
}

PYROBUST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  emulate_ldmatrix(r, 2, false, row);
}

PYROBUST_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulate_ldmatrix(r, 4, true, row);
}

PYROBUST_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  emulate_mma_f16(d, a, b);
}

PYROBUST_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  emulate_mma_bf16(d, a, b);
}

PYROBUST_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  emulate_mma_s8(d, a, b);
}

// --- words --------------------------------------------------------------------------------------

template <uint32_t Table>
PYROBUST_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row) {
    if ((Table >> row & 1) == 0) continue;
    d |= ((row & 4) != 0 ? a : ~a) & ((row & 2) != 0 ? b : ~b) & ((row & 1) != 0 ? c : ~c);
  }
  return d;
}

PYROBUST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (chosen & 7))) & 0xff;
    if ((chosen & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    d |= byte << (8 * i);
  }
  return d;
}

// --- conversions --------------------------------------------------------------------------------

PYROBUST_DEVICE uint32_t pack_f16x2(float low, float high) {
  return static_cast<uint32_t>(float16_from_float(high)) << 16 | float16_from_float(low);
}

PYROBUST_DEVICE uint32_t pack_bf16x2(float low, float high) {
  return static_cast<uint32_t>(bfloat16_from_float(high)) << 16 | bfloat16_from_float(low);
}

PYROBUST_DEVICE float low_f16(uint32_t pair) {
  return float_from_float16(static_cast<uint16_t>(pair));
}

PYROBUST_DEVICE float high_f16(uint32_t pair) {
  return float_from_float16(static_cast<uint16_t>(pair >> 16));
}

PYROBUST_DEVICE float low_bf16(uint32_t pair) { return float_from_bits(pair << 16); }
PYROBUST_DEVICE float high_bf16(uint32_t pair) { return float_from_bits(pair & 0xffff0000u); }

// A product of halves has at most 22 (bf16: 16) bits and its sum with a third half is rounded to
// odd in float64 before it is rounded to the half, by way of float32 rounded to odd.
PYROBUST_DEVICE float sum_for_half(double product, double addend) {
  const double sum = sum_rounded_to_odd(product, addend);
  const float single = static_cast<float>(sum);
  if (static_cast<double>(single) == sum || (bits_of_float(single) & 1) != 0) return single;
  const bool too_small = static_cast<double>(single) < sum;
  return too_small == (single > 0.0f) ? float_from_bits(bits_of_float(single) + 1)
                                      : float_from_bits(bits_of_float(single) - 1);
}

PYROBUST_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pack_f16x2(sum_for_half(static_cast<double>(low_f16(a)) * low_f16(b), low_f16(c)),
                    sum_for_half(static_cast<double>(high_f16(a)) * high_f16(b), high_f16(c)));
}

PYROBUST_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return pack_f16x2(low_f16(a) * low_f16(b), high_f16(a) * high_f16(b));
}

PYROBUST_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return pack_f16x2(sum_for_half(low_f16(a), -low_f16(b)), sum_for_half(high_f16(a), -high_f16(b)));
}

PYROBUST_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pack_bf16x2(sum_for_half(static_cast<double>(low_bf16(a)) * low_bf16(b), low_bf16(c)),
                     sum_for_half(static_cast<double>(high_bf16(a)) * high_bf16(b), high_bf16(c)));
}

// --- warps --------------------------------------------------------------------------------------

// The 8 bytes of `value` that lane source(lane) handed in, `source` chosen by kind.
enum class ShuffleKind : int { kFrom, kXor, kDown };
uint64_t emulate_shuffle(uint64_t value, int argument, ShuffleKind kind);
uint32_t emulate_ballot(bool vote);
void emulate_sync_warp();

template <typename T>
PYROBUST_DEVICE T shuffle_by(T value, int argument, ShuffleKind kind) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulate_shuffle(bits, argument, kind);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
PYROBUST_DEVICE T shuffle(T value, int lane) {
  return shuffle_by(value, lane, ShuffleKind::kFrom);
}

template <typename T>
PYROBUST_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle_by(value, mask, ShuffleKind::kXor);
}

template <typename T>
PYROBUST_DEVICE T shuffle_down(T value, int delta) {
  return shuffle_by(value, delta, ShuffleKind::kDown);
}

PYROBUST_DEVICE uint32_t ballot(bool vote) { return emulate_ballot(vote); }
PYROBUST_DEVICE void sync_warp() { emulate_sync_warp(); }
PYROBUST_DEVICE int lowest_bit(uint32_t word) { return __builtin_ctz(word); }

// --- blocks and grids ---------------------------------------------------------------------------

PYROBUST_DEVICE void sync_threads() { fibres::block_barrier(); }

template <int kThreads>
PYROBUST_DEVICE void sync_group(int group) {
  fibres::group_barrier(group, kThreads);
}

// Grids run one after another, or as Options::hold_launches says.
PYROBUST_DEVICE void begin_next_grid() {}
PYROBUST_DEVICE void await_grid() { fibres::await_grid(); }

PYROBUST_DEVICE void lock_acquire(int32_t* lock, int32_t value) {
  if (threadIdx.x == 0) {
    while (*static_cast<volatile int32_t*>(lock) != value) fibres::yield_while_spinning();
  }
  fibres::block_barrier();
}

PYROBUST_DEVICE void lock_release(int32_t* lock, int32_t value) {
  fibres::block_barrier();
  if (threadIdx.x == 0) *lock = value;
}

PYROBUST_DEVICE int32_t arrive(int32_t* counter, int32_t* shared) {
  fibres::block_barrier();
  fibres::check_shared(shared, sizeof(*shared), "arrive");
  if (threadIdx.x == 0) *shared = (*counter)++;
  fibres::block_barrier();
  return *shared;
}

// --- clusters -----------------------------------------------------------------------------------

// `launched`: as the host chose, so that both ways are tested.
PYROBUST_DEVICE bool clusters_exist(bool launched) { return launched; }

PYROBUST_DEVICE void sync_cluster() { fibres::cluster_barrier(); }

PYROBUST_DEVICE Words4 load16_of_cluster(const void* shared, int rank) {
  fibres::check_shared(shared, 16, "a load of the cluster");
  const auto offset = static_cast<const uint8_t*>(shared) - fibres::shared_memory();
  Words4 value;
  memcpy(&value, fibres::shared_memory_of(rank) + offset, sizeof(value));
  return value;
}

// --- atomics ------------------------------------------------------------------------------------

PYROBUST_DEVICE void atomic_add(int64_t* to, int64_t value) { *to += value; }

PYROBUST_DEVICE int32_t atomic_add(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to += value;
  return before;
}

PYROBUST_DEVICE void atomic_add(float* to, float value) { *to += value; }

PYROBUST_DEVICE void atomic_min(int64_t* to, int64_t value) { *to = value < *to ? value : *to; }

PYROBUST_DEVICE void atomic_max_magnitude(float* to, float value) {
  if (static_cast<int32_t>(bits_of_float(value)) > static_cast<int32_t>(bits_of_float(*to))) {
    *to = value;
  }
}

// --- memory -------------------------------------------------------------------------------------

PYROBUST_DEVICE void check_vector(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fibres::fault("a misaligned vector");
}

PYROBUST_DEVICE Words4 load16(const void* from) {
  check_vector(from, 16);
  Words4 value;
  memcpy(&value, from, sizeof(value));
  return value;
}

PYROBUST_DEVICE Words4 load16_once(const void* from) { return load16(from); }

PYROBUST_DEVICE void store16(void* to, const Words4& value) {
  check_vector(to, 16);
  memcpy(to, &value, sizeof(value));
  fibres::note_write(to, sizeof(value));
}

PYROBUST_DEVICE void store8(void* to, const Words2& value) {
  check_vector(to, 8);
  memcpy(to, &value, sizeof(value));
  fibres::note_write(to, sizeof(value));
}

// --- directed rounding of float32 ---------------------------------------------------------------

PYROBUST_DEVICE float add_up(float a, float b) { return rounding::add_up(a, b); }
PYROBUST_DEVICE float add_down(float a, float b) { return rounding::add_down(a, b); }
PYROBUST_DEVICE float mul_up(float a, float b) { return rounding::mul_up(a, b); }
PYROBUST_DEVICE float fma_up(float a, float b, float c) { return rounding::fma_up(a, b, c); }
PYROBUST_DEVICE float fma_down(float a, float b, float c) { return rounding::fma_down(a, b, c); }

}  // namespace cuda
}  // namespace pyrobust
