// Functions of one number in doubles, a register at a time, each with its slope and a bound on its
// error relative to the value. Errors of e^x, e^x - 1 and the fits below carry over with a factor
// of at most 2, as all sums but the marked ones have terms of one sign; roundings are a few units
// of 2^-53, which the bounds hold many times. Beyond that, results below 2^-180 may be any such
// number of the right sign, or zero. tests/interval/test_all_float32.py meets the bounds at every
// float32 number.
//
// A `kValley` function falls up to `kTurn`, the double next to its lowest point, and rises from
// there on; `kFalls` ones fall; the others rise.
#pragma once

#include <cmath>

#include "interval/exponential.h"

namespace pyrobust {
namespace interval {
namespace {

struct Rising {
  static constexpr bool kValley = false;
  static constexpr double kTurn = 0.0;
  static constexpr bool kHasFloor = false, kHasCeiling = false;
  static constexpr double kFloor = 0.0, kCeiling = 0.0;
  static constexpr bool kFalls = false;
  static constexpr bool kByValue = false;  // float32 evaluations err relative to the value alone
  static constexpr bool kExact = false;    // the double and the exact value have one float below
  static constexpr double kError = 0x1p-46;
};

struct Valley : Rising {
  static constexpr bool kValley = true;
};

// Correctly rounded.
inline Doubles root_of(Doubles x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#else
  Doubles root;
  for (int lane = 0; lane < kDoubleLanes; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
#endif
}

// c[0] + c[1] x + ...
template <int kTerms>
inline Doubles polynomial(Doubles x, const double (&c)[kTerms]) {
  Doubles sum = all_lanes(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) sum = c[i] + x * sum;
  return sum;
}

// log(1 + u) for 0 <= u <= 1: 2 artanh(s) with s = u / (2 + u), a fit to 2^-47.
inline Doubles log_of_one_more(Doubles u) {
  const Doubles s = u / (u + 2.0), z = s * s;
  const Doubles even =
      0x1.5555555555157p-1 +
      z * z *
          (0x1.2492477e1dce5p-2 + z * z * (0x1.743cf2e7a93e6p-3 + z * z * 0x1.f1cd3c3f6dc13p-4));
  const Doubles odd =
      0x1.9999999bd81f3p-2 +
      z * z *
          (0x1.c71d5d8ecb8a0p-3 + z * z * (0x1.3d6fb1589e374p-3 + z * z * 0x1.6cb6b520b9049p-3));
  return s * 2.0 + s * z * (even + z * odd);
}

struct Exp : Rising {
  static constexpr bool kHasFloor = true;
  Doubles value(Doubles x) const { return exponential(x); }
  Doubles slope(Doubles x) const { return exponential(x); }
};

struct Expm1 : Rising {
  static constexpr bool kHasFloor = true;
  static constexpr double kFloor = -1.0;
  Doubles value(Doubles x) const { return exponential_less_one(x); }
  Doubles slope(Doubles x) const { return exponential(x); }
};

struct Sigmoid : Rising {
  static constexpr bool kHasFloor = true, kHasCeiling = true;
  static constexpr double kCeiling = 1.0;
  Doubles value(Doubles x) const { return 1.0 / (1.0 + exponential(-x)); }
  Doubles slope(Doubles x) const {
    const Doubles y = value(x);
    return y * (1.0 - y);
  }
};

// With e = e^(2|x|) - 1: e / (e + 2), which is 1 to 2^-57 from |x| = 20 on.
struct Tanh : Rising {
  static constexpr bool kHasFloor = true, kHasCeiling = true;
  static constexpr double kFloor = -1.0, kCeiling = 1.0;
  Doubles value(Doubles x) const {
    const Doubles e = exponential_less_one(magnitude_of(within(x, -20.0, 20.0)) * 2.0);
    const Doubles y = e / (e + 2.0);
    return x < 0.0 ? -y : y;
  }
  Doubles slope(Doubles x) const {
    const Doubles y = value(x);
    return 1.0 - y * y;
  }
};

struct Softsign : Rising {
  static constexpr bool kHasFloor = true, kHasCeiling = true;
  static constexpr double kFloor = -1.0, kCeiling = 1.0;
  Doubles value(Doubles x) const { return x / (1.0 + magnitude_of(x)); }
  Doubles slope(Doubles x) const {
    const Doubles size = 1.0 + magnitude_of(x);
    return 1.0 / (size * size);
  }
};

struct Softplus : Rising {
  static constexpr bool kHasFloor = true;
  Doubles value(Doubles x) const {
    return larger_of(x, Doubles{}) + log_of_one_more(exponential(-magnitude_of(x)));
  }
  Doubles slope(Doubles x) const { return Sigmoid().value(x); }
};

struct LogSigmoid : Rising {
  static constexpr bool kHasCeiling = true;
  Doubles value(Doubles x) const { return -Softplus().value(-x); }
  Doubles slope(Doubles x) const { return Sigmoid().value(-x); }
};

struct Silu : Valley {
  static constexpr double kTurn = -1.2784645427610737;
  Doubles value(Doubles x) const { return x / (1.0 + exponential(-x)); }
  Doubles slope(Doubles x) const {
    const Doubles y = Sigmoid().value(x);
    return y + x * y * (1.0 - y);
  }
};

// tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2), which is 1 to 2^-114 from x = 40 on.
struct Mish : Valley {
  static constexpr double kTurn = -1.1924312145154952;
  Doubles value(Doubles x) const {
    const Doubles e = exponential(smaller_of(x, all_lanes(40.0)));
    const Doubles n = e * (e + 2.0);
    return x * (n / (n + 2.0));
  }
  Doubles slope(Doubles x) const {
    const Doubles e = exponential(smaller_of(x, all_lanes(40.0)));
    const Doubles n = e * (e + 2.0), whole = n + 2.0;
    return n / whole + x * (e * 4.0 * (e + 1.0)) / (whole * whole);
  }
};

// Phi(-size) from e^(-size^2 / 2): Phi(x) = erfc(-x / sqrt 2) / 2 is that times a rational function
// for x < 0, all of whose coefficients are positive, to 2^-45.
inline Doubles normal_tail(Doubles size, Doubles density) {
  const Doubles above =
      0x1.fffffffffff58p-2 +
      size * (0x1.45d70a3db7938p-1 +
              size * (0x1.9979e32ba3870p-2 +
                      size * (0x1.3dda17a4981e9p-3 +
                              size * (0x1.456ff4373aaabp-5 +
                                      size * (0x1.b6809f344ee45p-8 +
                                              size * (0x1.69e923f3b2d61p-11 +
                                                      size * 0x1.1eae1bb9e3413p-15))))));
  const Doubles below =
      1.0 +
      size * (0x1.090c99ee2b02cp+1 +
              size * (0x1.f3b207979af27p+0 +
                      size * (0x1.1932fd074f0c7p+0 +
                              size * (0x1.9f5e9ac5309efp-2 +
                                      size * (0x1.9ef6488a9dc17p-4 +
                                              size * (0x1.1431b8e8d7442p-6 +
                                                      size * (0x1.c59678cc9aabcp-10 +
                                                              size * 0x1.674cdc759202dp-14)))))));
  return density * above / below;
}

// 1 - Phi(-x) for x >= 0. Below -16, Phi is less than 2^-189. Squares of float32 numbers are exact.
struct Gelu : Valley {
  static constexpr double kTurn = -0.7517915246935645;
  static constexpr double kError = 0x1p-43;

  static Doubles density(Doubles size) { return exponential(size * size * -0.5); }

  Doubles value(Doubles x) const {
    const Doubles size = smaller_of(magnitude_of(x), all_lanes(16.0));
    return larger_of(x, Doubles{}) - size * normal_tail(size, density(size));
  }

  Doubles slope(Doubles x) const {
    constexpr double kRootOfTwoPi = 0x1.9884533d43651p-2;  // 1 / sqrt(2 pi)
    const Doubles size = smaller_of(magnitude_of(x), all_lanes(16.0));
    const Doubles at = density(size), share = normal_tail(size, at);
    return (x < 0.0 ? share : 1.0 - share) + x * at * kRootOfTwoPi;
  }
};

// x sigmoid(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3), whose six roundings err by |z| units of
// 2^-50: with |z| <= 318 less than 2^-41.6. Beyond |x| = 16, sigmoid(z) is 0 or 1 to 2^-450.
struct GeluTanh : Valley {
  static constexpr double kTurn = -0.7524614220710163;
  static constexpr double kError = 0x1p-41;
  static constexpr double kScale = 0x1.9884533d43651p+0;  // 2 sqrt(2 / pi)

  Doubles share(Doubles x) const {
    const Doubles near = within(x, -16.0, 16.0);
    return Sigmoid().value(kScale * near * (1.0 + near * near * 0.044715));
  }
  Doubles value(Doubles x) const { return x * share(x); }
  Doubles slope(Doubles x) const {
    const Doubles y = share(x), near = within(x, -16.0, 16.0);
    return y + near * y * (1.0 - y) * kScale * (1.0 + near * near * (3.0 * 0.044715));
  }
};

// x + 3 loses only what is below half a unit of 3.
struct Hardsigmoid : Rising {
  static constexpr bool kHasFloor = true, kHasCeiling = true;
  static constexpr double kCeiling = 1.0;
  Doubles value(Doubles x) const { return within(x + 3.0, 0.0, 6.0) / 6.0; }
  Doubles slope(Doubles x) const {
    const Longs inside = (x + 3.0 >= 0.0) & (x + 3.0 <= 6.0);
    return inside ? all_lanes(1.0 / 6.0) : Doubles{};
  }
};

struct Hardswish : Valley {
  static constexpr double kTurn = -1.5;
  Doubles value(Doubles x) const { return x * within(x + 3.0, 0.0, 6.0) / 6.0; }
  Doubles slope(Doubles x) const { return Hardsigmoid().value(x) + x * Hardsigmoid().slope(x); }
};

struct Elu : Rising {
  double rise, depth, stretch;
  Doubles value(Doubles x) const {
    const Doubles below = depth * exponential_less_one(smaller_of(x, Doubles{}) / stretch);
    return x > 0.0 ? x * rise : below;
  }
  Doubles slope(Doubles x) const {
    const Doubles below = depth / stretch * exponential(smaller_of(x, Doubles{}) / stretch);
    return x > 0.0 ? all_lanes(rise) : below;
  }
};

// x = 2^k m, m between sqrt(1/2) and sqrt(2), is k ln 2 + 2 artanh(s) with s = (m - 1) / (m + 1), a
// fit to 2^-50; for k other than 0 the sum is at least 0.34.
struct Log : Rising {
  double factor;
  Doubles value(Doubles x) const {
    constexpr double kIntegerShift = 0x1p52;  // whose last bits hold an integer
    constexpr uint64_t kShiftBits = uint64_t{1023 + 52} << 52, kBias = 1024;
    constexpr uint64_t kRootOfHalf = 0x3fe6a09e667f3bcd, kMantissa = (uint64_t{1} << 52) - 1;
    const BitsOfDoubles from_root = reinterpret_cast<BitsOfDoubles>(x) - kRootOfHalf;
    const BitsOfDoubles biased = (from_root + (kBias << 52)) >> 52 | kShiftBits;
    const Doubles k =
        reinterpret_cast<Doubles>(biased) - (kIntegerShift + static_cast<double>(kBias));
    const Doubles m = reinterpret_cast<Doubles>((from_root & kMantissa) + kRootOfHalf);
    const Doubles s = (m - 1.0) / (m + 1.0), z = s * s;
    const Doubles fit = 0x1.55555555553b8p-1 +
                        z * (0x1.9999999b8687fp-2 +
                             z * (0x1.2492462ae4140p-2 +
                                  z * (0x1.c71fccea8352bp-3 +
                                       z * (0x1.7382d90ac879fp-3 + z * 0x1.546a5dad7ecf1p-3))));
    const Doubles sum = k * 0x1.62e42fefa39efp-1 + (s * 2.0 + s * z * fit);
    return (x > 0.0 ? sum : all_lanes(-1.0) / magnitude_of(x)) * factor;  // -inf at 0
  }
  Doubles slope(Doubles x) const { return factor / x; }
};

// With y = 1 + x rounded, log(1 + x) is log y and what that lost, which is at most half of it.
struct Log1p : Rising {
  Doubles value(Doubles x) const {
    const Doubles y = 1.0 + x, lost = x - (y - 1.0);
    return Log{{}, 1.0}.value(y) + (y > 0.0 ? lost / y : Doubles{});
  }
  Doubles slope(Doubles x) const { return 1.0 / (1.0 + x); }
};

// Up to 1 by x times a fit in x^2 to 2^-54, whose terms' magnitudes sum to less than twice the sum;
// beyond by 1 - 2 Phi(-x sqrt 2). That is 1 to 2^-55 from 6 on.
struct Erf : Rising {
  static constexpr bool kHasFloor = true, kHasCeiling = true;
  static constexpr double kFloor = -1.0, kCeiling = 1.0;
  Doubles value(Doubles x) const {
    static const double kFit[] = {
        0x1.20dd750429b6dp+0,   -0x1.812746b0379c1p-2,  0x1.ce2f21a040f66p-4,
        -0x1.b82ce31203772p-6,  0x1.565bccfa44156p-8,   -0x1.c02db0665e53dp-11,
        0x1.f9a2be4f731a1p-14,  -0x1.f4ca838adb73bp-17, 0x1.b981d78881a5dp-20,
        -0x1.5c131500d3f88p-23, 0x1.d76af6ca49787p-27,  -0x1.ac9585a44fe29p-31};
    const Doubles size = smaller_of(magnitude_of(x), all_lanes(6.0)), square = size * size;
    const Doubles far = normal_tail(size * 0x1.6a09e667f3bcdp+0, exponential(-square));
    const Doubles y = size > 1.0 ? 1.0 - 2.0 * far : size * polynomial(square, kFit);
    return x < 0.0 ? -y : y;
  }
  Doubles slope(Doubles x) const { return 0x1.20dd750429b6dp+0 * exponential(-(x * x)); }
};

// atan x = b + atan t with t = x; (x - 1) / (x + 1) and b = pi / 4 from tan(pi / 8) on; -1 / x and
// b = pi / 2 from tan(3 pi / 8) on. Then |t| < 0.4143, for which atan t is t times a fit in t^2 to
// 2^-53. b is at most twice the sum.
struct Atan : Rising {
  Doubles value(Doubles x) const {
    static const double kFit[] = {
        0x1.0000000000000p+0, -0x1.55555555551e4p-2, 0x1.9999999934e4fp-3, -0x1.2492490095717p-3,
        0x1.c71c648ac9df6p-4, -0x1.745baa283762ap-4, 0x1.3afb01bb360f9p-4, -0x1.0ffbe6350536dp-4,
        0x1.d1fd54202efe1p-5, -0x1.643142dfc2c74p-5, 0x1.5a482c626fbd0p-6};
    constexpr double kNear = 0x1.a827999fcef32p-2, kFar = 0x1.3504f333f9de6p+1;
    const Doubles size = magnitude_of(x), one = all_lanes(1.0);
    const Doubles above = size > kFar ? -one : (size > kNear ? size - 1.0 : size);
    const Doubles below = size > kFar ? size : (size > kNear ? size + 1.0 : one);
    const Doubles base = size > kFar ? all_lanes(0x1.921fb54442d18p+0)
                                     : (size > kNear ? all_lanes(0x1.921fb54442d18p-1) : Doubles{});
    const Doubles t = above / below;
    const Doubles y = base + t * polynomial(t * t, kFit);
    return x < 0.0 ? -y : y;
  }
  Doubles slope(Doubles x) const { return 1.0 / (1.0 + x * x); }
};

// A root of a float that is no float differs from all of them by 2^-49 of it at least, as the
// square of one has 48 bits.
struct Sqrt : Rising {
  static constexpr bool kExact = true;
  Doubles value(Doubles x) const { return root_of(x); }
  Doubles slope(Doubles x) const { return 0.5 / root_of(x); }
};

struct Rsqrt : Rising {
  static constexpr bool kFalls = true, kByValue = true;
  Doubles value(Doubles x) const { return 1.0 / root_of(x); }
  Doubles slope(Doubles x) const { return -0.5 / (x * root_of(x)); }
};

struct SecondPower : Valley {
  static constexpr bool kExact = true;
  static constexpr double kTurn = 0.0;
  Doubles value(Doubles x) const { return x * x; }
  Doubles slope(Doubles x) const { return x * 2.0; }
};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
