// Internal: what every entry point shares, those of dispatch.cpp and of gradients.cpp: which
// kernels serve, the checks of a weight, and how much work is worth a thread.
#pragma once

#include "matmul/kernels.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"

namespace pyrobust::matmul {
namespace {

// A thread is worth starting for about 20 microseconds of work: a million multiply-adds.
constexpr int64_t kGrain = int64_t{1} << 20;

// An empty entry of the wider table falls through to the next lower one.
template <typename Entry>
const MatmulKernels& kernels_with(Entry MatmulKernels::* entry) {
  const MatmulKernels* tables[kIsaCount] = {&portable_kernels(), nullptr, nullptr, nullptr};
#if defined(PYROBUST_X86)
  tables[static_cast<int>(Isa::kAvx2)] = avx2_kernels();
  tables[static_cast<int>(Isa::kAvx512)] = avx512_kernels();
  tables[static_cast<int>(Isa::kAmx)] = amx_kernels();
#endif
  for (int isa = static_cast<int>(current_isa()); isa > 0; --isa) {
    if (tables[isa] != nullptr && tables[isa]->*entry != nullptr) return *tables[isa];
  }
  return portable_kernels();
}

inline void check_format(int levels, int64_t rows, int64_t cols) {
  check(code_bits(levels) >= 0, "levels must be one of 2, 3, 4, 8, 16, 256; got ", levels, ".");
  check(rows >= 0 && cols >= 0, "the weight's sizes must not be negative; got (", rows, ", ", cols,
        ").");
}

inline void check_weight(const PackedMatrix& w) {
  check_format(w.levels, w.rows, w.cols);
  check(w.group_size >= 1, "group_size must be at least 1; got ", w.group_size, ".");
  check(w.group_dim == 0 || w.group_dim == 1, "group_dim must be 0 or 1; got ", w.group_dim, ".");
  check(w.zero == nullptr || w.levels > kTernaryLevels || w.codebook != nullptr,
        "1 and 1.58 bits are symmetric: zero must be absent.");
  check(w.codebook == nullptr || w.levels < 256,
        "8 bits take no codebook: its entries are themselves 8-bit codes.");
  const Remainder& s = w.remainder;
  check(s.offsets == nullptr || s.count == 0 || (s.values != nullptr && s.columns != nullptr),
        "the remainder's values and columns must have storage.");
  const bool empty = w.rows == 0 || w.cols == 0;
  check(empty || (w.codes != nullptr && w.scale != nullptr), "codes and scale must have storage.");
}

inline void check_range(const PackedMatrix& w, RowRange range) {
  check(range.begin >= 0 && range.begin <= range.end && range.end <= w.rows,
        "rows must lie in [0, ", w.rows, "]; got ", range.begin, " to ", range.end, ".");
}

inline int64_t grain_rows(int64_t work_per_row) {
  return kGrain / (work_per_row > 0 ? work_per_row : 1) + 1;
}

}  // namespace
}  // namespace pyrobust::matmul
