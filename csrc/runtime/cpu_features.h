// Which instruction sets this machine offers and which one the kernels use.
#pragma once

#include <string>

namespace pyrobust {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);

// Throws std::invalid_argument for a name outside portable, avx2, avx512, amx.
Isa parse_isa(const std::string& name);

// True where both the CPU and the operating system support `isa`.
bool isa_supported(Isa isa);

Isa best_isa();

// True where the CPU multiplies pairs of bfloat16 into float32 (AVX512_BF16).
bool has_bfloat16_products();

// True where tiles of them may be multiplied: Isa::kAmx, and AMX-BF16.
bool has_bfloat16_tiles();

// Whether 8-bit activations times one bit are looked up (matmul/sign_tables.h) rather than
// multiplied where Isa::kAvx512 serves: PYROBUST_LOOKUPS=0 or 1 if set, else where the CPU is known
// to be faster so; decided at the first call. Throws if the variable is neither.
bool looks_words_up();

// For tests: the choice from now on. Not to be changed while a product runs.
void set_word_lookups(bool allowed);

// PYROBUST_ISA if set, else the best; decided at the first call. Throws if the variable names an
// unknown or unsupported set.
Isa current_isa();

// For tests and for PYROBUST_ISA-like control from Python. Throws if unsupported.
void set_isa(Isa isa);

}  // namespace pyrobust
