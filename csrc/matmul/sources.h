// Included by add_registers.h alone: the types of a target, and the values that are added to it,
// from codes or floats in memory to registers.
#pragma once

#include "matmul/registers.h"

namespace pyrobust::matmul {
namespace {

// What a target holds. round() leaves a float that the type holds. round_in_range() does so too,
// for products with a scale in (kLeastScale, kGreatestScale) of integers below 256: where C is the
// value's power of two times kLift, value + C has no bits below the last one wanted.
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

template <typename Target>
inline Floats round_in_range(Floats value) {
  const Floats power = exponent_of(value), lift = broadcast(Target::kLift);
  return fused_negative(power, lift, fused(power, lift, value));
}

// Values come out of arithmetic: a NaN is quiet, its low bits 0 or the rest of an operand's.
struct BFloat16Target {
  using Type = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr bool kAlternate = true;
  static constexpr float kLift = 0x1p16f;
  static constexpr float kLeastScale = 0x1p-60f, kGreatestScale = 0x1p60f;
  static Pair widen(Ints halves) { return widen_bfloat16(halves); }
  static Pair widen(const uint16_t* from) { return widen(load(from)); }
  static void narrow(uint16_t* to, Pair value) { store_bfloat16(to, value); }
  static Floats round(Floats value) { return clear_lower(rounded_to_upper(value)); }
  // Whether products with rounded weights are exact.
  static bool in_range(float alpha) {
    return __builtin_fabsf(alpha) > 0x1p-40f && __builtin_fabsf(alpha) < 0x1p40f;
  }
};

struct Float16Target {
  using Type = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr bool kAlternate = false;
  static constexpr float kLift = 0x1p13f;
  static constexpr float kLeastScale = 0x1p-14f, kGreatestScale = 0x1p7f;
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
  static bool in_range(float) { return true; }
};

// alpha times the weights of integers, rounded to the target's type before.
template <typename Target>
struct Scaled {
  int zero;
  float scale, alpha;

  Floats operator()(Floats difference) const {
    return product(broadcast(alpha), Target::round(product(broadcast(scale), difference)));
  }
};

// Sources: `at` gives the kPairs pairs of values of the elements from `from` on, of kBits bits
// each; `add` adds one to what the target held. This one computes them from bytes.
struct PlainSum {
  static constexpr int kPairs = 1;
  static Pair add(Pair sum, Pair value) {
    return {matmul::add(sum.first, value.first), matmul::add(sum.second, value.second)};
  }
};

template <typename Target>
struct FromBytes : PlainSum {
  static constexpr int kBits = 8;
  Scaled<Target> scaled;

  explicit FromBytes(const Scaled<Target>& values) : scaled(values) {}

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Pair integers = differences<kAlternate>(code, scaled.zero);
    return {scaled(integers.first), scaled(integers.second)};
  }
};

// The same where the scale is in range: values are without alpha, whose product with them is exact.
template <typename Target>
struct FromBytesInRange {
  static constexpr int kBits = 8, kPairs = 1;
  Scaled<Target> scaled;

  static bool takes(const Scaled<Target>& values) {
    return values.scale > Target::kLeastScale && values.scale < Target::kGreatestScale &&
           Target::in_range(values.alpha);
  }

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Pair integers = differences<kAlternate>(code, scaled.zero);
    const Floats scale = broadcast(scaled.scale);
    return {round_in_range<Target>(product(scale, integers.first)),
            round_in_range<Target>(product(scale, integers.second))};
  }

  Pair add(Pair sum, Pair value) const {
    const Floats factor = broadcast(scaled.alpha);
    return {fused(factor, value.first, sum.first), fused(factor, value.second, sum.second)};
  }
};

template <typename Target>
struct FromFloats : PlainSum {
  static constexpr int kBits = 32;
  float alpha;

  explicit FromFloats(float factor) : alpha(factor) {}

  template <bool kAlternate>
  Pair at(const uint8_t* from) const {
    const auto* value = reinterpret_cast<const float*>(from);
    Pair pair{load(value), load(value + kFloats)};
    if constexpr (kAlternate) pair = even_and_odd(pair);
    const Floats factor = broadcast(alpha);
    return {product(factor, Target::round(pair.first)),
            product(factor, Target::round(pair.second))};
  }
};

// Values in the target's type.
template <typename Target>
struct FromSameType : PlainSum {
  static constexpr int kBits = 8 * sizeof(typename Target::Type);
  float alpha;

  explicit FromSameType(float factor) : alpha(factor) {}

  template <bool>
  Pair at(const uint8_t* from) const {
    const Pair value = Target::widen(reinterpret_cast<const typename Target::Type*>(from));
    const Floats factor = broadcast(alpha);
    return {product(factor, value.first), product(factor, value.second)};
  }
};

// A quarter of the permutations that a table of floats takes; the product is exact.
template <typename Target, typename Table>
struct FromHalves : PlainSum {
  static constexpr int kBits = 8;
  Table table;
  float alpha;

  FromHalves(const Table& values, float factor) : table(values), alpha(factor) {}

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Pair pair = Target::widen(table.at(code));
    const Floats factor = broadcast(alpha);
    return {product(factor, pair.first), product(factor, pair.second)};
  }
};

}  // namespace
}  // namespace pyrobust::matmul
