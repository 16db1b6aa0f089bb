// The AVX2 paths of every format: tiles of four rows of W and up to three rows of x, 64 columns at
// a time, in the order of k of avx2_decode.h. avx2_exact.h and avx2_int8.h hold the two modes,
// avx2_plain.h and avx2_groups.h those of other groups along a row; this file prepares x and
// chooses. Included by avx2.cpp, and by avx512.cpp for what it does not better.
#pragma once

#include "core/activation_int8.h"
#include "matmul/avx2_complex.h"
#include "matmul/avx2_exact.h"
#include "matmul/avx2_group_panel.h"
#include "matmul/avx2_plain.h"
#include "matmul/sparse.h"

namespace pyrobust::matmul {
namespace {

// --- preparation of x
// -----------------------------------------------------------------------------

// Plain order to block order; columns past the end get 0.
void to_block_order(const float* row, int64_t cols, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < 8; ++i) {
      for (int64_t j = 0; j < 8; ++j) {
        const int64_t k = b * kBlock + 8 * i + j;
        out[b * kBlock + j * 8 + i] = k < cols ? row[k] : 0.0f;
      }
    }
  }
}

void prepare_integer_row(const PackedMatrix& w, const int8_t* q, int64_t m, const IntegerRows& x) {
  const int bits = bits_of(w);
  const int64_t groups = groups_of(w), columns = x.stride;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t from = g * w.group_size;
    const int64_t to = w.cols - from < w.group_size ? w.cols : from + w.group_size;
    int32_t sum = 0;
    for (int64_t k = from; k < to; ++k) sum += q[k];
    x.q_sum[m * groups + g] = sum;
  }
  if (bits == 8) {
    auto* out = reinterpret_cast<int16_t*>(x.q) + m * x.stride;
    for (int64_t k = 0; k < columns; ++k) out[k] = k < w.cols ? q[k] : int16_t{0};
    return;
  }
  uint8_t order[kBlock];
  for (int p = 0; p < kBlock; ++p) order[p] = static_cast<uint8_t>(byte_order(bits, p));
  char* out = x.q + m * x.stride;
  for (int64_t b = 0; b < columns; b += kBlock) {
    for (int64_t p = 0; p < kBlock; ++p) {
      const int64_t k = b + order[p];
      out[b + p] = k < w.cols ? q[k] : char{0};
    }
  }
}

void load_row(const Activations& x, int64_t row, int64_t cols, float* out) {
  if (cols == 0) return;  // x may then be null, which memcpy must not see
  if (x.type == FloatType::kFloat32) {
    __builtin_memcpy(out, static_cast<const float*>(x.data) + row * cols,
                     static_cast<size_t>(cols) * sizeof(float));
    return;
  }
  const int64_t from = row * cols;
  for (int64_t k = 0; k < cols; ++k) out[k] = load_float(x.data, from + k, x.type);
}

// --- sizes, preparation, choice
// -------------------------------------------------------------------

int64_t prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t columns = blocks_of(w) * kBlock;
  switch (path_of(w, mode)) {
    case Path::kIntegerBlocks:
      return rows * (columns * (bits_of(w) == 8 ? 2 : 1) +
                     groups_of(w) * static_cast<int64_t>(sizeof(int32_t)));
    case Path::kIntegerGroups:
      return GroupRows(nullptr, w, rows).used;
    default:
      return rows * columns * static_cast<int64_t>(sizeof(float));
  }
}

int64_t scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  const int64_t prepare = blocks_of(w) * kBlock * 5 + 64;  // one row as floats and as bytes
  const int64_t multiply = Scratch(nullptr, w, path_of(w, mode), rows).used;
  return prepare > multiply ? prepare : multiply;
}

void prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first, int64_t rows,
             RowRange part, void* prepared, double* step, void* scratch) {
  const Path path = path_of(w, mode);
  const int64_t blocks = blocks_of(w), columns = blocks * kBlock;
  auto* row = static_cast<float*>(scratch);
  auto* q = reinterpret_cast<int8_t*>(row + columns);
  for (int64_t m = part.begin; m < part.end; ++m) {
    load_row(x, first + m, w.cols, row);
    if (mode == Mode::kInt8) {
      step[m] = activation_step(row, w.cols);
      quantize_activations(row, w.cols, step[m], q);
    }
    if (path == Path::kIntegerBlocks) {
      prepare_integer_row(w, q, m, IntegerRows(prepared, w, rows));
    } else if (path == Path::kIntegerGroups) {
      prepare_group_row(w, q, m, GroupRows(prepared, w, rows));
    } else if (path == Path::kPlain) {
      float* out = static_cast<float*>(prepared) + m * columns;
      __builtin_memcpy(out, row, static_cast<size_t>(w.cols) * sizeof(float));
      for (int64_t k = w.cols; k < columns; ++k) out[k] = 0.0f;
    } else {
      if (path == Path::kDoubleColumns) {
        for (int64_t k = 0; k < w.cols; ++k) row[k] = q[k];
      }
      to_block_order(row, w.cols, blocks, static_cast<float*>(prepared) + m * columns);
    }
  }
}

template <int kBits>
void multiply_bits(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* memory) {
  const Path path = path_of(w, mode);
  const Scratch scratch(memory, w, path, block.rows);
  switch (path) {
    case Path::kBlocks:
    case Path::kScaled:
      return multiply_exact<kBits>(w, path, block, begin, end, out, scratch);
    case Path::kIntegerBlocks:
      if (block.rows > kFusedRows) {
        return multiply_integer_panels<kBits>(w, block, begin, end, out, scratch);
      }
      return multiply_integer_blocks<kBits>(w, block, begin, end, out, scratch);
    case Path::kIntegerGroups:
      if (takes_group_panels(w, block.rows)) {
        return multiply_group_panels<kBits>(w, block, begin, end, out, scratch);
      }
      return multiply_integer_groups(w, block, begin, end, out, scratch);
    case Path::kPlain:
      return multiply_plain(w, block, begin, end, out, scratch);
    case Path::kDoubleColumns:
      return multiply_double_columns<kBits>(w, block, begin, end, out, scratch);
  }
}

void multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
              const Output& out, void* scratch) {
  switch (bits_of(w)) {
    case 1:
      return multiply_bits<1>(w, mode, block, begin, end, out, scratch);
    case 2:
      return multiply_bits<2>(w, mode, block, begin, end, out, scratch);
    case 3:
      return multiply_bits<3>(w, mode, block, begin, end, out, scratch);
    case 4:
      return multiply_bits<4>(w, mode, block, begin, end, out, scratch);
    default:
      return multiply_bits<8>(w, mode, block, begin, end, out, scratch);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
