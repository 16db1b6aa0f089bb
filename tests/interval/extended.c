/* Elementary functions in x87 extended precision (64 bits), and how far other evaluations are off.
 *
 * The functions of glibc's long double keep within a few units of 2^-64 here, some 2^-10 of the
 * widenings that are judged. Compiled by extended.py.
 */
#include <float.h>
#include <math.h>

typedef long double extended;

static const extended kRootHalf = 0.70710678118654752440084436210484903928L;
static const extended kRootTwoByPi = 0.79788456080286535587989211986876373695L;

/* Whether exp(x) leaves the range of long double, where glibc is slow. */
static int far_out(extended x) { return fabsl(x) > 11400; }

static extended exponential(extended x) {
  if (far_out(x)) return x > 0 ? INFINITY : 0;
  return fabsl(x) < 0x1p-40L ? 1 + x : expl(x);
}

static extended exponential_less_one(extended x) {
  if (far_out(x)) return x > 0 ? INFINITY : -1;
  if (x < -70) return -1;
  return fabsl(x) < 0x1p-40L ? x * (1 + x / 2) : expm1l(x);
}

static extended logistic(extended x) {
  if (x >= 0) return 1 / (1 + exponential(-x));
  const extended e = exponential(x);
  return e / (1 + e);
}

static extended log_of_one_more(extended x) {
  if (fabsl(x) < 0x1p-40L) return x * (1 - x / 2);
  return log1pl(x);
}

static extended softplus(extended x) {
  if (x > 45) return x;
  return (x > 0 ? x : 0) + log_of_one_more(exponential(-fabsl(x)));
}

static extended log_sigmoid(extended x) { return -softplus(-x); }

static extended silu(extended x) { return x * logistic(x); }

static extended mish(extended x) {
  const extended e = exponential(x < 60 ? x : 60), n = e * (e + 2);
  return x * (n / (n + 2));
}

static extended gelu(extended x) {
  if (x > 20) return x;
  if (fabsl(x) < 0x1p-70L) return x / 2;
  return x / 2 * erfcl(-x * kRootHalf);
}

static extended gelu_tanh(extended x) {
  if (fabsl(x) < 0x1p-70L) return x / 2;
  return x * logistic(2 * kRootTwoByPi * (x + 0.044715L * x * x * x));
}

static extended clamp(extended x, extended low, extended high) {
  return x < low ? low : x > high ? high : x;
}

static extended hardsigmoid(extended x) { return clamp(x + 3, 0, 6) / 6; }
static extended hardswish(extended x) { return x * clamp(x + 3, 0, 6) / 6; }
static extended softsign(extended x) { return x / (1 + fabsl(x)); }

static extended elu(extended x) { return x > 0 ? x : exponential_less_one(x); }
static extended celu(extended x) { return x > 0 ? x : 0.75L * exponential_less_one(x / 0.75L); }
static extended selu(extended x) {
  const extended alpha = 1.6732632423543772848170429916717L;
  return 1.0507009873554804934193349852946L * (x > 0 ? x : alpha * exponential_less_one(x));
}
static extended inverse_root(extended x) { return 1 / sqrtl(x); }
static extended cube(extended x) { return x * x * x; }
static extended power_three_halves(extended x) { return x * sqrtl(x); }
static extended fourth_power(extended x) { return x * x * x * x; }
static extended power_five_halves(extended x) { return x * x * sqrtl(x); }
static extended fourth_root(extended x) { return sqrtl(sqrtl(x)); }
static extended inverse_of_three_halves(extended x) { return 1 / (x * sqrtl(x)); }

typedef extended (*Function)(extended);

static const struct {
  const char* name;
  Function function;
} kFunctions[] = {
    {"gelu", gelu},         {"gelu_tanh", gelu_tanh},
    {"silu", silu},         {"mish", mish},
    {"hardswish", hardswish}, {"hardsigmoid", hardsigmoid},
    {"softplus", softplus}, {"logsigmoid", log_sigmoid},
    {"sigmoid", logistic},  {"tanh", tanhl},
    {"softsign", softsign}, {"exp", exponential},
    {"expm1", exponential_less_one}, {"erf", erfl},
    {"atan", atanl},        {"log", logl},
    {"log2", log2l},        {"log10", log10l},
    {"log1p", log_of_one_more}, {"sqrt", sqrtl},
    {"elu", elu},           {"celu", celu},
    {"selu", selu},         {"rsqrt", inverse_root},
    {"pow 3", cube},        {"pow 1.5", power_three_halves},
    {"pow 4", fourth_power}, {"pow 2.5", power_five_halves},
    {"pow 0.25", fourth_root}, {"pow -1.5", inverse_of_three_halves},
};

/* Name of function number i, or null beyond the last. */
const char* name_of(int i) {
  return i < (int)(sizeof kFunctions / sizeof kFunctions[0]) ? kFunctions[i].name : 0;
}

/* As in pyrobust.interval.curves.Curve. */
typedef struct {
  double relative, steep, deployed, deployed_input, deployed_absolute;
  double range; /* evaluations in float32 may overflow from here on */
  double least; /* errors in float64 that have a slack of their own, of underflow */
} Widening;

/* Largest error over its widening, and the numbers where it is; NaN counts as infinite. */
typedef struct {
  double real, real_at, real_units, deployed, deployed_at;
} Worst;

static double share(extended error, extended allowed) {
  return error == 0 ? 0 : error == error ? (double)(error / allowed) : INFINITY;
}

static extended error_of_double(double y, extended exact, double least) {
  if (exact == y) return 0;
  if (isinf(y) && fabsl(exact) > DBL_MAX && (exact > 0) == (y > 0)) return 0;
  const extended error = fabsl(y - exact);
  return error > least ? error : error == error ? 0 : error;
}

static extended error_of_float(float y, extended exact, extended slack) {
  if (exact == y) return 0;
  if (isinf(y) && fabsl(exact) + slack > FLT_MAX && (exact > 0) == (y > 0)) return 0;
  return fabsl(y - exact);
}

/* Compare evaluations at x, `wide` in float64 and `narrow` in float32, with function number i. */
void compare(int i, const Widening* w, const float* x, const double* wide, const float* narrow,
             long count, Worst* worst) {
  const Function function = kFunctions[i].function;
  for (long j = 0; j < count; ++j) {
    const double at = x[j];
    const extended exact = function(at), size = fabsl(exact);
    const double square = at * at < 2000 ? at * at : 2000;
    const extended error = error_of_double(wide[j], exact, w->least);
    if (error != 0) {
      const double part = share(error, 0x1p-53L * size * (w->relative + w->steep * square));
      const double in_units = share(error, 0x1p-53L * size);
      if (part > worst->real) worst->real = part, worst->real_at = at;
      if (in_units > worst->real_units) worst->real_units = in_units;
    }
    const double reach = fabs(at);
    if (reach >= w->range) continue;
    const extended units = w->deployed * size + w->deployed_absolute +
                           w->deployed_input * (reach < 8 ? reach : 8);
    const extended slack = 0x1p-24L * units + FLT_MIN * (2 + (reach < 174 ? reach : 174));
    const double part = share(error_of_float(narrow[j], exact, slack), slack);
    if (part > worst->deployed) worst->deployed = part, worst->deployed_at = at;
  }
}
