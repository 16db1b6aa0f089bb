// Checks, picks the instruction set's table, cuts M into blocks and the rows of W into threads.
#include "matmul/dispatch.h"

#include "core/activation_int8.h"
#include "matmul/weights.h"
#include "runtime/pages.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"
#include "runtime/stream_copy.h"

namespace pyrobust::matmul {
namespace {

// Up to so many rows of x are prepared by each thread for itself: that takes as long as one thread
// preparing them for all, and none waits for what lies in the cache of another.
constexpr int64_t kOwnRows = 8;

// Threads may share rows of x, so many at a time, in place of those of W where W has up to so many
// weights: each thread then reads all of them, and its own rows of x alone.
constexpr int64_t kRowsOfX = 8;
constexpr int64_t kNearWeights = int64_t{1} << 21;

// The remainder's side of a product: its own copy of the block of x, and sums for a few rows of W
// at a time, which `multiply` of the dense side then adds. Does nothing without a remainder.
class SparseBlock {
 public:
  SparseBlock(const PackedMatrix& weight, Mode mode, const Activations& x)
      : weight_(weight), mode_(mode), x_(x), present_(weight.remainder.offsets != nullptr) {}

  void prepare(int64_t first, int64_t rows) {
    if (!present_) return;
    const int64_t floats = (rows + 1) * weight_.cols;
    auto* memory = static_cast<float*>(
        thread_scratch(ScratchSlot::kSparse, floats * static_cast<int64_t>(sizeof(float))));
    kernels_with(&MatmulKernels::sparse_prepare)
        .sparse_prepare(mode_, x_, weight_.cols, first, rows, memory, memory + rows * weight_.cols);
    prepared_ = memory;
  }

  int64_t rows_at_once(int64_t rows) const { return present_ ? std::min(kSparseRun, rows) : rows; }

  void multiply(int64_t begin, int64_t end, int64_t rows, Output* out) const {
    if (!present_) return;
    auto* sums = static_cast<double*>(thread_scratch(
        ScratchSlot::kSums, kSparseRun * rows * static_cast<int64_t>(sizeof(double))));
    kernels_with(&MatmulKernels::sparse_multiply)
        .sparse_multiply(weight_, prepared_, rows, begin, end, sums);
    out->remainder = sums;
    out->remainder_row = begin;
    out->remainder_stride = rows;
  }

 private:
  // 64 rows of W: 128 KiB of sums for a full block, and whole panels of the dense kernels.
  static constexpr int64_t kSparseRun = 64;

  const PackedMatrix& weight_;
  Mode mode_;
  const Activations& x_;
  bool present_;
  const float* prepared_ = nullptr;
};

// What packed_linear() was called with.
struct Product {
  const Activations& x;
  const PackedMatrix& weight;
  RowRange range;
  const float* bias;
  void* out;
  int num_threads;
};

struct PreparedRows {
  void* data;
  double* step;
  int64_t rows;
};

// Rows [begin, end) of x; threads share the rows of W.
void multiply_block_rows(const Product& p, Mode mode, int64_t begin, int64_t end) {
  const PackedMatrix& weight = p.weight;
  const int64_t count = p.range.end - p.range.begin;
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::multiply);
  const int64_t block_rows = std::min(end - begin, kMaxBlockRows);
  const int64_t prepared_bytes = kernels.prepared_bytes(weight, mode, block_rows);
  const int64_t scratch_bytes = kernels.scratch_bytes(weight, mode, block_rows);
  const auto scratch = [&] { return thread_scratch(ScratchSlot::kThread, scratch_bytes); };
  const auto memory = [&](int64_t rows) {  // of the thread that asks
    const int64_t bytes = block_rows * static_cast<int64_t>(sizeof(double));
    return PreparedRows{thread_scratch(ScratchSlot::kShared, prepared_bytes),
                        static_cast<double*>(thread_scratch(ScratchSlot::kSteps, bytes)), rows};
  };
  const bool own = end - begin <= kOwnRows;
  SparseBlock sparse(weight, mode, p.x);
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t rows = std::min(block_rows, end - first);
    const auto prepare = [&](const PreparedRows& to, RowRange part) {
      kernels.prepare(weight, mode, p.x, first, rows, part, to.data, to.step, scratch());
    };
    const PreparedRows shared = memory(rows);
    if (!own) {
      parallel_for(rows, grain_rows(64 * weight.cols), 8, p.num_threads,
                   [&](int64_t from, int64_t to) { prepare(shared, {from, to}); });
    }
    sparse.prepare(first, rows);
    const Output output{p.out, p.bias, p.x.type, first, count, p.range.begin, weight.row_scale};
    parallel_for(count, grain_rows(rows * weight.cols), kernels.row_align, p.num_threads,
                 [&](int64_t from, int64_t to) {
                   const PreparedRows prepared = own ? memory(rows) : shared;
                   if (own) prepare(prepared, {0, rows});
                   const Block block{prepared.data, prepared.step, rows};
                   Output result = output;
                   const int64_t run = sparse.rows_at_once(to - from);
                   for (int64_t n = p.range.begin + from; n < p.range.begin + to; n += run) {
                     const int64_t stop = std::min(p.range.begin + to, n + run);
                     sparse.multiply(n, stop, rows, &result);
                     kernels.multiply(weight, mode, block, n, stop, result, scratch());
                   }
                 });
  }
}

// Whether threads share rows of x: where x has more runs of rows than W, and W is small or has too
// few for all threads. On a Zen 4 processor 4096 rows of x and 16 to 128 of W then take a half to a
// fifth less time, 512 up to a sixth, as no thread reads x from the cache of another; more weights
// gain nothing, and lose where each unpacks all of them.
bool shares_x(const Product& p, int64_t rows) {
  const int64_t count = p.range.end - p.range.begin;
  const int64_t runs = ceil_div(count, kernels_with(&MatmulKernels::multiply).row_align);
  const bool near = count * p.weight.cols <= kNearWeights || runs < p.num_threads;
  return p.num_threads > 1 && near && rows / kRowsOfX > runs;
}

// Rows [begin, end) of x.
void multiply_rows(const Product& p, Mode mode, int64_t begin, int64_t end) {
  if (!shares_x(p, end - begin)) return multiply_block_rows(p, mode, begin, end);
  Product own = p;  // of a thread
  own.num_threads = 1;
  const int64_t work = (p.range.end - p.range.begin) * p.weight.cols;
  parallel_for(
      end - begin, grain_rows(work), kRowsOfX, p.num_threads,
      [&](int64_t from, int64_t to) { multiply_block_rows(own, mode, begin + from, begin + to); });
}

// Whether float x is multiplied in parts. These are made for panels, whatever part of a panel the
// weight has rows for, and making three of float32 takes longer than two of 16 bits. With one
// thread of a Zen 4 processor, 256 rows and 576 columns, parts took 2.3, 1.8, 1.4 and 1.2 times as
// long as float arithmetic for weights of 8, 16, 24 and 32 rows, 1.4, 1.0, 0.9 and 0.7 in 16 bits.
bool multiplies_parts(const PackedMatrix& weight, FloatType type) {
  const int64_t panel = kernels_with(&MatmulKernels::write_panels).panel_rows;
  return weight.rows >= (type == FloatType::kFloat32 ? panel : panel / 2) &&
         kernels_with(&MatmulKernels::takes_parts).takes_parts(weight);
}

// Rows of float32 that take parts, each as many as it needs: runs of rows with the same mode.
void multiply_float_rows(const Product& p) {
  const int64_t cols = p.weight.cols;
  const auto* x = static_cast<const float*>(p.x.data);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::row_mode);
  Mode modes[kMaxBlockRows];
  for (int64_t first = 0; first < p.x.rows; first += kMaxBlockRows) {
    const int64_t rows = std::min(kMaxBlockRows, p.x.rows - first);
    parallel_for(rows, grain_rows(8 * cols), 1, p.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        modes[m] = kernels.row_mode(p.weight, x + (first + m) * cols);
      }
    });
    for (int64_t m = 0, end; m < rows; m = end) {
      for (end = m + 1; end < rows && modes[end] == modes[m];) ++end;
      multiply_rows(p, modes[m], first + m, first + end);
    }
  }
}

}  // namespace

void packed_linear(const Activations& x, const PackedMatrix& weight, RowRange range,
                   const float* bias, Mode mode, void* out, int num_threads) {
  check_weight(weight);
  check_range(weight, range);
  check(x.rows >= 0, "x must not have a negative number of rows; got ", x.rows, ".");
  if (x.rows == 0 || range.begin == range.end) return;
  prefer_large_pages(out, x.rows * (range.end - range.begin) * float_type_bytes(x.type));
  const Product product{x, weight, range, bias, out, num_threads};
  if (mode == Mode::kExact && multiplies_parts(weight, x.type)) {
    if (x.type == FloatType::kFloat32) return multiply_float_rows(product);
    mode = Mode::kTwoParts;
  }
  multiply_rows(product, mode, 0, x.rows);
}

int64_t panel_bytes(const PackedMatrix& weight) {
  check_weight(weight);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::panel_bytes);
  return kernels.panel_bytes == nullptr ? 0 : kernels.panel_bytes(weight);
}

void make_panels(const PackedMatrix& weight, uint8_t* out, int num_threads) {
  check(panel_bytes(weight) > 0, "this weight has no panel order.");
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::write_panels);
  const int64_t count = ceil_div(weight.rows, kernels.panel_rows);
  parallel_for(count, grain_rows(8 * kernels.panel_rows * weight.cols), 1, num_threads,
               [&](int64_t begin, int64_t end) { kernels.write_panels(weight, begin, end, out); });
}

void write_panels(const PackedMatrix& weight, uint8_t* out) {
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::write_panels);
  kernels.write_panels(weight, 0, ceil_div(weight.rows, kernels.panel_rows), out);
}

PackedMatrix part_of(const PackedMatrix& weight, int64_t first, int64_t count) {
  PackedMatrix part = weight;
  const int64_t groups = scale_row(weight, first);  // before those of the rows
  const int64_t scale_bytes = weight.row_scale != nullptr ? 1 : float_type_bytes(weight.scale_type);
  part.codes = code_row(weight, first);
  part.scale = static_cast<const uint8_t*>(weight.scale) + groups * scale_bytes;
  if (weight.zero != nullptr) part.zero = weight.zero + groups;
  if (weight.row_scale != nullptr) part.row_scale = weight.row_scale + first;
  part.panels = nullptr;
  part.rows = count;
  return part;
}

namespace {

// Calls body(n, begin, end) for the spans of rows [first, first + count), split over threads; a
// thread's share may begin inside a row.
template <typename Body>
void for_spans(int64_t first, int64_t count, int64_t cols, int num_threads, const Body& body) {
  const int64_t spans = ceil_div(cols, kSpan);
  const int64_t work = 8 * std::min(cols, kSpan);
  parallel_for(count * spans, grain_rows(work), 1, num_threads, [&](int64_t from, int64_t to) {
    int64_t n = first + from / spans, span = from % spans;  // no division a span
    for (int64_t i = from; i < to; ++i) {
      body(n, span * kSpan, std::min(cols, (span + 1) * kSpan));
      if (++span == spans) {
        ++n;
        span = 0;
      }
    }
    stream_fence();  // for bodies that save
  });
}

}  // namespace

void dequantize(const PackedMatrix& weight, RowRange range, float* out, int num_threads) {
  check_weight(weight);
  check_range(weight, range);
  prefer_large_pages(
      out, (range.end - range.begin) * weight.cols * float_type_bytes(FloatType::kFloat32));
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::decode);
  for_spans(range.begin, range.end - range.begin, weight.cols, num_threads,
            [&](int64_t n, int64_t begin, int64_t end) {
              kernels.decode(weight, n, begin, end, out + (n - range.begin) * weight.cols + begin);
            });
}

namespace {

float rounded_to(FloatType type, float value) {
  if (type == FloatType::kFloat32) return value;
  uint16_t half;
  store_float(&half, 0, type, value);
  return load_float(&half, 0, type);
}

void fill_table(int levels, const float* from, float alpha, FloatType type, LevelTable* table) {
  table->alpha = alpha;
  for (int i = 0; i < levels; ++i) {
    table->scaled[i] = alpha * rounded_to(type, from[i]);
    if (type != FloatType::kFloat32) store_float(table->half, i, type, from[i]);
  }
}

// Where column k of row n of a target lies, and where it is saved, or null.
struct Place {
  void* held;
  void* saved;

  Place(const AddTarget& target, int64_t n, int64_t cols, int64_t k) {
    const int64_t size = float_type_bytes(target.type);
    held = static_cast<char*>(target.data) + (n * target.row_stride + k) * size;
    saved = target.saved;
    if (saved != nullptr) saved = static_cast<char*>(saved) + (n * cols + k) * size;
  }
};

}  // namespace

void add_dequantized(const PackedMatrix& weight, float alpha, const AddTarget& target,
                     int num_threads) {
  check_weight(weight);
  const float factor = rounded_to(target.type, alpha);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::add);
  for_spans(0, weight.rows, weight.cols, num_threads, [&](int64_t n, int64_t begin, int64_t end) {
    const Place place(target, n, weight.cols, begin);
    kernels.add(weight, n, begin, end, factor, target.type, place.held, place.saved);
  });
}

void add_levels(const LevelCodes& codes, const float* table, float alpha, const AddTarget& target,
                int num_threads) {
  check_format(codes.levels, codes.rows, codes.cols);
  LevelTable entries;
  fill_table(codes.levels, table, rounded_to(target.type, alpha), target.type, &entries);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::add_levels);
  for_spans(0, codes.rows, codes.cols, num_threads, [&](int64_t n, int64_t begin, int64_t end) {
    const Place place(target, n, codes.cols, begin);
    kernels.add_levels(codes, entries, n, begin, end, target.type, place.held, place.saved);
  });
}

void add_values(const void* values, FloatType values_type, int64_t rows, int64_t cols, float alpha,
                const AddTarget& target, int num_threads) {
  check(values_type == FloatType::kFloat32 || values_type == target.type,
        "values must be float32 or of the target's dtype.");
  const float factor = rounded_to(target.type, alpha);
  const int64_t size = float_type_bytes(values_type);
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::add_values);
  for_spans(0, rows, cols, num_threads, [&](int64_t n, int64_t begin, int64_t end) {
    const Place place(target, n, cols, begin);
    const void* from = static_cast<const char*>(values) + (n * cols + begin) * size;
    kernels.add_values(from, values_type, end - begin, factor, target.type, place.held,
                       place.saved);
  });
}

void dequantize_rows(const PackedMatrix& weight, int64_t begin, int64_t end, float* out) {
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::decode);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t k = 0; k < weight.cols; k += kSpan) {
      const int64_t stop = std::min(weight.cols, k + kSpan);
      kernels.decode(weight, n, k, stop, out + (n - begin) * weight.cols + k);
    }
  }
}

const uint8_t* code_bytes(const PackedMatrix& weight, int64_t n, uint8_t* scratch) {
  if (weight.levels != 256) {
    kernels_with(&MatmulKernels::expand).expand(weight, n, scratch);
    return scratch;
  }
  const uint8_t* row = code_row(weight, n);
  if (weight.codebook == nullptr) return row;
  for (int64_t k = 0; k < weight.cols; ++k) scratch[k] = weight.codebook[row[k]];
  return scratch;
}

void gather_rows(const PackedMatrix& weight, const int64_t* indices, int64_t count, float* out,
                 int num_threads) {
  check_weight(weight);
  for (int64_t i = 0; i < count; ++i) {
    check(indices[i] >= 0 && indices[i] < weight.rows, "indices must lie in [0, ", weight.rows,
          "); got ", indices[i], ".");
  }
  parallel_for(count, grain_rows(8 * weight.cols), 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dequantize_rows(weight, indices[i], indices[i] + 1, out + i * weight.cols);
    }
  });
}

namespace {

// Bytes of the working memory of complex_product, and its parts.
struct ComplexMemory {
  int8_t *real, *imag;
  int32_t *sum_real, *sum_imag;

  ComplexMemory(int64_t count, int64_t width) {
    const int64_t sums = count * static_cast<int64_t>(sizeof(int32_t));
    auto* memory =
        static_cast<char*>(thread_scratch(ScratchSlot::kShared, 2 * count * width + 2 * sums));
    real = reinterpret_cast<int8_t*>(memory);
    imag = real + count * width;
    sum_real = reinterpret_cast<int32_t*>(imag + count * width);
    sum_imag = sum_real + count;
  }
};

int32_t order_row(const int8_t* x, int64_t cols, int64_t blocks, const int* order, int8_t* out) {
  int32_t sum = 0;
  for (int64_t k = 0; k < cols; ++k) sum += x[k];
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t p = 0; p < kComplexBlock; ++p) {
      const int64_t k = b * kComplexBlock + order[p];
      out[b * kComplexBlock + p] = k < cols ? x[k] : int8_t{0};
    }
  }
  return sum;
}

// `block` says where results go; the rest of it is filled in here.
void complex_product(const ComplexProblem& p, ComplexBlock block, int num_threads) {
  check(p.rows >= 0 && p.count >= 0 && p.cols >= 0, "sizes must not be negative.");
  check(p.cols <= kComplexMaxCols, "the complex product takes at most 2^23 columns; got ", p.cols,
        ".");
  if (p.rows == 0 || p.count == 0) return;
  const MatmulKernels& kernels = kernels_with(&MatmulKernels::complex_multiply);
  int order[kComplexBlock];
  for (int i = 0; i < kComplexBlock; ++i) order[i] = kernels.complex_order(i);
  block.problem = &p;
  block.blocks = ceil_div(p.cols, kComplexBlock);
  const int64_t width = block.blocks * kComplexBlock;
  const ComplexMemory memory(p.count, width);
  for (int64_t m = 0; m < p.count; ++m) {
    const auto ordered = [&](const int8_t* x, int8_t* out) {
      return order_row(x + m * p.cols, p.cols, block.blocks, order, out + m * width);
    };
    memory.sum_real[m] = ordered(p.x_real, memory.real);
    memory.sum_imag[m] = ordered(p.x_imag, memory.imag);
  }
  block.real = memory.real;
  block.imag = memory.imag;
  block.sum_real = memory.sum_real;
  block.sum_imag = memory.sum_imag;
  parallel_for(p.rows, grain_rows(4 * p.count * p.cols), 1, num_threads,
               [&](int64_t begin, int64_t end) { kernels.complex_multiply(block, begin, end); });
}

}  // namespace

void complex_sums(const ComplexProblem& problem, int32_t* out, int num_threads) {
  ComplexBlock block;
  block.sums = out;
  complex_product(problem, block, num_threads);
}

void complex_linear(const ComplexProblem& problem, const ComplexScales& scales, float* y_real,
                    float* y_imag, int num_threads) {
  ComplexBlock block;
  block.scales = scales;
  block.y_real = y_real;
  block.y_imag = y_imag;
  complex_product(problem, block, num_threads);
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
