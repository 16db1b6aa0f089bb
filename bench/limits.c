/* What this machine can do at most, for bench/limits.py: bytes read a second, and 8-bit dot products
 * of registers a second where AVX-512 VNNI is there. */
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64)));

/* Reads `bytes` (a multiple of 512 a thread) of `data`; the result keeps the loads alive. */
uint64_t read_all(const vector *data, size_t bytes, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : total) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const size_t count = bytes / sizeof(vector) / threads / 8 * 8;
    const vector *at = data + t * count;
    vector sum[8] = {0};
    for (size_t i = 0; i < count; i += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] ^= at[i + j];
    }
    for (int j = 0; j < 8; ++j) total ^= sum[j][0];
  }
  return total;
}

#if defined(__AVX512VNNI__)
#define DOT(n) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #n "\n"
/* 64 multiplications and additions per product; returns the number of products. */
int64_t dot_products(int64_t rounds) {
  const int64_t products = 16 * rounds;
  __asm__ volatile(
      "vpxor %%xmm0, %%xmm0, %%xmm0\n vpxor %%xmm1, %%xmm1, %%xmm1\n"
      "1:\n" DOT(16) DOT(17) DOT(18) DOT(19) DOT(20) DOT(21) DOT(22) DOT(23) DOT(24) DOT(25)
          DOT(26) DOT(27) DOT(28) DOT(29) DOT(30) DOT(31) "dec %0\n jnz 1b\n"
      : "+r"(rounds)
      :
      : "cc", "xmm0", "xmm1", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
        "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
  return products;
}
#else
int64_t dot_products(int64_t rounds) {
  (void)rounds;
  return 0;
}
#endif
