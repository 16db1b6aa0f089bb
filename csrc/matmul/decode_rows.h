// The exact weight, span by span: decoded to floats, or added to a tensor without ever lying in
// memory as a whole. Included by the file of each instruction set and compiled with its flags; the
// set supplies in `Codes`:
//
//   template <int kBits>
//   static int64_t expand_runs(const uint8_t* codes, int64_t bytes, int64_t count, uint8_t* out);
//
// writes codes of kBits <= 4 as bytes in plain order and returns for how many columns it did, a
// multiple of 8; `bytes` of `codes` may be read. And
//
//   static void look_up(const uint8_t* codebook, int levels, int64_t count, uint8_t* out);
//
// puts their entries in the place of codes. Both may write up to kSpanSlack bytes behind `count`,
// and so may read that many of `out`. The rest are plain loops that the compiler turns into
// vectors. Every operation rounds as written, so all sets give the same bits.
#pragma once

#include "matmul/add_halves.h"
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
inline void expand_ternary(const uint8_t* codes, int64_t count, uint8_t* out) {
  for (int64_t k = 0; k < count; k += kTritsPerByte) {
    __builtin_memcpy(out + k, kDigits.digits[*codes++], sizeof(kDigits.digits[0]));
  }
}

template <typename Codes>
inline int64_t expand_binary(const uint8_t* codes, int64_t bytes, int64_t count, int bits,
                             uint8_t* out) {
  switch (bits) {
    case 1:
      return Codes::template expand_runs<1>(codes, bytes, count, out);
    case 2:
      return Codes::template expand_runs<2>(codes, bytes, count, out);
    case 3:
      return Codes::template expand_runs<3>(codes, bytes, count, out);
    default:
      return Codes::template expand_runs<4>(codes, bytes, count, out);
  }
}

// The codes of columns [begin, end), or their entries of the codebook where there is one; `begin`
// is a multiple of kSpan and `out` has room for kSpan + kSpanSlack bytes.
template <typename Codes>
void expand(const uint8_t* row, int64_t row_bytes, int64_t begin, int64_t end, int levels,
            const uint8_t* codebook, uint8_t* out) {
  const int64_t count = end - begin;
  if (levels == kTernaryLevels) {
    expand_ternary(row + begin / kTritsPerByte, count, out);
  } else {
    const int bits = code_bits(levels);
    const int64_t first = begin * bits / 8;
    const int64_t done = expand_binary<Codes>(row + first, row_bytes - first, count, bits, out);
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

// Entries of the remainder in columns [begin, end) of row n; columns ascend.
inline void add_remainder(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                          float* out) {
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
    if (k >= begin) out[k - begin] += load_float(w.remainder.values, i, w.remainder.type);
  }
}

template <typename Codes>
void decode_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float* out) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = code_row(w, n) + begin;
  if (w.levels != 256) {
    const int64_t bytes = packed_row_bytes(w.cols, w.levels);
    expand<Codes>(code_row(w, n), bytes, begin, end, w.levels, w.codebook, expanded);
    code = expanded;
  }
  const int shift = code_multiplier(w) - 1;
  const int64_t row = scale_row(w, n);
  if (w.group_dim == 0) {
    decode_columns(w, code, row + begin, end - begin, shift, out);
  } else {
    for (int64_t k = begin; k < end;) {
      const int64_t group = k / w.group_size;
      const int64_t left = w.group_size - k % w.group_size;
      const int64_t count = end - k < left ? end - k : left;
      decode_run(code + k - begin, count, shift, zero_at(w, row + group), scale_at(w, row + group),
                 out + k - begin);
      k += count;
    }
  }
  if (w.row_scale != nullptr) {
    const float scale = w.row_scale[n];
    for (int64_t k = 0; k < end - begin; ++k) out[k] *= scale;
  }
  if (w.remainder.offsets != nullptr) add_remainder(w, n, begin, end, out);
}

template <typename Codes>
void add_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target) {
  alignas(64) float value[kSpan];
  decode_span<Codes>(w, n, begin, end, value);
  if (type == FloatType::kFloat16) {
    add_rounded<Float16>(value, end - begin, alpha, static_cast<uint16_t*>(target));
  } else if (type == FloatType::kBFloat16) {
    add_rounded<BFloat16>(value, end - begin, alpha, static_cast<uint16_t*>(target));
  } else {
    auto* out = static_cast<float*>(target);
    for (int64_t k = 0; k < end - begin; ++k) out[k] += alpha * value[k];
  }
}

// target[k] += table[code[k]] in floats on the stack.
template <typename Codes, typename Half>
void add_table_to_halves(const uint8_t* code, int64_t count, int levels, const float* table,
                         uint16_t* target) {
  alignas(64) float sum[kSpan];
  widen_span<Half>(target, count, sum);
  Codes::add_table(code, count, levels, table, sum);
  narrow_span<Half>(sum, count, target);
}

// target[k] += table[code of column begin + k].
template <typename Codes>
void add_levels_span(const LevelCodes& codes, const float* table, int64_t n, int64_t begin,
                     int64_t end, FloatType type, void* target) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const int64_t bytes = packed_row_bytes(codes.cols, codes.levels);
  const uint8_t* row = codes.codes + n * bytes;
  const uint8_t* code = row + begin;
  if (codes.levels != 256) {
    expand<Codes>(row, bytes, begin, end, codes.levels, nullptr, expanded);
    code = expanded;
  }
  const int64_t count = end - begin;
  if (type == FloatType::kFloat16) {
    auto* halves = static_cast<uint16_t*>(target);
    add_table_to_halves<Codes, Float16>(code, count, codes.levels, table, halves);
  } else if (type == FloatType::kBFloat16) {
    auto* halves = static_cast<uint16_t*>(target);
    add_table_to_halves<Codes, BFloat16>(code, count, codes.levels, table, halves);
  } else {
    Codes::add_table(code, count, codes.levels, table, static_cast<float*>(target));
  }
}

}  // namespace
}  // namespace pyrobust::matmul
