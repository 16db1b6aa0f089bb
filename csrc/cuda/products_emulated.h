// The emulated products of warpgroups (cuda/primitives.h): begun at their instruction, made when
// they are waited for. Between the two, registers and operands must stay as they are.
#pragma once

#include "cuda/fibres.h"

namespace pyrobust {
namespace cuda {

void start_product(float* sums, int eights, const uint32_t (&a)[4], uint64_t b, bool onto,
                   fibres::Multiply multiply);

template <int kEights>
PYROBUST_DEVICE void start_product(float (&d)[kEights][4], const uint32_t (&a)[4], uint64_t b,
                                   bool onto, fibres::Multiply multiply) {
  start_product(d[0], kEights, a, b, onto, multiply);
}

// As the hardware addresses it: 16-byte units, so that + 2 is 16 columns further on.
PYROBUST_DEVICE uint64_t operand_of(const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) fibres::fault("a misaligned operand");
  return reinterpret_cast<uintptr_t>(shared) >> 4;
}

PYROBUST_DEVICE void multiply_m64n64k16_f16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                            bool onto) {
  start_product(d, a, b, onto, emulate_mma_f16);
}

PYROBUST_DEVICE void multiply_m64n64k16_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                             bool onto) {
  start_product(d, a, b, onto, emulate_mma_bf16);
}

PYROBUST_DEVICE void multiply_m64n128k16_f16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                             bool onto) {
  start_product(d, a, b, onto, emulate_mma_f16);
}

PYROBUST_DEVICE void multiply_m64n128k16_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                              bool onto) {
  start_product(d, a, b, onto, emulate_mma_bf16);
}

template <int kEights>
PYROBUST_DEVICE void multiply_m64k16_bf16(float (&d)[kEights][4], const uint32_t (&a)[4],
                                          uint64_t b, bool onto) {
  start_product(d, a, b, onto, emulate_mma_bf16);
}

PYROBUST_DEVICE void show_to_products() { fibres::show_writes(); }

void begin_products();
void commit_products();
// `sums`: those that are read next, or null.
void finish_products(int left, const float* sums, int eights);

template <int Left, int kEights>
PYROBUST_DEVICE void finish_products(float (&d)[kEights][4]) {
  finish_products(Left, d[0], kEights);
}

template <int Left>
PYROBUST_DEVICE void finish_products() {
  finish_products(Left, nullptr, 0);
}

}  // namespace cuda
}  // namespace pyrobust
