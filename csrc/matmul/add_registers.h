// Sums with packed weights from codes to rounded results within registers, for AVX2 and, where it
// is compiled with those flags, AVX-512. Equal bits to add_plain.h.
//
// A group of at most 16 levels is a table of floats: scaled, rounded to the target's type and
// multiplied with alpha once a group, then permuted into place. 256 levels are computed weight by
// weight. Two registers of floats are worked on at a time. For bfloat16 they hold the even and the
// odd elements, each in the upper half of 32 bits, which then takes no permutation to part and
// join; for the other types one half of the elements each.
//
// The set supplies in `Codes`: sources Table<kWide> of 16 floats (8 where not kWide) and Table256,
// made from `const float*`; and where kHalfTable256 is set HalfTable256, made from a LevelTable,
// whose at() gives the entries of 2 kFloats codes in 16 bits each. Included by avx2_rows.h alone.
#pragma once

#include "core/float_types.h"
#include "matmul/decode_rows.h"
#include "matmul/registers.h"

namespace pyrobust::matmul {
namespace {

// What a target holds. round() leaves a float that the type holds.
struct Float32Target {
  using Type = float;
  static constexpr bool kHalf = false;
  static constexpr bool kAlternate = false;
  static Pair widen(const float* from) { return {load(from), load(from + kFloats)}; }
  static void narrow(float* to, Pair value) {
    store(to, value.first);
    store(to + kFloats, value.second);
  }
  static Floats round(Floats value) { return value; }
};

// Values come out of arithmetic: a NaN is quiet, its low bits 0 or the rest of an operand's.
struct BFloat16Target {
  using Type = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr bool kAlternate = true;
  static Pair widen(Ints halves) { return widen_bfloat16(halves); }
  static Pair widen(const uint16_t* from) { return widen(load(from)); }
  static void narrow(uint16_t* to, Pair value) {
    store_upper(to, rounded_to_upper(value.first), rounded_to_upper(value.second));
  }
  static Floats round(Floats value) { return clear_lower(rounded_to_upper(value)); }
};

struct Float16Target {
  using Type = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr bool kAlternate = false;
  static Pair widen(Ints halves) { return widen_float16(halves); }
  static Pair widen(const uint16_t* from) {
    return {widen_float16(from), widen_float16(from + kFloats)};
  }
  // The instruction keeps a NaN's payload; core/float_types.h has one NaN of each sign.
  static void narrow(uint16_t* to, Pair value) {
    store(to, to_float16(value.first));
    store(to + kFloats, to_float16(value.second));
    if (!has_nan(value.first, value.second)) return;
    for (int64_t k = 0; k < 2 * kFloats; ++k) {
      if ((to[k] & 0x7fff) > 0x7c00) to[k] = static_cast<uint16_t>((to[k] & 0x8000) | 0x7e00);
    }
  }
  static Floats round(Floats value) { return from_float16(to_float16(value)); }
};

// alpha times the weights of integers, rounded to the target's type before.
template <typename Target>
struct Scaled {
  int zero;
  float scale, alpha;

  Floats operator()(Ints integers) const {
    const Floats weight = product(broadcast(scale), difference(integers, broadcast(zero)));
    return product(broadcast(alpha), Target::round(weight));
  }
};

// Sources of values: `at` reads 2 kFloats elements. This one computes them from bytes.
template <typename Target>
struct FromBytes {
  Scaled<Target> scaled;

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Indices index = load_indices<kAlternate>(code);
    return {scaled(index.first), scaled(index.second)};
  }
};

template <typename Target>
struct FromFloats {
  float alpha;

  template <bool kAlternate>
  Pair at(const float* value) const {
    Pair pair{load(value), load(value + kFloats)};
    if constexpr (kAlternate) pair = even_and_odd(pair);
    const Floats factor = broadcast(alpha);
    return {product(factor, Target::round(pair.first)),
            product(factor, Target::round(pair.second))};
  }
};

// A quarter of the permutations that a table of floats takes; the product is exact.
template <typename Target, typename Table>
struct FromHalves {
  Table table;
  float alpha;

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Pair pair = Target::widen(table.at(code));
    const Floats factor = broadcast(alpha);
    return {product(factor, pair.first), product(factor, pair.second)};
  }
};

template <typename Target, typename Element, typename Source>
inline void add_two_registers(const Element* from, const Source& source,
                              typename Target::Type* target) {
  const Pair value = source.template at<Target::kAlternate>(from), sum = Target::widen(target);
  Target::narrow(target, {add(sum.first, value.first), add(sum.second, value.second)});
}

// target[k] += value of from[k]. The last ones go through copies, as nothing may be touched behind
// `count`.
template <typename Target, typename Element, typename Source>
inline void add_run(const Element* from, int64_t count, const Source& source,
                    typename Target::Type* target) {
  constexpr int64_t kStep = 2 * kFloats;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    add_two_registers<Target>(from + k, source, target + k);
  }
  if (k == count) return;
  const auto rest = static_cast<size_t>(count - k);
  Element last[kStep] = {};
  typename Target::Type sums[kStep] = {};
  __builtin_memcpy(last, from + k, rest * sizeof(Element));
  __builtin_memcpy(sums, target + k, rest * sizeof(sums[0]));
  add_two_registers<Target>(last, source, sums);
  __builtin_memcpy(target + k, sums, rest * sizeof(sums[0]));
}

// A software conversion would take as long as half of a group's sums.
inline float scale_of_group(const PackedMatrix& w, int64_t group) {
  if (w.scale_type == FloatType::kFloat16) {
    return _cvtsh_ss(static_cast<const uint16_t*>(w.scale)[group]);
  }
  return load_float(w.scale, group, w.scale_type);
}

template <typename Codes, typename Target, bool kWide>
void add_group_tables(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
                      typename Target::Type* target) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = span_codes<Codes>(w, n, begin, end, expanded);
  const GroupIntegers integers(w);
  for_groups(w, n, begin, end, [&](int64_t group, int64_t k, int64_t count) {
    const Scaled<Target> scaled{zero_at(w, group), scale_of_group(w, group), alpha};
    alignas(64) float table[16];
    for (int64_t i = 0; i < (kWide ? 16 : 8); i += kFloats) {
      store(table + i, scaled(load(integers.of_code + i)));
    }
    add_run<Target>(code + k, count, typename Codes::template Table<kWide>(table), target + k);
  });
}

template <typename Target>
void add_bytes(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
               typename Target::Type* target) {
  const uint8_t* code = code_row(w, n) + begin;
  for_groups(w, n, begin, end, [&](int64_t group, int64_t k, int64_t count) {
    const FromBytes<Target> source{{zero_at(w, group), scale_of_group(w, group), alpha}};
    add_run<Target>(code + k, count, source, target + k);
  });
}

template <typename Codes, typename Target>
void add_span_to(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
                 typename Target::Type* target) {
  if (has_group_tables(w)) {
    return w.levels == 16 ? add_group_tables<Codes, Target, true>(w, n, begin, end, alpha, target)
                          : add_group_tables<Codes, Target, false>(w, n, begin, end, alpha, target);
  }
  const bool plain = w.row_scale == nullptr && w.remainder.offsets == nullptr;
  if (plain && w.levels == 256 && w.group_dim == 1) {
    return add_bytes<Target>(w, n, begin, end, alpha, target);
  }
  alignas(64) float value[kSpan];
  decode_span<Codes>(w, n, begin, end, value);
  add_run<Target>(value, end - begin, FromFloats<Target>{alpha}, target);
}

template <typename Codes>
void add_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target) {
  if (type == FloatType::kFloat16) {
    add_span_to<Codes, Float16Target>(w, n, begin, end, alpha, static_cast<uint16_t*>(target));
  } else if (type == FloatType::kBFloat16) {
    add_span_to<Codes, BFloat16Target>(w, n, begin, end, alpha, static_cast<uint16_t*>(target));
  } else {
    add_span_to<Codes, Float32Target>(w, n, begin, end, alpha, static_cast<float*>(target));
  }
}

template <typename Codes, typename Target>
void add_table(const uint8_t* code, int64_t count, int levels, const LevelTable& table,
               void* target) {
  auto* out = static_cast<typename Target::Type*>(target);
  if (levels == 16) {
    add_run<Target>(code, count, typename Codes::template Table<true>(table.scaled), out);
  } else if (levels != 256) {
    add_run<Target>(code, count, typename Codes::template Table<false>(table.scaled), out);
  } else if constexpr (Target::kHalf && Codes::kHalfTable256) {
    using Halves = typename Codes::HalfTable256;
    add_run<Target>(code, count, FromHalves<Target, Halves>{Halves(table), table.alpha}, out);
  } else {
    add_run<Target>(code, count, typename Codes::Table256(table.scaled), out);
  }
}

// target[k] += table.scaled[code of column begin + k].
template <typename Codes>
void add_levels_span(const LevelCodes& codes, const LevelTable& table, int64_t n, int64_t begin,
                     int64_t end, FloatType type, void* target) {
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = span_codes<Codes>(codes, n, begin, end, expanded);
  const int64_t count = end - begin;
  if (type == FloatType::kFloat16) {
    add_table<Codes, Float16Target>(code, count, codes.levels, table, target);
  } else if (type == FloatType::kBFloat16) {
    add_table<Codes, BFloat16Target>(code, count, codes.levels, table, target);
  } else {
    add_table<Codes, Float32Target>(code, count, codes.levels, table, target);
  }
}

}  // namespace
}  // namespace pyrobust::matmul
