// The reference path: plain loops over core/, double sums, no intrinsics. The other paths are
// tested against it, in int8 mode for equal bits.
#include "core/activation_int8.h"
#include "matmul/add_plain.h"
#include "matmul/gradient_tile.h"
#include "matmul/kernels.h"
#include "matmul/sparse.h"
#include "matmul/weights.h"

namespace pyrobust::matmul {
namespace {

double sum_of_lanes(const double* lane) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// The products are exact in double: 24 + 24 bits.
double dot(const float* a, const float* b, int64_t count) {
  double lane[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    for (int i = 0; i < 8; ++i) lane[i] += static_cast<double>(a[k + i]) * b[k + i];
  }
  for (int i = 0; k + i < count; ++i) lane[i] += static_cast<double>(a[k + i]) * b[k + i];
  return sum_of_lanes(lane);
}

double grouped_integer_dot(const PackedMatrix& w, int64_t n, const int8_t* q, const int16_t* v) {
  const int64_t first = scale_row(w, n);
  double total = 0.0;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += w.group_size, ++group) {
    const int64_t end = w.cols - begin > w.group_size ? begin + w.group_size : w.cols;
    const double scale = scale_at(w, first + group);
    for (int64_t from = begin; from < end; from += kMaxIntegerRun) {
      const int64_t to = end - from > kMaxIntegerRun ? from + kMaxIntegerRun : end;
      int32_t sum = 0;
      for (int64_t k = from; k < to; ++k) sum += q[k] * v[k];
      total += static_cast<double>(sum) * scale;
    }
  }
  return total;
}

double columnwise_integer_dot(const PackedMatrix& w, const int8_t* q, const float* weight) {
  double lane[8] = {};
  for (int64_t k = 0; k < w.cols; ++k) lane[k / 8 % 8] += static_cast<double>(q[k]) * weight[k];
  return sum_of_lanes(lane);
}

int64_t prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  return rows * w.cols * static_cast<int64_t>(mode == Mode::kExact ? sizeof(float) : 1);
}

int64_t scratch_bytes(const PackedMatrix& w, Mode, int64_t) {
  return w.cols * static_cast<int64_t>(sizeof(float));
}

void prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first, int64_t,
             RowRange part, void* prepared, double* step, void* scratch) {
  for (int64_t m = part.begin; m < part.end; ++m) {
    float* row = mode == Mode::kExact ? static_cast<float*>(prepared) + m * w.cols
                                      : static_cast<float*>(scratch);
    for (int64_t k = 0; k < w.cols; ++k) {
      row[k] = load_float(x.data, (first + m) * w.cols + k, x.type);
    }
    if (mode == Mode::kInt8) {
      step[m] = activation_step(row, w.cols);
      quantize_activations(row, w.cols, step[m], static_cast<int8_t*>(prepared) + m * w.cols);
    }
  }
}

void multiply_exact(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                    const Output& out, float* row) {
  const float* x = static_cast<const float*>(block.data);
  for (int64_t n = begin; n < end; ++n) {
    float_row(w, n, row);
    for (int64_t m = 0; m < block.rows; ++m) {
      store_result(out, m, n, dot(x + m * w.cols, row, w.cols), 1.0);
    }
  }
}

void multiply_int8(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* scratch) {
  const int8_t* q = static_cast<const int8_t*>(block.data);
  for (int64_t n = begin; n < end; ++n) {
    if (w.group_dim == 1) {
      integer_row(w, n, static_cast<int16_t*>(scratch));
    } else {
      float_row(w, n, static_cast<float*>(scratch));
    }
    for (int64_t m = 0; m < block.rows; ++m) {
      const int8_t* row = q + m * w.cols;
      const double total =
          w.group_dim == 1 ? grouped_integer_dot(w, n, row, static_cast<const int16_t*>(scratch))
                           : columnwise_integer_dot(w, row, static_cast<const float*>(scratch));
      store_result(out, m, n, total, block.step[m]);
    }
  }
}

void multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
              const Output& out, void* scratch) {
  if (mode == Mode::kExact) {
    multiply_exact(w, block, begin, end, out, static_cast<float*>(scratch));
  } else {
    multiply_int8(w, block, begin, end, out, scratch);
  }
}

// The codes of kBits bits in every byte.
template <int kBits>
struct CodeTable {
  uint8_t of_byte[256][8 / kBits];
  constexpr CodeTable() : of_byte() {
    for (int value = 0; value < 256; ++value) {
      for (int k = 0; k < 8 / kBits; ++k) {
        of_byte[value][k] = static_cast<uint8_t>((value >> (kBits * k)) & ((1 << kBits) - 1));
      }
    }
  }
};
template <int kBits>
constexpr CodeTable<kBits> kCodes;

struct PlainCodes {
  // Eight codes lie in kBits bytes.
  template <int kBits>
  static int64_t expand_runs(const uint8_t* __restrict codes, int64_t count,
                             uint8_t* __restrict out) {
    constexpr uint64_t kField = (1u << kBits) - 1;
    if constexpr (kBits == 4) {
      for (int64_t i = 0; i < count / 8 * 4; ++i) {
        out[2 * i] = codes[i] & kField;
        out[2 * i + 1] = static_cast<uint8_t>(codes[i] >> 4);
      }
      return count / 8 * 8;
    } else if constexpr (kBits < 3) {
      constexpr auto kPerByte = sizeof(kCodes<kBits>.of_byte[0]);
      for (int64_t i = 0; i < count / 8 * kBits; ++i) {
        __builtin_memcpy(out + kPerByte * i, kCodes<kBits>.of_byte[codes[i]], kPerByte);
      }
      return count / 8 * 8;
    }
    for (int64_t i = 0; i < count / 8; ++i) {
      uint64_t word = 0;
      for (int b = 0; b < kBits; ++b) {
        word |= static_cast<uint64_t>(codes[kBits * i + b]) << (8 * b);
      }
      // Eight neighbours move apart by halves: two times four of them, four times two, one a byte.
      word = (word | word << (32 - 4 * kBits)) & ((1ull << 4 * kBits) - 1) * 0x0000000100000001ull;
      word = (word | word << (16 - 2 * kBits)) & ((1ull << 2 * kBits) - 1) * 0x0001000100010001ull;
      word = (word | word << (8 - kBits)) & kField * 0x0101010101010101ull;
      for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<uint8_t>(word >> (8 * k));
    }
    return count / 8 * 8;
  }

  static void expand_ternary(const uint8_t* codes, int64_t count, uint8_t* out) {
    expand_digits(codes, count, out);
  }

  static void look_up(const uint8_t* codebook, int, int64_t count, uint8_t* out) {
    for (int64_t k = 0; k < count; ++k) out[k] = codebook[out[k]];
  }
};

bool takes_parts(const PackedMatrix&) { return false; }

int complex_order(int p) { return p; }

void complex_multiply(const ComplexBlock& x, int64_t begin, int64_t end) {
  constexpr int kSign[4] = {1, 0, -1, 0};
  const int64_t stride = x.blocks * kComplexBlock, cols = x.problem->cols;
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = x.problem->codes + n * packed_row_bytes(cols, 4);
    for (int64_t m = 0; m < x.problem->count; ++m) {
      const int8_t *a = x.real + m * stride, *b = x.imag + m * stride;
      int32_t au = 0, av = 0, bu = 0, bv = 0;
      for (int64_t k = 0; k < cols; ++k) {
        const int code = get_code(row, k, 4);
        const int u = kSign[code], v = kSign[(code + 3) % 4];
        au += a[k] * u;
        av += a[k] * v;
        bu += b[k] * u;
        bv += b[k] * v;
      }
      store_complex(x, m, n, au, bv, av, -bu);
    }
  }
}

void add_gradient_tile(const float* g, int64_t rows, int64_t count, const float* tile,
                       double* totals) {
  for (int64_t m = 0; m < rows; ++m, g += kGradientRows, totals += kGradientColumns) {
    for (int64_t n = 0; n < count; ++n) {
      const double a = g[n];
      const float* w = tile + n * kGradientColumns;
      for (int64_t k = 0; k < kGradientColumns; ++k) totals[k] += a * w[k];
    }
  }
}

constexpr MatmulKernels kKernels = {takes_parts,
                                    prepared_bytes,
                                    scratch_bytes,
                                    prepare,
                                    multiply,
                                    1,
                                    decode_span<PlainCodes>,
                                    add_span<PlainCodes>,
                                    add_levels_span<PlainCodes>,
                                    add_values_run,
                                    sparse_prepare,
                                    sparse_multiply,
                                    complex_order,
                                    complex_multiply,
                                    0,
                                    nullptr,
                                    nullptr,
                                    expand_row<PlainCodes>,
                                    nullptr,
                                    plain_gradient_tile<PlainCodes>,
                                    add_gradient_tile,
                                    plain_gradient_order};

}  // namespace

const MatmulKernels& portable_kernels() { return kKernels; }

}  // namespace pyrobust::matmul
