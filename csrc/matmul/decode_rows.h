// The exact weight, span by span, decoded to floats or to codes that add_plain.h and
// add_registers.h take further. Included by the file of each instruction set and compiled with its
// flags; the set supplies in `Codes`:
//
//   template <int kBits>
//   static int64_t expand_runs(const uint8_t* codes, int64_t count, uint8_t* out);
//
// writes codes of kBits <= 4 as bytes in plain order and returns for how many columns it did, a
// multiple of 8;
//
//   static void expand_ternary(const uint8_t* codes, int64_t count, uint8_t* out);
//
// does so for all `count` columns of five to a byte; and
//
//   static void look_up(const uint8_t* codebook, int levels, int64_t count, uint8_t* out);
//
// puts their entries in the place of codes. Both may write up to kSpanSlack bytes behind `count`,
// and so may read that many of `out`. The rest are plain loops that the compiler turns into
// vectors. Every operation rounds as written, so all sets give the same bits.
#pragma once

#include "matmul/kernels.h"
#include "matmul/weights.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kSpanSlack = 64;

// The five digits of every ternary byte, followed by zeros.
struct DigitTable {
  uint8_t digits[256][8];
  constexpr DigitTable() : digits() {
    for (int value = 0; value < 256; ++value) {
      int rest = value;
      for (int t = 0; t < kTritsPerByte; ++t, rest /= 3) {
        digits[value][t] = static_cast<uint8_t>(rest % 3);
      }
    }
  }
};
constexpr DigitTable kDigits;

// Codes of `count` columns from the byte `codes` on; writes up to 7 bytes of slack.
inline void expand_digits(const uint8_t* codes, int64_t count, uint8_t* out) {
  for (int64_t k = 0; k < count; k += kTritsPerByte) {
    __builtin_memcpy(out + k, kDigits.digits[*codes++], sizeof(kDigits.digits[0]));
  }
}

template <typename Codes>
inline int64_t expand_binary(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  switch (bits) {
    case 1:
      return Codes::template expand_runs<1>(codes, count, out);
    case 2:
      return Codes::template expand_runs<2>(codes, count, out);
    case 3:
      return Codes::template expand_runs<3>(codes, count, out);
    default:
      return Codes::template expand_runs<4>(codes, count, out);
  }
}

// The codes of columns [begin, end), or their entries of the codebook where there is one; `begin`
// is a multiple of kSpan and `out` has room for kSpan + kSpanSlack bytes.
template <typename Codes>
void expand(const uint8_t* row, int64_t begin, int64_t end, int levels, const uint8_t* codebook,
            uint8_t* out) {
  const int64_t count = end - begin;
  if (levels == kTernaryLevels) {
    Codes::expand_ternary(row + begin / kTritsPerByte, count, out);
  } else {
    const int bits = code_bits(levels);
    const int64_t first = begin * bits / 8;
    const int64_t done = expand_binary<Codes>(row + first, count, bits, out);
    decode_codes(row, begin + done, end, levels, out + done);
  }
  if (codebook != nullptr) Codes::look_up(codebook, levels, count, out);
}

// `count` floats scale * (multiplier * code - zero), where the multiplier is 1 << shift.
inline void decode_run(const uint8_t* __restrict code, int64_t count, int shift, int zero,
                       float scale, float* __restrict out) {
  for (int64_t k = 0; k < count; ++k) {
    out[k] = scale * static_cast<float>((static_cast<int>(code[k]) << shift) - zero);
  }
}

// The same with a scale and a zero a column.
inline void decode_columns(const PackedMatrix& w, const uint8_t* __restrict code, int64_t first,
                           int64_t count, int shift, float* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = scale_at(w, first + k);
  if (w.zero == nullptr) {
    const int zero = symmetric_zero(w);
    for (int64_t k = 0; k < count; ++k) {
      out[k] *= static_cast<float>((static_cast<int>(code[k]) << shift) - zero);
    }
    return;
  }
  const uint8_t* __restrict zero = w.zero + first;
  for (int64_t k = 0; k < count; ++k) {
    out[k] *= static_cast<float>((static_cast<int>(code[k]) << shift) - zero[k]);
  }
}

// Calls body(k, value) for the entries of the remainder in columns [begin, end) of row n, which
// ascend; k counts from `begin`.
template <typename Body>
inline void for_remainder(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                          const Body& body) {
  int64_t from, to;
  remainder_range(w, n, &from, &to);
  const int32_t* columns = w.remainder.columns;
  for (int64_t count = to - from; count > 0;) {  // the first column not below `begin`
    const int64_t half = count / 2;
    const bool below = columns[from + half] < begin;
    from = below ? from + half + 1 : from;
    count = below ? count - half - 1 : half;
  }
  for (int64_t i = from; i < to; ++i) {
    const int64_t k = columns[i];
    if (k >= end) return;
    if (k >= begin) body(k - begin, load_float(w.remainder.values, i, w.remainder.type));
  }
}

// The codes of columns [begin, end) of row n, one a byte, of a weight or of LevelCodes; no entries
// of a codebook. `expanded` has room for kSpan + kSpanSlack bytes.
template <typename Codes, typename Packed>
const uint8_t* span_codes(const Packed& w, int64_t n, int64_t begin, int64_t end,
                          uint8_t* expanded) {
  const uint8_t* row = w.codes + n * packed_row_bytes(w.cols, w.levels);
  if (w.levels == 256) return row + begin;
  expand<Codes>(row, begin, end, w.levels, nullptr, expanded);
  return expanded;
}

// All codes of row n, or their entries of the codebook, one a byte; writes up to kSpanSlack more.
template <typename Codes>
void expand_row(const PackedMatrix& w, int64_t n, uint8_t* out) {
  for (int64_t k = 0; k < w.cols; k += kSpan) {
    const int64_t end = w.cols - k < kSpan ? w.cols : k + kSpan;
    expand<Codes>(code_row(w, n), k, end, w.levels, w.codebook, out + k);
  }
}

// Calls body(group, k, count) for the groups of columns [begin, end) of row n: `group` is the place
// of the scale, k counts from `begin`.
template <typename Body>
inline void for_groups(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                       const Body& body) {
  int64_t group = scale_row(w, n) + begin / w.group_size;
  int64_t left = w.group_size - begin % w.group_size;
  for (int64_t k = begin; k < end; ++group) {  // without a division a group
    const int64_t count = end - k < left ? end - k : left;
    body(group, k - begin, count);
    k += count;
    left = w.group_size;
  }
}

// Whether the weights of a group take few values, which are worth a table.
inline bool has_group_tables(const PackedMatrix& w) {
  return w.group_dim == 1 && w.levels <= 16 && w.group_size >= 32 && w.row_scale == nullptr &&
         w.remainder.offsets == nullptr;
}

// What a code stands for before zero and scale.
struct GroupIntegers {
  alignas(64) int32_t of_code[16] = {};

  explicit GroupIntegers(const PackedMatrix& w) {
    const int multiplier = code_multiplier(w);
    for (int i = 0; i < w.levels; ++i) {
      of_code[i] = w.codebook != nullptr ? w.codebook[i] : multiplier * i;
    }
  }
};

template <typename Codes>
void decode_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float* out) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = code_row(w, n) + begin;
  if (w.levels != 256) {
    expand<Codes>(code_row(w, n), begin, end, w.levels, w.codebook, expanded);
    code = expanded;
  }
  const int shift = code_multiplier(w) - 1;
  if (w.group_dim == 0) {
    decode_columns(w, code, scale_row(w, n) + begin, end - begin, shift, out);
  } else {
    for_groups(w, n, begin, end, [&](int64_t group, int64_t k, int64_t count) {
      decode_run(code + k, count, shift, zero_at(w, group), scale_at(w, group), out + k);
    });
  }
  if (w.row_scale != nullptr) {
    const float scale = w.row_scale[n];
    for (int64_t k = 0; k < end - begin; ++k) out[k] *= scale;
  }
  if (w.remainder.offsets != nullptr) {
    for_remainder(w, n, begin, end, [&](int64_t k, float value) { out[k] += value; });
  }
}

}  // namespace
}  // namespace pyrobust::matmul
