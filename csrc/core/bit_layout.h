// The canonical layout of one packed row, the same on every device and in every saved file.
//
// A matrix of codes (rows, cols) with `levels` values per code is stored row by row; every row
// starts on a byte border. Codes of b = log2(levels) bits lie little-endian, one after the other:
//
//   4 bits (16 levels)   byte 0: [code 1 | code 0]  byte 1: [code 3 | code 2] ...   (high | low)
//   3 bits  (8 levels)   bit 3k is the lowest bit of code k; codes 2, 5, ... straddle two bytes
//   2 bits  (4 levels)   byte 0: [code 3 | code 2 | code 1 | code 0]
//   1 bit   (2 levels)   bit k of byte 0 is code k
//   8 bits (256 levels)  one byte a code
//   1.58    (3 levels)   five codes (trits) a byte: t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4, at most 242
//
// Unused bits (trits) of a row's last byte are zero when written and ignored when read. Bytes 243
// to 255 are no ternary code; they decode like their remainder modulo 3 per trit and never fault.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace pyrobust {

constexpr int kTernaryLevels = 3;
constexpr int kTritsPerByte = 5;

// Bits a code takes in the binary formats; 0 for ternary, -1 where `levels` is no format.
PYROBUST_HD int code_bits(int levels) {
  switch (levels) {
    case 2:
      return 1;
    case kTernaryLevels:
      return 0;
    case 4:
      return 2;
    case 8:
      return 3;
    case 16:
      return 4;
    case 256:
      return 8;
    default:
      return -1;
  }
}

PYROBUST_HD int64_t packed_row_bytes(int64_t cols, int levels) {
  if (levels == kTernaryLevels) return (cols + kTritsPerByte - 1) / kTritsPerByte;
  return (cols * code_bits(levels) + 7) / 8;
}

// The code in column `col`; reads the one or two bytes that hold it and no other.
PYROBUST_HD int get_code(const uint8_t* row, int64_t col, int levels) {
  if (levels == kTernaryLevels) {
    int value = row[col / kTritsPerByte];
    for (int64_t i = col % kTritsPerByte; i > 0; --i) value /= 3;
    return value % 3;
  }
  const int bits = code_bits(levels);
  const int64_t first = col * bits;
  const int shift = static_cast<int>(first % 8);
  int word = row[first / 8];
  if (shift + bits > 8) word |= row[first / 8 + 1] << 8;
  return (word >> shift) & (levels - 1);
}

// out[i] = code of column begin + i, for columns [begin, end).
PYROBUST_HD void decode_codes(const uint8_t* row, int64_t begin, int64_t end, int levels,
                              uint8_t* out) {
  for (int64_t col = begin; col < end; ++col) {
    out[col - begin] = static_cast<uint8_t>(get_code(row, col, levels));
  }
}

// Packs `cols` codes into packed_row_bytes(cols, levels) bytes; codes must be below `levels`.
PYROBUST_HD void encode_codes(const uint8_t* codes, int64_t cols, int levels, uint8_t* row) {
  const int64_t bytes = packed_row_bytes(cols, levels);
  if (levels == kTernaryLevels) {
    for (int64_t i = 0; i < bytes; ++i) {
      int value = 0;
      for (int t = kTritsPerByte - 1; t >= 0; --t) {
        const int64_t col = i * kTritsPerByte + t;
        value = 3 * value + (col < cols ? codes[col] : 0);
      }
      row[i] = static_cast<uint8_t>(value);
    }
    return;
  }
  const int bits = code_bits(levels);
  for (int64_t i = 0; i < bytes; ++i) row[i] = 0;
  for (int64_t col = 0; col < cols; ++col) {
    const int64_t first = col * bits;
    const int word = codes[col] << (first % 8);
    row[first / 8] = static_cast<uint8_t>(row[first / 8] | word);
    if (first % 8 + bits > 8) {
      row[first / 8 + 1] = static_cast<uint8_t>(row[first / 8 + 1] | (word >> 8));
    }
  }
}

}  // namespace pyrobust
