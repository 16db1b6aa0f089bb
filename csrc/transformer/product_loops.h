// Centres, cores and sums of entries, and ends of sums. Included by the file of each instruction
// set.
#pragma once

#include <cmath>

#include "transformer/kernels.h"
#include "transformer/outward.h"
#include "transformer/product.h"

namespace pyrobust {
namespace transformer {
namespace {

struct Entry {
  double middle, core, size;
};

// The radius covers the rounding of the middle.
inline Entry entry_of(double low, double high) {
  const double middle = (low + high) * 0.5;
  const double largest = larger(std::fabs(low), std::fabs(high));
  const double radius = (high - low) * 0.5 + (low == high ? 0.0 : largest * kStep);
  const double magnitude = std::fabs(middle);
  return {middle, std::copysign(smaller(magnitude, radius), middle), magnitude + radius};
}

// Columns of B, `count` of eight; the others are zero.
void pack_columns(const PackEntries& work, double* to) {
  for (int64_t k = 0; k < work.terms; ++k, to += kColumnTerm) {
    for (int64_t j = 0; j < work.count; ++j) {
      const int64_t at = k * work.term_stride + j * work.entry_stride;
      const Entry entry = entry_of(work.lower[at], work.upper[at]);
      to[j] = entry.middle;
      to[kBlockColumns + j] = entry.core;
      to[2 * kBlockColumns + j] = entry.size;
    }
  }
}

// Rows of A likewise; gives the largest size of each.
void pack_rows(const PackEntries& work, double* to, double* largest) {
  for (int64_t j = 0; j < kBlockRows; ++j) largest[j] = 0.0;
  for (int64_t k = 0; k < work.terms; ++k, to += kRowTerm) {
    for (int64_t j = 0; j < work.count; ++j) {
      const int64_t at = k * work.term_stride + j * work.entry_stride;
      const Entry entry = entry_of(work.lower[at], work.upper[at]);
      to[j] = entry.middle;
      to[kBlockRows + j] = entry.core;
      to[2 * kBlockRows + j] = entry.size;
      to[3 * kBlockRows + j] = std::fabs(entry.middle);
      to[4 * kBlockRows + j] = std::fabs(entry.core);
      largest[j] = larger(largest[j], entry.size);
    }
  }
}

// Ends of one row of a block. Columns that are not wanted are zero.
bool product_ends(const ProductEnds& work) {
  const double* middle = work.sums;
  const double* same = work.sums + kBlockColumns;
  const double* total = work.sums + 2 * kBlockColumns;
  float lower[kBlockColumns], upper[kBlockColumns];
  int32_t unbounded = 0;
  for (int64_t j = 0; j < kBlockColumns; ++j) {
    const double reach = total[j] - same[j], error = work.gain * total[j] + work.lost;
    const double low = middle[j] - reach, high = -(middle[j] + reach);
    const double of_low = error + kStep * (std::fabs(low) + error);
    const double of_high = error + kStep * (std::fabs(high) + error);
    lower[j] = flushed(float_down(low - of_low), work.least);
    upper[j] = -flushed(float_down(high - of_high), work.least);
    unbounded |= (total[j] < work.limit ? 0 : 1) | odd(lower[j]) | odd(upper[j]);
  }
  for (int64_t j = 0; j < work.count; ++j) {
    work.out_lower[j] = lower[j];
    work.out_upper[j] = upper[j];
  }
  return unbounded == 0;
}

}  // namespace
}  // namespace transformer
}  // namespace pyrobust
