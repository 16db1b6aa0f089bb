// Checks, picks the instruction set's table, cuts M into blocks and the rows of W into threads.
#include "core/activation_int8.h"
#include "matmul/kernels.h"
#include "matmul/weights.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"

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
#endif
  for (int isa = static_cast<int>(current_isa()); isa > 0; --isa) {
    if (tables[isa] != nullptr && tables[isa]->*entry != nullptr) return *tables[isa];
  }
  return portable_kernels();
}

void check_format(int levels, int64_t rows, int64_t cols) {
  check(code_bits(levels) >= 0, "levels must be one of 2, 3, 4, 8, 16, 256; got ", levels, ".");
  check(rows >= 0 && cols >= 0, "the weight's sizes must not be negative; got (", rows, ", ", cols,
        ").");
}

void check_weight(const PackedMatrix& w) {
  check_format(w.levels, w.rows, w.cols);
  check(w.group_size >= 1, "group_size must be at least 1; got ", w.group_size, ".");
  check(w.group_dim == 0 || w.group_dim == 1, "group_dim must be 0 or 1; got ", w.group_dim, ".");
  check(w.zero == nullptr || w.levels > kTernaryLevels,
        "1 and 1.58 bits are symmetric: zero must be absent.");
  const bool empty = w.rows == 0 || w.cols == 0;
  check(empty || (w.codes != nullptr && w.scale != nullptr), "codes and scale must have storage.");
}

int64_t grain_rows(int64_t work_per_row) {
  return kGrain / (work_per_row > 0 ? work_per_row : 1) + 1;
}

}  // namespace

void packed_linear(const Activations& x, const PackedMatrix& weight, const float* bias, Mode mode,
                   void* out, int num_threads) {
  check_weight(weight);
  check(x.rows >= 0, "x must not have a negative number of rows; got ", x.rows, ".");
  if (x.rows == 0 || weight.rows == 0) return;
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::multiply);
  const int64_t block_rows = x.rows < kMaxBlockRows ? x.rows : kMaxBlockRows;
  void* prepared =
      thread_scratch(ScratchSlot::kShared, kernels.prepared_bytes(weight, mode, block_rows));
  auto* step = static_cast<double*>(
      thread_scratch(ScratchSlot::kSteps, block_rows * static_cast<int64_t>(sizeof(double))));
  const int64_t scratch_bytes = kernels.scratch_bytes(weight, mode, block_rows);
  for (int64_t first = 0; first < x.rows; first += block_rows) {
    const int64_t rows = std::min(block_rows, x.rows - first);
    kernels.prepare(weight, mode, x, first, rows, prepared, step,
                    thread_scratch(ScratchSlot::kThread, scratch_bytes));
    const Block block{prepared, step, rows};
    const Output output{out, bias, x.type, first, weight.rows};
    parallel_for(weight.rows, grain_rows(rows * weight.cols), kernels.row_align, num_threads,
                 [&](int64_t begin, int64_t end) {
                   kernels.multiply(weight, mode, block, begin, end, output,
                                    thread_scratch(ScratchSlot::kThread, scratch_bytes));
                 });
  }
}

void dequantize(const PackedMatrix& weight, float* out, int num_threads) {
  check_weight(weight);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::dequantize);
  parallel_for(weight.rows, grain_rows(8 * weight.cols), 1, num_threads,
               [&](int64_t begin, int64_t end) { kernels.dequantize(weight, begin, end, out); });
}

void dequantize_rows(const PackedMatrix& weight, int64_t begin, int64_t end, float* out) {
  kernels_with(&MatmulKernels::dequantize)
      .dequantize(weight, begin, end, out - begin * weight.cols);
}

void unpack_codes(const uint8_t* packed, int64_t rows, int64_t cols, int levels, uint8_t* codes,
                  int num_threads) {
  check_format(levels, rows, cols);
  const int64_t row_bytes = packed_row_bytes(cols, levels);
  parallel_for(rows, grain_rows(8 * cols), 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      decode_codes(packed + n * row_bytes, 0, cols, levels, codes + n * cols);
    }
  });
}

void pack_codes(const uint8_t* codes, int64_t rows, int64_t cols, int levels, uint8_t* packed,
                int num_threads) {
  check_format(levels, rows, cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    check(codes[i] < levels, "codes must be below ", levels, "; got ", static_cast<int>(codes[i]),
          " in row ", i / cols, ".");
  }
  const int64_t row_bytes = packed_row_bytes(cols, levels);
  parallel_for(rows, grain_rows(8 * cols), 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      encode_codes(codes + n * cols, cols, levels, packed + n * row_bytes);
    }
  });
}

}  // namespace pyrobust::matmul
