// Differs from portable.cpp in working on tiles and in 512-bit registers with VNNI where that was
// written (avx512_int8.h and, for weights in panel order, avx512_panels.h: activations of 8 bits
// or in 8-bit parts, groups of whole blocks); the other formats
// take the code of avx2_paths.h, compiled with these wider flags.
#include "matmul/avx2_paths.h"
#include "matmul/avx512_float_rows.h"
#include "matmul/avx512_gradient_words.h"
#include "matmul/avx512_panel_columns.h"
#include "matmul/avx512_panels.h"
#include "matmul/avx512_rows.h"
#include "matmul/avx512_sign_products.h"

namespace pyrobust::matmul {
namespace {

bool takes_parts(const PackedMatrix& w) {
  return path_of(w, Mode::kInt8) == Path::kIntegerBlocks || has_panels_alone(w);
}

bool reads_panels(const PackedMatrix& w) { return w.panels != nullptr || has_panels_alone(w); }

bool is_wide(const PackedMatrix& w, Mode mode) { return mode != Mode::kExact && takes_parts(w); }

int64_t wide_prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (by_columns(w, mode)) return rows * column_row_bytes(w);
  if (!is_wide(w, mode)) return prepared_bytes(w, mode, rows);
  if (reads_panels(w)) {
    const int64_t own = takes_signs(w, mode, rows) ? SignRows(nullptr, w, rows).used : 0;
    const int64_t other = PanelRows(nullptr, w, rows, mode).used;  // of a last block of fewer rows
    return own > other ? own : other;
  }
  return WideRows(nullptr, w, rows, mode).used;
}

int64_t wide_scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (by_columns(w, mode)) return ColumnScratch(nullptr, w).used;
  if (!is_wide(w, mode)) return scratch_bytes(w, mode, rows);
  if (reads_panels(w)) {
    const int64_t padded = padded_rows_bytes(w), products = panel_scratch_bytes(w, mode, rows);
    const int64_t signs = takes_signs(w, mode, rows) ? sign_scratch_bytes(w, rows) : 0;
    const int64_t multiply = signs > products ? signs : products;
    return padded > multiply ? padded : multiply;
  }
  return WideScratch(nullptr, w, rows).used;
}

void prepare_canonical_row(const PackedMatrix& w, Mode mode, const char* row, FloatType type,
                           int64_t m, const WideRows& out, double* step) {
  switch (mode) {
    case Mode::kTwoParts:
      return prepare_parts_row<2>(w, row, type, m, out);
    case Mode::kThreeParts:
      return prepare_parts_row<3>(w, row, type, m, out);
    case Mode::kFourParts:
      return prepare_parts_row<4>(w, row, type, m, out);
    default:
      return prepare_wide_row(w, row, type, m, out, step);
  }
}

void wide_prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first,
                  int64_t rows, RowRange part, void* prepared, double* step, void* scratch) {
  if (by_columns(w, mode)) return prepare_column_rows(w, x, first, part, prepared, step);
  if (!is_wide(w, mode)) return prepare(w, mode, x, first, rows, part, prepared, step, scratch);
  if (takes_signs(w, mode, rows)) {
    return prepare_sign_rows(w, x, first, rows, part, prepared, step, scratch);
  }
  if (reads_panels(w)) {
    return prepare_panel_rows(w, mode, x, first, rows, part, prepared, step, scratch);
  }
  const WideRows out(prepared, w, rows, mode);
  const int64_t row_bytes = w.cols * float_type_bytes(x.type);
  for (int64_t m = part.begin; m < part.end; ++m) {
    const auto* row = static_cast<const char*>(x.data) + (first + m) * row_bytes;
    prepare_canonical_row(w, mode, row, x.type, m, out, step + m);
    for (int p = 0; !out.tiled() && p < out.parts; ++p) {
      if (out.has_trits()) spread_trits(w, out, m, p);
      if (out.bits == 4) zip_pairs(w, out.q + (p * rows + m) * out.stride);
    }
  }
}

template <int kBits, bool kBook>
void multiply_panels(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                     int64_t end, const Output& out, void* scratch) {
  if (w.group_dim == 0) return multiply_columns<kBits, kBook>(w, block, begin, end, out, scratch);
  multiply_panel_order<kBits, kBook>(w, mode, block, begin, end, out, scratch);
}

template <int kBits>
void multiply_panel_bits(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                         int64_t end, const Output& out, void* scratch) {
  if (w.codebook != nullptr) {
    multiply_panels<kBits, true>(w, mode, block, begin, end, out, scratch);
  } else {
    multiply_panels<kBits, false>(w, mode, block, begin, end, out, scratch);
  }
}

void multiply_from_panels(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                          int64_t end, const Output& out, void* scratch) {
  switch (stored_bits(w)) {
    case 1:
      return multiply_panel_bits<1>(w, mode, block, begin, end, out, scratch);
    case 2:
      return multiply_panel_bits<2>(w, mode, block, begin, end, out, scratch);
    case 3:
      return multiply_panel_bits<3>(w, mode, block, begin, end, out, scratch);
    case 4:
      return multiply_panel_bits<4>(w, mode, block, begin, end, out, scratch);
    default:
      return multiply_panels<8, false>(w, mode, block, begin, end, out, scratch);
  }
}

int64_t bytes_of_panels(const PackedMatrix& w) {
  return is_wide(w, Mode::kInt8) || takes_columns(w) ? PanelLayout(w).bytes() : 0;
}

template <int kBits>
void multiply_wide_bits(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                        int64_t end, const Output& out, void* scratch) {
  if (w.codebook != nullptr) {
    multiply_wide<kBits, true>(w, mode, block, begin, end, out, scratch);
  } else {
    multiply_wide<kBits, false>(w, mode, block, begin, end, out, scratch);
  }
}

void wide_multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* scratch) {
  if (by_columns(w, mode)) return multiply_from_panels(w, mode, block, begin, end, out, scratch);
  if (!is_wide(w, mode)) return multiply(w, mode, block, begin, end, out, scratch);
  if (takes_signs(w, mode, block.rows)) {
    return multiply_signs(w, block, begin, end, out, scratch);
  }
  if (reads_panels(w)) return multiply_from_panels(w, mode, block, begin, end, out, scratch);
  static const bool has_vbmi = __builtin_cpu_supports("avx512vbmi") != 0;
  switch (stored_bits(w)) {
    case 1:
      return multiply_wide_bits<1>(w, mode, block, begin, end, out, scratch);
    case 2:
      return multiply_wide_bits<2>(w, mode, block, begin, end, out, scratch);
    case 3:
      if (has_vbmi)
        return multiply_wide_bits<kThreeByVbmi>(w, mode, block, begin, end, out, scratch);
      return multiply_wide_bits<3>(w, mode, block, begin, end, out, scratch);
    case 4:
      return multiply_wide_bits<4>(w, mode, block, begin, end, out, scratch);
    default:
      return multiply_wide<8, false>(w, mode, block, begin, end, out, scratch);
  }
}

constexpr MatmulKernels kKernels = {takes_parts,
                                    wide_prepared_bytes,
                                    wide_scratch_bytes,
                                    wide_prepare,
                                    wide_multiply,
                                    kWideTiles * kLanes,
                                    decode_span<Avx512Codes>,
                                    add_span<Avx512Codes>,
                                    add_levels_span<Avx512Codes>,
                                    add_values_run,
                                    sparse_prepare,
                                    sparse_multiply,
                                    complex_order,
                                    complex_multiply,
                                    kPanelRows,
                                    bytes_of_panels,
                                    write_panels,
                                    expand_row<Avx512Codes>,
                                    mode_of_float_row,
                                    wide_gradient_tile,
                                    add_gradient_tile,
                                    wide_gradient_order,
                                    gradient_words_bytes,
                                    gradient_words,
                                    add_gradient_words};

}  // namespace

const MatmulKernels* avx512_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
