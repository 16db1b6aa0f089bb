// Tables of floats in AVX2's registers, sources of add_registers.h. Included by avx2_rows.h alone;
// AVX-512 has tables of its own.
#pragma once

#include "matmul/sources.h"

#if !defined(__AVX512F__)

namespace pyrobust::matmul {
namespace {

// Up to 16 floats in two registers: a permutation of each, the fourth bit of the code chooses.
template <bool kWide>
class TwoRegisters : public PlainSum {
 public:
  static constexpr int kBits = 8, kEntries = kWide ? 16 : 8;

  explicit TwoRegisters(const float* table)
      : low_(_mm256_loadu_ps(table)), high_(_mm256_loadu_ps(table + (kWide ? 8 : 0))) {}

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    const Indices index = load_indices<kAlternate>(code);
    return {entries(index.first), entries(index.second)};
  }

 private:
  __m256 entries(__m256i index) const {
    const __m256 low = _mm256_permutevar8x32_ps(low_, index);
    if constexpr (!kWide) return low;
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(high_, index), upper);
  }

  __m256 low_, high_;
};

// 256 floats in memory: a load for every code, which is faster than gathering.
class ManyLoads : public PlainSum {
 public:
  static constexpr int kBits = 8;

  explicit ManyLoads(const float* table) : table_(table) {}

  template <bool kAlternate>
  Pair at(const uint8_t* code) const {
    constexpr int kNext = kAlternate ? 2 : 1, kSecond = kAlternate ? 1 : 8;
    return {eight<kNext>(code), eight<kNext>(code + kSecond)};
  }

 private:
  template <int kNext>
  __m256 eight(const uint8_t* code) const {
    const auto value = [&](int i) { return table_[code[kNext * i]]; };
    return _mm256_setr_ps(value(0), value(1), value(2), value(3), value(4), value(5), value(6),
                          value(7));
  }

  const float* table_;
};

// The sources that follow read 32 codes as they lie in memory, which spares expanding them to
// bytes.
struct PackedSource {
  static constexpr int kPairs = 2;
  static Pair add(Pair sum, Pair value) { return PlainSum::add(sum, value); }
};

// Codes of 1 to 3 bits: each lane of 32 bits is shifted until its code is in the lowest bits. A
// permutation looks at three of them, so that entries repeat for the bits of the next code.
template <int kBitsOfCode>
class PackedTableOf : public PackedSource {
 public:
  static constexpr int kBits = kBitsOfCode, kEntries = 8;

  explicit PackedTableOf(const float* table) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    table_ = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table),
                                      _mm256_and_si256(lane, _mm256_set1_epi32((1 << kBits) - 1)));
  }

  template <bool kAlternate>
  Pairs at(const uint8_t* code) const {
    if constexpr (kBits == 1) {
      const __m256i bits = word(code);
      const __m256i upper = _mm256_srli_epi32(bits, 16);
      return {{sixteen<kAlternate>(bits), sixteen<kAlternate>(upper)}};
    } else if constexpr (kBits == 2) {
      return {{sixteen<kAlternate>(word(code)), sixteen<kAlternate>(word(code + 4))}};
    } else {
      return {{sixteen_of_three<kAlternate>(code, 0), sixteen_of_three<kAlternate>(code + 4, 2)}};
    }
  }

 private:
  static __m256i word(const uint8_t* code) {
    int32_t bits;
    __builtin_memcpy(&bits, code, sizeof(bits));
    return _mm256_set1_epi32(bits);
  }

  // Shifts of codes 0, step, 2 step, ... within a word.
  static __m256i shifts(int step) {
    return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                              _mm256_set1_epi32(step * kBits));
  }

  __m256 entries(__m256i bits, __m256i shift) const {
    return _mm256_permutevar8x32_ps(table_, _mm256_srlv_epi32(bits, shift));
  }

  // 16 codes of one or two bits in the lowest bits of every lane.
  template <bool kAlternate>
  Pair sixteen(__m256i bits) const {
    const __m256i shift = shifts(kAlternate ? 2 : 1);
    const int second = kAlternate ? kBits : 8 * kBits;
    return {entries(bits, shift),
            entries(bits, _mm256_add_epi32(shift, _mm256_set1_epi32(second)))};
  }

  // 16 codes of three bits from byte `first` of eight: two bytes a lane hold its code, or the two
  // of alternating ones.
  template <bool kAlternate>
  Pair sixteen_of_three(const uint8_t* code, int first) const {
    int64_t eight;
    __builtin_memcpy(&eight, code, sizeof(eight));
    const __m256i both = _mm256_set1_epi64x(eight);
    constexpr auto kNoMore = static_cast<int>(0x80800000u);  // zeros in the upper half
    const auto lanes = [&](int from, int a, int b, int c, int d, int e, int f, int g, int h) {
      const auto two = [&](int byte) { return (byte + from + 1) << 8 | (byte + from) | kNoMore; };
      return _mm256_shuffle_epi8(
          both, _mm256_setr_epi32(two(a), two(b), two(c), two(d), two(e), two(f), two(g), two(h)));
    };
    if constexpr (kAlternate) {
      const __m256i bits = lanes(first, 0, 0, 1, 2, 3, 3, 4, 5);
      const __m256i shift = _mm256_setr_epi32(0, 6, 4, 2, 0, 6, 4, 2);
      return {entries(bits, shift), entries(bits, _mm256_add_epi32(shift, _mm256_set1_epi32(3)))};
    }
    const __m256i shift = _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5);
    return {entries(lanes(first, 0, 0, 0, 1, 1, 1, 2, 2), shift),
            entries(lanes(first + 3, 0, 0, 0, 1, 1, 1, 2, 2), shift)};
  }

  __m256 table_;
};

// Codes of 4 bits: a permutation of each half of the table; the code's highest bit chooses.
template <>
class PackedTableOf<4> : public PackedSource {
 public:
  static constexpr int kBits = 4, kEntries = 16;

  explicit PackedTableOf(const float* table)
      : low_(_mm256_loadu_ps(table)), high_(_mm256_loadu_ps(table + 8)) {}

  template <bool kAlternate>
  Pairs at(const uint8_t* packed) const {
    return {{sixteen<kAlternate>(packed), sixteen<kAlternate>(packed + 8)}};
  }

 private:
  template <bool kAlternate>
  Pair sixteen(const uint8_t* packed) const {
    if constexpr (kAlternate) {  // widened with its sign, a byte's highest bit is at the top too
      const __m256i bytes =
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      return {entries(bytes, _mm256_slli_epi32(bytes, 28)),
              entries(_mm256_srli_epi32(bytes, 4), bytes)};
    }
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const auto half = [&](const uint8_t* from) {
      int32_t bits;
      __builtin_memcpy(&bits, from, sizeof(bits));
      const __m256i word = _mm256_set1_epi32(bits);
      return entries(_mm256_srlv_epi32(word, shift), _mm256_sllv_epi32(word, up));
    };
    return {half(packed), half(packed + 4)};
  }

  // The highest bit of `upper` chooses.
  __m256 entries(__m256i code, __m256i upper) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, code),
                            _mm256_permutevar8x32_ps(high_, code), _mm256_castsi256_ps(upper));
  }

  __m256 low_, high_;
};

}  // namespace
}  // namespace pyrobust::matmul

#endif
