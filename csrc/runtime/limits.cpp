#include "runtime/limits.h"

#include <atomic>

#include "runtime/cpu_features.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace {

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int kVectors = 8;
constexpr int64_t kStep = kVectors * static_cast<int64_t>(sizeof(Words));

// Inlined into one function per instruction set, which decides the width of its registers.
[[gnu::always_inline]] inline uint64_t read_steps(const Words* at, int64_t steps) {
  Words sums[kVectors] = {};
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[j] ^= at[i * kVectors + j];
  }
  uint64_t total = 0;
  for (const Words& sum : sums) {
    for (int k = 0; k < 8; ++k) total ^= sum[k];
  }
  return total;
}

uint64_t read_narrow(const Words* at, int64_t steps) { return read_steps(at, steps); }

#if defined(PYROBUST_X86)
[[gnu::target("avx512f")]] uint64_t read_wide(const Words* at, int64_t steps) {
  return read_steps(at, steps);
}

#define PYROBUST_DOT(n) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #n "\n"
[[gnu::target("avx512f,avx512vnni")]] void multiply_registers(int64_t rounds) {
  __asm__ volatile(
      "vpxor %%xmm0, %%xmm0, %%xmm0\n vpxor %%xmm1, %%xmm1, %%xmm1\n"
      // clang-format off
      "1:\n" PYROBUST_DOT(16) PYROBUST_DOT(17) PYROBUST_DOT(18) PYROBUST_DOT(19) PYROBUST_DOT(20)
      PYROBUST_DOT(21) PYROBUST_DOT(22) PYROBUST_DOT(23) PYROBUST_DOT(24) PYROBUST_DOT(25)
      PYROBUST_DOT(26) PYROBUST_DOT(27) PYROBUST_DOT(28) PYROBUST_DOT(29) PYROBUST_DOT(30)
      PYROBUST_DOT(31) "dec %0\n jnz 1b\n"
      // clang-format on
      : "+r"(rounds)
      :
      : "cc", "xmm0", "xmm1", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
        "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}
#undef PYROBUST_DOT

#define PYROBUST_LOOK(n)            \
  "vpermw %%zmm0, %%zmm1, %%zmm2\n" \
  "vpaddw %%zmm2, %%zmm" #n ", %%zmm" #n "\n"
[[gnu::target("avx512f,avx512bw")]] void look_up_registers(int64_t rounds) {
  __asm__ volatile(
      "vpxor %%xmm0, %%xmm0, %%xmm0\n vpxor %%xmm1, %%xmm1, %%xmm1\n"
      // clang-format off
      "1:\n" PYROBUST_LOOK(16) PYROBUST_LOOK(17) PYROBUST_LOOK(18) PYROBUST_LOOK(19)
      PYROBUST_LOOK(20) PYROBUST_LOOK(21) PYROBUST_LOOK(22) PYROBUST_LOOK(23) PYROBUST_LOOK(24)
      PYROBUST_LOOK(25) PYROBUST_LOOK(26) PYROBUST_LOOK(27) PYROBUST_LOOK(28) PYROBUST_LOOK(29)
      PYROBUST_LOOK(30) PYROBUST_LOOK(31) "dec %0\n jnz 1b\n"
      // clang-format on
      : "+r"(rounds)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
        "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}
#undef PYROBUST_LOOK
#endif

bool has_wide_registers() {
#if defined(PYROBUST_X86)
  return isa_supported(Isa::kAvx512);
#else
  return false;
#endif
}

}  // namespace

uint64_t read_words(const void* data, int64_t bytes, int num_threads) {
  auto* read = &read_narrow;
#if defined(PYROBUST_X86)
  if (has_wide_registers()) read = &read_wide;
#endif
  const auto* words = static_cast<const Words*>(data);
  std::atomic<uint64_t> total{0};
  parallel_for(bytes / kStep, 1, 1, num_threads, [&](int64_t begin, int64_t end) {
    total ^= read(words + begin * kVectors, end - begin);
  });
  return total;
}

int64_t multiply_bytes(int64_t rounds) {
  if (rounds < 1 || !has_wide_registers()) return 0;
#if defined(PYROBUST_X86)
  multiply_registers(rounds);
#endif
  return 16 * 64 * rounds;
}

int64_t look_words_up(int64_t rounds) {
  if (rounds < 1 || !has_wide_registers()) return 0;
#if defined(PYROBUST_X86)
  look_up_registers(rounds);
#endif
  return 16 * 32 * 5 * rounds;
}

}  // namespace pyrobust
