// Doubles side by side, one register of the instruction set that the including file is compiled
// for, and what elementwise bounds need of them. Additions, multiplications and divisions of IEEE
// alone, none fused: so every set gives the same bits, and the portable one needs no emulation (an
// FMA would take it some twenty operations).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyrobust {
namespace interval {
namespace {

#if defined(__AVX512F__)
constexpr int kDoubleLanes = 8;
#elif defined(__AVX2__)
constexpr int kDoubleLanes = 4;
#else
constexpr int kDoubleLanes = 2;
#endif

typedef double Doubles __attribute__((vector_size(8 * kDoubleLanes)));
typedef int64_t Longs __attribute__((vector_size(8 * kDoubleLanes)));  // bits, and masks
typedef uint64_t BitsOfDoubles __attribute__((vector_size(8 * kDoubleLanes)));
typedef float HalfFloats __attribute__((vector_size(4 * kDoubleLanes)));

inline Doubles all_lanes(double value) { return Doubles{} + value; }

inline Doubles load_doubles(const float* from) {
  HalfFloats values;
  std::memcpy(&values, from, sizeof(values));
  return __builtin_convertvector(values, Doubles);
}

inline Doubles magnitude_of(Doubles x) {
  return reinterpret_cast<Doubles>(reinterpret_cast<Longs>(x) & INT64_MAX);
}

// The first unless the second is larger; a NaN of the first stays.
inline Doubles larger_of(Doubles a, Doubles b) { return a < b ? b : a; }
inline Doubles smaller_of(Doubles a, Doubles b) { return a > b ? b : a; }

// `x` within [least, most]; a NaN stays.
inline Doubles within(Doubles x, double least, double most) {
  return smaller_of(larger_of(x, all_lanes(least)), all_lanes(most));
}

// The greatest float that is not above; the largest float for what is beyond it.
inline HalfFloats floats_below(Doubles value) {
#if defined(__AVX512F__)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return reinterpret_cast<HalfFloats>(
      _mm512_cvt_roundpd_ps(reinterpret_cast<__m512d>(value), kDown));
#else
  // a step from a float of magnitude m takes more than half of its distance to the neighbour and
  // less than one and a half, m (2^-24 + 2^-47), or three quarters of a denormal's
  constexpr double kStep = 0x1p-24 * (1.0 + 0x1p-23), kLeastStep = 0x1.8p-150;
  value = smaller_of(value, all_lanes(0x1.fffffep127));
  const Doubles nearest =
      __builtin_convertvector(__builtin_convertvector(value, HalfFloats), Doubles);
  const Doubles step = larger_of(magnitude_of(nearest) * kStep, all_lanes(kLeastStep));
  const Doubles down = nearest > value ? nearest - step : nearest;
  return __builtin_convertvector(down, HalfFloats);
#endif
}

inline HalfFloats floats_above(Doubles value) { return -floats_below(-value); }

}  // namespace
}  // namespace interval
}  // namespace pyrobust
