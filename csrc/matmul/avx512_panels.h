// Included by avx512.cpp alone: the product with a weight in panel order (panels.h), for
// activations in 8 bits or in two to four parts of 8 bits. A lane is a row of W, so that no lanes
// are added up; x is broadcast four columns at a time against 32 rows of W. One kernel serves any
// number of rows of x, eight rows of bytes at a time: codes are unpacked in registers each time,
// which 16 products an unpacked pair of registers hide.
//
// The sums of a group and the order of groups are those of avx512_int8.h, hence the same bits.
#pragma once

#include "matmul/avx512_panel_integer.h"
#include "matmul/avx512_panel_parts.h"

namespace pyrobust::matmul {
namespace {

// Columns of a panel that all rows of x meet before the next: 16 KiB at 8 bits stay in L1.
constexpr int64_t kPanelColumns = 512;

inline __m512d eight_totals(const double* total) { return _mm512_load_pd(total); }
inline __m512d eight_totals(const int32_t* total) { return _mm512_cvtepi32_pd(eight_sums(total)); }

// Whole panels of 32 results a row of x, as store_16() of each half, with what a row of W brings in
// registers.
struct PanelResults {
  __m512d row_scale[4], bias[4];

  PanelResults(const Output& out, int64_t first) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t n = first + 8 * i;
      row_scale[i] = out.row_scale == nullptr ? _mm512_set1_pd(1.0)
                                              : _mm512_cvtps_pd(_mm256_loadu_ps(out.row_scale + n));
      bias[i] = out.bias == nullptr ? _mm512_setzero_pd()
                                    : _mm512_cvtps_pd(_mm256_loadu_ps(out.bias + n));
    }
  }

  template <typename Total>
  __m512 half(const Total* total, double step, int t) const {
    __m256 part[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512d sum = _mm512_mul_pd(eight_totals(total + 8 * i), row_scale[2 * t + i]);
      part[i] =
          _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(sum, _mm512_set1_pd(step)), bias[2 * t + i]));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
  }
};

template <FloatType kType, typename Total>
void store_whole_panel(const Output& out, const PanelRows& x, const double* step, int64_t first,
                       const Total* total) {
  const PanelResults results(out, first);
  int64_t at = out.row * out.stride + first - out.first;
  for (int64_t m = 0; m < x.rows; ++m, total += kPanelRows, at += out.stride) {
    const double factor = x.parts > 1 ? 1.0 : step[m];
    store_floats(out.data, kType, at, results.half(total, factor, 0));
    store_floats(out.data, kType, at + kLanes, results.half(total + kLanes, factor, 1));
  }
}

// Results of rows [begin, end) of W, within the panel from row `first` on, from their totals.
template <typename Total>
void store_panel_rows(const Output& out, const PanelRows& x, const double* step, int64_t first,
                      int64_t begin, int64_t end, const Total* total) {
  if (end - begin == kPanelRows && out.remainder == nullptr) {
    if (out.type == FloatType::kFloat32) {
      return store_whole_panel<FloatType::kFloat32>(out, x, step, first, total);
    }
    if (out.type == FloatType::kBFloat16) {
      return store_whole_panel<FloatType::kBFloat16>(out, x, step, first, total);
    }
    return store_whole_panel<FloatType::kFloat16>(out, x, step, first, total);
  }
  for (int64_t m = 0; m < x.rows; ++m, total += kPanelRows) {
    const double factor = x.parts > 1 ? 1.0 : step[m];
    for (int64_t n = begin; n < end; ++n) store_result(out, m, n, total[n - first], factor);
  }
}

// Totals; the last tile has up to two rows more than x.
int64_t double_totals_bytes(int64_t rows) {
  return round_up(rows, kTileRows) * kPanelRows * static_cast<int64_t>(sizeof(double));
}

int64_t panel_scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (takes_integer_totals(w, mode)) return IntegerScratch(nullptr, w, rows).used;
  return double_totals_bytes(rows);
}

// With totals in int32.
template <int kBits, bool kBook>
void multiply_integer_order(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                            const Output& out, void* scratch) {
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, Mode::kInt8);
  const IntegerScratch s(scratch, w, block.rows);
  for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
    const PanelTask task{&w, &layout, w.panels + p * layout.panel_bytes, &x, nullptr, false, 0, 0,
                         0,  nullptr};
    multiply_integer_panel<kBits, kBook>(task, s);
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x, block.step, first, first > begin ? first : begin,
                     stop < end ? stop : end, s.total);
  }
}

template <int kBits, bool kBook>
void multiply_panel_order(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin,
                          int64_t end, const Output& out, void* scratch) {
  if (takes_integer_totals(w, mode)) {
    return multiply_integer_order<kBits, kBook>(w, block, begin, end, out, scratch);
  }
  constexpr int kShift = second_half_shift<kBits, kBook>();
  const PanelLayout layout(w);
  const PanelRows x(const_cast<void*>(block.data), w, block.rows, mode);
  PanelPending pending;
  const bool narrow = is_narrow(w, kShift);
  auto* total = static_cast<double*>(scratch);
  const int64_t some = layout.group_columns > 0 ? kPanelColumns / layout.group_columns : 1;
  const int64_t chunk = x.rows <= x.x_rows() ? layout.groups : some > 0 ? some : 1;
  for (int64_t p = begin / kPanelRows; p * kPanelRows < end; ++p) {
    __builtin_memset(total, 0, static_cast<size_t>(double_totals_bytes(x.rows)));
    PanelTask task{&w, &layout, w.panels + p * layout.panel_bytes, &x, &pending, narrow, 0, 0,
                   0,  nullptr};
    for (; task.from < layout.groups; task.from = task.to) {
      task.to = layout.groups - task.from < chunk ? layout.groups : task.from + chunk;
      for (task.m = 0; task.m < x.rows; task.m += x.x_rows()) {
        task.total = total + task.m * kPanelRows;
        if (x.parts > 1) {
          panel_parts_of<kBits, kBook>(x.width(task.m), task);
        } else {
          panel_tile_of<kBits, kBook>(x.width(task.m), task);
        }
      }
    }
    finish_pending<kShift>(task);
    const int64_t first = p * kPanelRows, stop = first + kPanelRows;
    store_panel_rows(out, x, block.step, first, first > begin ? first : begin,
                     stop < end ? stop : end, total);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
