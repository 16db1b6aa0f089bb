// Picks the kernels, prepares centre and radius once, splits weight rows over threads.
#include <cmath>
#include <vector>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"

#if defined(PYROBUST_X86)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace pyrobust {
namespace interval {
namespace {

// Round to nearest with denormals for the life of the object, whatever the caller has set
// (torch.set_flush_denormal). One per thread that computes.
class DefaultEnvironment {
 public:
#if defined(PYROBUST_X86)
  DefaultEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

const IntervalKernels& kernels() { return kPortableKernels; }

constexpr double kFlush = 4.70197740328915e-38;        // 2^-124
constexpr double kInputFloor = 7.888609052210118e-31;  // 2^-100

Constants constants_for(Rounding mode, int64_t terms) {
  using rounding::gamma_bound;
  using rounding::to_float_up;
  const double own = gamma_bound(static_cast<double>(sum_depth(terms)));
  const double any = gamma_bound(static_cast<double>(terms + 2));
  Constants out{};
  out.outward = mode != Rounding::kNearest;
  const bool deployed = mode == Rounding::kDeployed;
  out.centre_gain = to_float_up(deployed ? own + any : own);
  out.radius_gain = to_float_up(deployed ? 1.0 + any : 1.0);
  out.input_floor = out.outward ? to_float_up(kInputFloor) : 0.0f;
  out.inflate = to_float_up((1.0 + 8.0 * rounding::kUnit) / (1.0 - own));
  out.bias_gain = deployed ? to_float_up(any) : 0.0f;
  // 2^126; a power of two times gamma stays far from overflow.
  out.limit = deployed ? rounding::to_float_down(any * 8.507059173023462e37) : rounding::infinity();
  return out;
}

float offset_for(float largest, int64_t terms) {
  const double scale = kFlush * static_cast<double>(terms + 8);
  return rounding::to_float_up(scale * (1.0 + 2.0 * static_cast<double>(largest)));
}

// Rows of weights a thread should have before a second one helps: about 20 us of work.
int64_t row_grain(const LinearCall& call) {
  const int64_t work_of_row = std::max<int64_t>(1, call.batch * call.in_features);
  return std::max<int64_t>(1, 65536 / work_of_row);
}

}  // namespace

void interval_linear(const LinearCall& call, int num_threads) {
  check(call.in_features <= kMaxTerms, "interval_linear: in_features must be at most ", kMaxTerms,
        "; got ", call.in_features, ".");
  const int64_t terms = call.in_features, rows = call.out_features, batch = call.batch;
  if (batch == 0 || rows == 0) return;
  const Constants constants = constants_for(call.rounding, terms);
  const IntervalKernels& table = kernels();
  std::vector<float> prepared(static_cast<size_t>(2 * batch * terms + 2 * batch * rows));
  std::vector<float> offsets(static_cast<size_t>(batch));
  float* centre = prepared.data();
  float* radius = centre + batch * terms;
  float* centre_sums = radius + batch * terms;
  float* radius_sums = centre_sums + batch * rows;

  const int64_t prepare_grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, terms));
  parallel_for(batch, prepare_grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultEnvironment environment;
    for (int64_t b = begin; b < end; ++b) {
      const Ends ends{call.lower + b * terms, call.upper + b * terms, terms};
      const float largest = table.prepare(ends, constants, centre + b * terms, radius + b * terms);
      offsets[static_cast<size_t>(b)] = offset_for(largest, terms);
    }
  });
  parallel_for(rows, row_grain(call), 8, num_threads, [&](int64_t begin, int64_t end) {
    const DefaultEnvironment environment;
    table.products({centre, radius, call.weight + begin * terms, batch, end - begin, terms,
                    centre_sums + begin, radius_sums + begin, rows});
    for (int64_t b = 0; b < batch; ++b) {
      table.finish(
          {centre_sums + b * rows + begin, radius_sums + b * rows + begin,
           call.bias != nullptr ? call.bias + begin : nullptr, offsets[static_cast<size_t>(b)],
           end - begin, call.out_lower + b * rows + begin, call.out_upper + b * rows + begin},
          constants);
    }
  });
}

}  // namespace interval
}  // namespace pyrobust
