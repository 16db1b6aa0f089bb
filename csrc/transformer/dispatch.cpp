// Picks the kernels and constants, and splits rows over threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "core/rounding.h"
#include "runtime/cpu_features.h"
#include "runtime/float_environment.h"
#include "runtime/pages.h"
#include "runtime/parallel.h"
#include "transformer/kernels.h"
#include "transformer/product.h"

namespace pyrobust {
namespace transformer {
namespace {

constexpr double kTiny = 0x1p-126;  // the smallest normal float
constexpr double kLargest = 3.4028234663852886e38;
constexpr double kUnit64 = 0x1p-53;
// Work from which a thread of its own pays: elements of norms and softmax, those of a product with
// constants, multiplications of products.
constexpr int64_t kGrain = 1 << 12, kGrainOfElements = 1 << 14;
constexpr double kGrainOfProducts = 1 << 18;

TransformerKernels pick_kernels() {
  const TransformerKernels* table = &kPortableKernels;
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) table = avx2_kernels();
  if (current_isa() >= Isa::kAvx512) table = avx512_kernels();
#endif
  return *table;
}

// gamma_n: the relative error of n roundings, each of at most `unit`.
double bound_of_roundings(double count, double unit) {
  const double total = count * unit;
  return total / (1.0 - total) * (1.0 + 0x1p-48);
}

NormConstants constants_of(const RowNorm& work) {
  const double unit = work.deployed ? rounding::kUnit : kUnit64;
  NormConstants constants{};
  constants.unit = bound_of_roundings(static_cast<double>(work.count + 16), unit);
  constants.flushed = work.deployed ? kTiny * static_cast<double>(work.count + 8) : 0.0;
  constants.relative = 2.0 * bound_of_roundings(16.0, kUnit64) + 8.0 * constants.unit;
  constants.least = work.deployed ? static_cast<float>(kTiny) : 0.0f;
  return constants;
}

// Whether a processor that flushes denormals reads one of the numbers as zero.
bool has_denormals(const float* values, int64_t count) {
  if (values == nullptr) return false;
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= values[i] != 0.0f && std::fabs(values[i]) < static_cast<float>(kTiny) ? 1 : 0;
  }
  return found != 0;
}

void ask_for_large_pages(float* lower, float* upper, int64_t count) {
  prefer_large_pages(lower, count * static_cast<int64_t>(sizeof(float)));
  prefer_large_pages(upper, count * static_cast<int64_t>(sizeof(float)));
}

// body(row, scratch) of all rows, unless one is false.
template <typename Body>
bool all_rows(int64_t rows, int64_t count, int64_t scratch_size, int num_threads,
              const Body& body) {
  std::atomic<bool> finite{true};
  parallel_for(rows, kGrain / count + 1, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    std::vector<double> scratch(static_cast<size_t>(scratch_size));
    for (int64_t row = begin; row < end; ++row) {
      if (!body(row, scratch.data())) {
        finite.store(false, std::memory_order_relaxed);
        return;
      }
    }
  });
  return finite;
}

SoftmaxConstants constants_of(const RowSoftmax& work) {
  const auto terms = static_cast<double>(work.count + 16);
  SoftmaxConstants constants{};
  // exponentials of csrc/interval/exponential.h, in numerator and denominator
  constants.relative = 4.0 * bound_of_roundings(terms, kUnit64) + 16.0 * kUnit64 + 0x1p-46;
  constants.of_spread = 16.0 * kUnit64;
  if (!work.deployed) return constants;
  constants.relative += bound_of_roundings(terms, rounding::kUnit) + 4.0 * rounding::kUnit;
  constants.of_spread32 = 16.0 * rounding::kUnit;
  constants.tiny = kTiny;
  constants.least = static_cast<float>(kTiny);
  return constants;
}

// Blocks of eight rows of all matrices one after another; the columns of B are packed once for
// those of a matrix.
struct ProductTask {
  const BoxProduct& work;
  TransformerKernels table;
  int64_t blocks, panels;
  double gain;

  explicit ProductTask(const BoxProduct& work)
      : work(work),
        table(pick_kernels()),
        blocks((work.rows + kBlockRows - 1) / kBlockRows),
        panels((work.columns + kBlockColumns - 1) / kBlockColumns),
        gain(8.0 * bound_of_roundings(static_cast<double>(work.terms + 8), kUnit64) + work.gain) {}

  void pack_columns(int64_t matrix, double* to) const {
    const Operand& b = work.b;
    const int64_t at = matrix * work.terms * work.columns;
    const int64_t term_stride = b.transposed ? 1 : work.columns;
    const int64_t stride = b.transposed ? work.terms : 1;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * kBlockColumns, from = at + first * stride;
      const int64_t count = std::min(kBlockColumns, work.columns - first);
      table.pack_columns({b.lower + from, b.upper + from, work.terms, count, term_stride, stride},
                         to + p * work.terms * kColumnTerm);
    }
  }

  // The first term beside T: what flushing of denormals takes from each product and sum.
  ProductEnds ends(double largest) const {
    ProductEnds result{};
    const bool deployed = work.gain > 0.0;
    result.gain = gain;
    result.limit = deployed ? kLargest / 4.0 : 1e300;
    result.lost = deployed ? kTiny * static_cast<double>(work.terms + 4) * (1.0 + largest) : 0.0;
    result.least = deployed ? static_cast<float>(kTiny) : 0.0f;
    return result;
  }

  // Rows [first, first + count) of a matrix.
  bool block(int64_t matrix, int64_t first, const double* rows, const double* largest,
             const double* columns) const {
    const int64_t count = std::min(kBlockRows, work.rows - first);
    double sums[kBlockSums];
    bool bounded = true;
    for (int64_t p = 0; p < panels; ++p) {
      table.product_block(rows, columns + p * work.terms * kColumnTerm, work.terms, sums);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (matrix * work.rows + first + r) * work.columns + p * kBlockColumns;
        ProductEnds own = ends(largest[r]);
        own.sums = sums + 3 * kBlockColumns * r;
        own.count = std::min(kBlockColumns, work.columns - p * kBlockColumns);
        own.out_lower = work.out_lower + at;
        own.out_upper = work.out_upper + at;
        bounded &= table.product_ends(own);
      }
    }
    return bounded;
  }

  // Blocks [begin, end) of all matrices.
  bool run(int64_t begin, int64_t end) const {
    std::vector<double> columns(static_cast<size_t>(panels * work.terms * kColumnTerm));
    std::vector<double> rows(static_cast<size_t>(work.terms * kRowTerm));
    int64_t packed = -1;
    bool bounded = true;
    for (int64_t i = begin; i < end && bounded; ++i) {
      const int64_t matrix = i / blocks, first = i % blocks * kBlockRows;
      if (matrix != packed) pack_columns(matrix, columns.data());
      packed = matrix;
      const int64_t from = (matrix * work.rows + first) * work.terms;
      double largest[kBlockRows];
      table.pack_rows({work.a.lower + from, work.a.upper + from, work.terms,
                       std::min(kBlockRows, work.rows - first), 1, work.terms},
                      rows.data(), largest);
      bounded = block(matrix, first, rows.data(), largest, columns.data());
    }
    return bounded;
  }
};

}  // namespace

bool row_norm(const RowNorm& work, int num_threads) {
  const int64_t numbers = work.weight_rows * work.count;
  if (work.deployed && (has_denormals(work.weight, numbers) || has_denormals(work.bias, numbers))) {
    return false;
  }
  const TransformerKernels table = pick_kernels();
  const NormConstants constants = constants_of(work);
  ask_for_large_pages(work.out_lower, work.out_upper, work.rows * work.count);
  return all_rows(
      work.rows, work.count, 4 * work.count, num_threads,
      [&](int64_t row, double* scratch) { return table.norm_row(work, constants, row, scratch); });
}

bool box_product(const BoxProduct& work, int num_threads) {
  ask_for_large_pages(work.out_lower, work.out_upper, work.batch * work.rows * work.columns);
  const ProductTask task(work);
  std::atomic<bool> finite{true};
  const double block = 5.0 * static_cast<double>(kBlockRows * work.terms * work.columns);
  const auto grain = static_cast<int64_t>(kGrainOfProducts / block) + 1;
  parallel_for(work.batch * task.blocks, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    if (!task.run(begin, end)) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

bool row_softmax(const RowSoftmax& work, int num_threads) {
  const TransformerKernels table = pick_kernels();
  const SoftmaxConstants constants = constants_of(work);
  ask_for_large_pages(work.out_lower, work.out_upper, work.rows * work.count);
  return all_rows(work.rows, work.count, 5 * padded_count(work.count), num_threads,
                  [&](int64_t row, double* scratch) {
                    return table.softmax_row(work, constants, row, scratch);
                  });
}

bool box_scale(const BoxScale& work, int num_threads) {
  const TransformerKernels table = pick_kernels();
  const int64_t elements = work.rows * work.count;
  ask_for_large_pages(work.out_lower, work.out_upper, elements);
  ScaleLoop loop{};
  loop.first = work.first;
  loop.last = work.last;
  loop.single = work.single;
  loop.bent = work.bent;
  loop.least = work.deployed ? static_cast<float>(kTiny) : 0.0f;
  const auto run = [&](int64_t at, int64_t count) {
    ScaleLoop own = loop;
    own.lower = work.lower + at;
    own.upper = work.upper + at;
    own.out_lower = work.out_lower + at;
    own.out_upper = work.out_upper + at;
    own.count = count;
    return table.scale(own);
  };
  std::atomic<bool> finite{true};
  const int64_t step = work.single ? 1 : work.count;
  parallel_for(elements / step, kGrainOfElements / step + 1, 1, num_threads,
               [&](int64_t begin, int64_t end) {
                 const DefaultFloatEnvironment environment;
                 bool bounded = true;
                 if (work.single) {
                   bounded = run(begin, end - begin);
                 } else {
                   for (int64_t row = begin; row < end; ++row) bounded &= run(row * step, step);
                 }
                 if (!bounded) finite.store(false, std::memory_order_relaxed);
               });
  return finite;
}

}  // namespace transformer
}  // namespace pyrobust
