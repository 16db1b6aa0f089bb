// Compiled without ISA flags: detection must run on every CPU.
#include "runtime/cpu_features.h"

#include <atomic>
#include <cstdlib>

#include "runtime/check.h"

#if defined(PYROBUST_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyrobust {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "amx"};
std::atomic<int> g_isa{-1};
std::atomic<int> g_lookups{-1};

#if defined(PYROBUST_X86)
bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

bool avx512_supported() {
  return avx2_supported() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Zen 4 (family 19h; Zen 3 there has no AVX-512): a `vpermw` with its `vpaddw` takes 1.24 times as
// long as a `vpdpbusd` and does 2.5 times as many products. Zen 5 starts two of the latter a cycle;
// other processors were not measured.
bool is_faster_with_lookups() { return avx512_supported() && __builtin_cpu_is("amdfam19h") != 0; }

#if defined(__linux__)
// Linux grants tile state to a process and its threads once it asks; refused where the kernel is
// too old, a policy forbids it, or a signal stack is too small for the larger state.
bool request_tile_state() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}
#endif

bool amx_supported() {
#if defined(__linux__)
  if (!(avx512_supported() && __builtin_cpu_supports("amx-tile") &&
        __builtin_cpu_supports("amx-int8"))) {
    return false;
  }
  static const bool granted = request_tile_state();
  return granted;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa parse_isa(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  fail("PYROBUST_ISA must be one of portable, avx2, avx512, amx; got '", name, "'.");
}

bool isa_supported(Isa isa) {
#if defined(PYROBUST_X86)
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return avx2_supported();
    case Isa::kAvx512:
      return avx512_supported();
    case Isa::kAmx:
      return amx_supported();
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

Isa best_isa() {
  int best = 0;
  for (int i = 1; i < kIsaCount; ++i) {
    if (isa_supported(static_cast<Isa>(i))) best = i;
  }
  return static_cast<Isa>(best);
}

bool has_bfloat16_products() {
#if defined(PYROBUST_X86)
  return avx512_supported() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_bfloat16_tiles() {
#if defined(PYROBUST_X86)
  return amx_supported() && __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

void set_word_lookups(bool allowed) { g_lookups.store(allowed ? 1 : 0); }

bool looks_words_up() {
  if (g_lookups.load() < 0) {
    const char* forced = std::getenv("PYROBUST_LOOKUPS");
    const std::string choice = forced != nullptr ? forced : "";
    check(choice.empty() || choice == "0" || choice == "1",
          "PYROBUST_LOOKUPS must be 0 or 1; got '", choice, "'.");
#if defined(PYROBUST_X86)
    set_word_lookups(choice.empty() ? is_faster_with_lookups() : choice == "1");
#else
    set_word_lookups(false);
#endif
  }
  return g_lookups.load() == 1;
}

void set_isa(Isa isa) {
  if (!isa_supported(isa)) {  // best_isa() asks for tile state, which lower sets do not need
    fail("PYROBUST_ISA: this machine does not support ", isa_name(isa), "; the best it has is ",
         isa_name(best_isa()), ".");
  }
  g_isa.store(static_cast<int>(isa));
}

Isa current_isa() {
  if (g_isa.load() < 0) {
    const char* forced = std::getenv("PYROBUST_ISA");
    set_isa(forced != nullptr && *forced != '\0' ? parse_isa(forced) : best_isa());
  }
  return static_cast<Isa>(g_isa.load());
}

}  // namespace pyrobust
