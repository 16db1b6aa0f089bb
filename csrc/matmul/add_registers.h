// Sums with packed weights from codes to rounded results within registers, for AVX2 and, where it
// is compiled with those flags, AVX-512. Equal bits to add_plain.h.
//
// A group of at most 16 levels is a table of floats: scaled, rounded to the target's type and
// multiplied with alpha once a group, then permuted into place. 256 levels are computed weight by
// weight. Two registers of floats are worked on at a time, a pair. For bfloat16 they hold the even
// and the odd elements, each in the upper half of 32 bits, which then takes no permutation to part
// and join; for the other types one half of the elements each.
//
// The set supplies in `Codes`: sources (sources.h) Table<kWide> of 16 floats (8 where not kWide)
// and Table256, made from `const float*`; where kHalfTable256 is set HalfTable256, made from a
// LevelTable, whose at() gives the entries of 2 kFloats codes in 16 bits each; and where
// kReadsPacked is set PackedTable<kBits> of 2^kBits floats, a source that reads codes as they lie
// in memory. Included by avx2_rows.h alone.
#pragma once

#include "core/float_types.h"
#include "matmul/decode_rows.h"
#include "matmul/sources.h"
#include "runtime/stream_copy.h"

namespace pyrobust::matmul {
namespace {

// A type as a value.
template <typename T>
struct TypeOf {
  using Type = T;
};

// Columns [begin, end) of row n.
struct Columns {
  int64_t n, begin, end;
  int64_t count() const { return end - begin; }
};

// Place k of what may be absent.
template <typename Type>
inline Type* at_place(Type* saved, int64_t k) {
  return saved == nullptr ? nullptr : saved + k;
}

inline const Pair& nth(const Pair& only, int) { return only; }
inline const Pair& nth(const Pairs& both, int i) { return both.pair[i]; }

template <bool kSaves, typename Target, typename Source>
inline void add_registers(const uint8_t* from, const Source& source, typename Target::Type* target,
                          typename Target::Type* saved) {
  const auto values = source.template at<Target::kAlternate>(from);
#pragma GCC unroll 2
  for (int i = 0; i < Source::kPairs; ++i, target += 2 * kFloats) {
    if constexpr (kSaves) {
      constexpr auto kRegister = static_cast<int64_t>(sizeof(Floats) / sizeof(*target));
      for (int64_t k = 0; k < 2 * kFloats; k += kRegister) stream(saved + k, target + k);
      saved += 2 * kFloats;
    }
    Target::narrow(target, source.add(Target::widen(target), nth(values, i)));
  }
}

// Whole steps of add_run(); returns for how many elements. Whether to save is asked outside of the
// loop, which has no instruction to spare.
template <bool kSaves, typename Target, typename Source>
inline int64_t add_steps(const uint8_t* from, int64_t count, const Source& source,
                         typename Target::Type* target, typename Target::Type* saved) {
  constexpr int64_t kStep = Source::kPairs * 2 * kFloats;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    add_registers<kSaves, Target>(from + k * Source::kBits / 8, source, target + k,
                                  kSaves ? saved + k : nullptr);
  }
  return k;
}

// The elements from k on, less than a step, go through copies, as nothing may be touched behind
// `count`. Apart, so that the registers of the loop are not spilled for it.
template <typename Target, typename Source>
__attribute__((noinline)) void add_rest(const uint8_t* from, int64_t k, int64_t count,
                                        const Source& source, typename Target::Type* target,
                                        typename Target::Type* saved) {
  constexpr int64_t kStep = Source::kPairs * 2 * kFloats;
  const auto rest = static_cast<size_t>(count - k);
  alignas(64) uint8_t last[kStep * Source::kBits / 8] = {};
  typename Target::Type sums[kStep] = {};
  __builtin_memcpy(last, from + k * Source::kBits / 8, (rest * Source::kBits + 7) / 8);
  __builtin_memcpy(sums, target + k, rest * sizeof(sums[0]));
  if (saved != nullptr) __builtin_memcpy(saved + k, sums, rest * sizeof(sums[0]));
  add_registers<false, Target>(last, source, sums, nullptr);
  __builtin_memcpy(target + k, sums, rest * sizeof(sums[0]));
}

// target[k] += value of element k, after what it held was saved, unless that is null.
template <typename Target, typename Source>
inline void add_run(const uint8_t* from, int64_t count, const Source& source,
                    typename Target::Type* target, typename Target::Type* saved) {
  const int64_t k = saved == nullptr ? add_steps<false, Target>(from, count, source, target, saved)
                                     : add_steps<true, Target>(from, count, source, target, saved);
  if (k != count) add_rest<Target>(from, k, count, source, target, saved);
}

// Where the loop of sums saves what `count` elements held, runs of `run` elements at a time: at
// `saved` if every run begins on a line, else nowhere, after a copy.
template <typename Type>
inline Type* saved_by_runs(const Type* target, int64_t count, int64_t run, Type* saved) {
  constexpr int64_t kLine = 64;
  constexpr auto kSize = static_cast<int64_t>(sizeof(Type));
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(saved) % kLine);
  if (saved == nullptr || (past_line == 0 && run * kSize % kLine == 0)) return saved;
  stream_copy(saved, target, count * kSize);
  return nullptr;
}

// A software conversion would take as long as half of a group's sums.
inline float scale_of_group(const PackedMatrix& w, int64_t group) {
  if (w.scale_type == FloatType::kFloat16) {
    return _cvtsh_ss(static_cast<const uint16_t*>(w.scale)[group]);
  }
  return load_float(w.scale, group, w.scale_type);
}

// Scales and zeros of the groups in a span, which have at least 32 columns each; a loop over each.
struct SpanGroups {
  static constexpr int64_t kMost = kSpan / 32 + 2;
  float scale[kMost];
  int32_t zero[kMost];
  int64_t first_size;

  SpanGroups(const PackedMatrix& w, Columns at) {
    const int64_t before = at.begin / w.group_size;
    const int64_t first = scale_row(w, at.n) + before;
    const int64_t count = (at.end - 1) / w.group_size - before + 1;
    first_size = (before + 1) * w.group_size - at.begin;
    if (w.scale_type == FloatType::kFloat32) {
      const auto* from = static_cast<const float*>(w.scale) + first;
      for (int64_t i = 0; i < count; ++i) scale[i] = from[i];
    } else {
      for (int64_t i = 0; i < count; ++i) scale[i] = scale_of_group(w, first + i);
    }
    const int symmetric = symmetric_zero(w);
    for (int64_t i = 0; i < count; ++i) zero[i] = w.zero == nullptr ? symmetric : w.zero[first + i];
  }
};

// Sums with a table a group; `codes` are those of the columns, Table::kBits each. A function of its
// own for every kind of table, as all in one leave too few registers.
template <typename Target, typename Table>
__attribute__((noinline)) void add_group_tables(const PackedMatrix& w, Columns at,
                                                const uint8_t* codes, float alpha,
                                                typename Target::Type* target,
                                                typename Target::Type* saved) {
  constexpr int kRegisters = Table::kEntries / kFloats == 0 ? 1 : Table::kEntries / kFloats;
  const GroupIntegers integers(w);
  const SpanGroups groups(w, at);
  Ints of_code[kRegisters];
  for (int i = 0; i < kRegisters; ++i) of_code[i] = load(integers.of_code + i * kFloats);
  int64_t size = groups.first_size;
  for (int64_t k = 0, group = 0; k < at.count(); k += size, size = w.group_size, ++group) {
    if (size > at.count() - k) size = at.count() - k;
    const Ints zero = broadcast(groups.zero[group]);
    const Scaled<Target> scaled{0, groups.scale[group], alpha};
    alignas(64) float table[16];
    for (int i = 0; i < kRegisters; ++i) {
      store(table + i * kFloats, scaled(difference(of_code[i], zero)));
    }
    add_run<Target>(codes + k * Table::kBits / 8, size, Table(table), target + k,
                    at_place(saved, k));
  }
}

template <typename Target>
void add_bytes(const PackedMatrix& w, Columns at, float alpha, typename Target::Type* target,
               typename Target::Type* saved) {
  const uint8_t* code = code_row(w, at.n) + at.begin;
  for_groups(w, at.n, at.begin, at.end, [&](int64_t group, int64_t k, int64_t count) {
    const Scaled<Target> scaled{zero_at(w, group), scale_of_group(w, group), alpha};
    typename Target::Type* room = at_place(saved, k);
    if constexpr (Target::kHalf) {
      if (FromBytesInRange<Target>::takes(scaled)) {
        return add_run<Target>(code + k, count, FromBytesInRange<Target>{scaled}, target + k, room);
      }
    }
    add_run<Target>(code + k, count, FromBytes<Target>(scaled), target + k, room);
  });
}

// Calls body(table, codes) for codes of at most 16 levels as Codes reads them best: `table` is a
// type of sources. `in_runs` says whether runs begin on whole bytes.
template <typename Codes, typename Packed, typename Body>
void with_table(const Packed& w, Columns at, bool in_runs, const Body& body) {
  if constexpr (Codes::kReadsPacked) {
    const int bits = code_bits(w.levels);
    const uint8_t* packed =
        w.codes + at.n * packed_row_bytes(w.cols, w.levels) + at.begin * bits / 8;
    if (in_runs && bits == 1)
      return body(TypeOf<typename Codes::template PackedTable<1>>(), packed);
    if (in_runs && bits == 2)
      return body(TypeOf<typename Codes::template PackedTable<2>>(), packed);
    if (in_runs && bits == 3)
      return body(TypeOf<typename Codes::template PackedTable<3>>(), packed);
    if (in_runs && bits == 4)
      return body(TypeOf<typename Codes::template PackedTable<4>>(), packed);
  }
  alignas(64) uint8_t expanded[kSpan + kSpanSlack];
  const uint8_t* code = span_codes<Codes>(w, at.n, at.begin, at.end, expanded);
  if (w.levels == 16) return body(TypeOf<typename Codes::template Table<true>>(), code);
  body(TypeOf<typename Codes::template Table<false>>(), code);
}

template <typename Codes, typename Target>
void add_span_to(const PackedMatrix& w, Columns at, float alpha, typename Target::Type* target,
                 typename Target::Type* saved) {
  const bool plain = w.row_scale == nullptr && w.remainder.offsets == nullptr;
  const bool tables = has_group_tables(w);
  const bool bytes = plain && w.levels == 256 && w.group_dim == 1;
  const int64_t run = tables || bytes ? w.group_size : at.count();
  saved = saved_by_runs(target, at.count(), run < at.count() ? run : 0, saved);
  if (tables) {
    return with_table<Codes>(w, at, w.group_size % 8 == 0 || w.group_size >= w.cols,
                             [&](auto type, const uint8_t* codes) {
                               add_group_tables<Target, typename decltype(type)::Type>(
                                   w, at, codes, alpha, target, saved);
                             });
  }
  if (bytes) return add_bytes<Target>(w, at, alpha, target, saved);
  alignas(64) float value[kSpan];
  decode_span<Codes>(w, at.n, at.begin, at.end, value);
  add_run<Target>(reinterpret_cast<const uint8_t*>(value), at.count(), FromFloats<Target>(alpha),
                  target, saved);
}

// body(Target()) for the target's type.
template <typename Body>
void with_target(FloatType type, const Body& body) {
  if (type == FloatType::kFloat16) return body(Float16Target());
  if (type == FloatType::kBFloat16) return body(BFloat16Target());
  body(Float32Target());
}

template <typename Codes>
void add_span(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float alpha,
              FloatType type, void* target, void* saved) {
  with_target(type, [&](auto held) {
    using Type = typename decltype(held)::Type;
    add_span_to<Codes, decltype(held)>(w, {n, begin, end}, alpha, static_cast<Type*>(target),
                                       static_cast<Type*>(saved));
  });
}

template <typename Codes, typename Target>
void add_levels_to(const LevelCodes& codes, const LevelTable& table, Columns at,
                   typename Target::Type* target, typename Target::Type* saved) {
  saved = saved_by_runs(target, at.count(), 0, saved);
  if (codes.levels != 256) {
    return with_table<Codes>(codes, at, true, [&](auto type, const uint8_t* code) {
      add_run<Target>(code, at.count(), typename decltype(type)::Type(table.scaled), target, saved);
    });
  }
  const uint8_t* code = codes.codes + at.n * codes.cols + at.begin;
  if constexpr (Target::kHalf && Codes::kHalfTable256) {
    using Halves = typename Codes::HalfTable256;
    const FromHalves<Target, Halves> source(Halves(table), table.alpha);
    add_run<Target>(code, at.count(), source, target, saved);
  } else {
    add_run<Target>(code, at.count(), typename Codes::Table256(table.scaled), target, saved);
  }
}

template <typename Codes>
void add_levels_span(const LevelCodes& codes, const LevelTable& table, int64_t n, int64_t begin,
                     int64_t end, FloatType type, void* target, void* saved) {
  with_target(type, [&](auto held) {
    using Type = typename decltype(held)::Type;
    add_levels_to<Codes, decltype(held)>(codes, table, {n, begin, end}, static_cast<Type*>(target),
                                         static_cast<Type*>(saved));
  });
}

// target[k] += alpha * value[k]; values are of the target's type, float16 or bfloat16, or floats.
inline void add_values_run(const void* value, FloatType value_type, int64_t count, float alpha,
                           FloatType type, void* target, void* saved) {
  with_target(type, [&](auto held) {
    using Target = decltype(held);
    using Type = typename Target::Type;
    const auto* from = static_cast<const uint8_t*>(value);
    auto* out = static_cast<Type*>(target);
    Type* room = saved_by_runs(out, count, 0, static_cast<Type*>(saved));
    if (value_type == type)
      return add_run<Target>(from, count, FromSameType<Target>(alpha), out, room);
    add_run<Target>(from, count, FromFloats<Target>(alpha), out, room);
  });
}

}  // namespace
}  // namespace pyrobust::matmul
