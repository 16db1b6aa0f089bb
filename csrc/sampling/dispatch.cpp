// Checks, picks the kernels, and splits the work over threads.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "runtime/check.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"
#include "sampling/kernels.h"
#include "sampling/sampling.h"

namespace pyrobust {
namespace sampling {
namespace {

// About 20 microseconds of one core.
constexpr int64_t kTilesPerGrain = 400;
constexpr int64_t kLogitsPerGrain = 20000;

template <typename Function>
Function pick(Function SamplingKernels::* member) {
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2 && kAvx2Kernels.*member != nullptr) return kAvx2Kernels.*member;
#endif
  return kPortableKernels.*member;
}

void check_call(const GaussianCall& call) {
  check(call.images >= 0 && call.samples >= 0 && call.elements >= 0,
        "gaussian_samples: sizes must not be negative.");
  check(call.elements <= kMaxElements, "gaussian_samples: an input must have at most 2^34 elements",
        "; got ", call.elements, ".");
  check(call.first_sample >= 0 && call.first_sample <= kMaxSamples - call.samples,
        "gaussian_samples: sample indices must lie in [0, 2^40); got ", call.samples, " from ",
        call.first_sample, " on.");
  check(call.first_index >= 0 && call.first_index <= kMaxImages - call.images,
        "gaussian_samples: image indices must lie in [0, 2^48); got ", call.images, " from ",
        call.first_index, " on.");
  for (int64_t b = 0; b < call.images; ++b) {
    check(std::isfinite(call.sigma[b]) && call.sigma[b] > 0,
          "gaussian_samples: sigma must be finite and positive; got ", call.sigma[b], ".");
  }
}

}  // namespace

void gaussian_samples(const GaussianCall& call, int num_threads) {
  check_call(call);
  const auto kernel = pick(&SamplingKernels::gaussian_row);
  const int64_t row_tiles = (call.elements + kTile - 1) / kTile;
  const int64_t row_bytes = call.elements * float_type_bytes(call.out_type);
  const int64_t tiles = call.images * call.samples * row_tiles;
  parallel_for(tiles, kTilesPerGrain, 1, num_threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / row_tiles, image = row / call.samples;
      const int64_t first = begin % row_tiles;
      const int64_t last = std::min(row_tiles, first + (end - begin));
      const Stream stream = {call.seed, call.first_sample + row % call.samples,
                             call.first_index + image};
      kernel({call.x + image * call.elements, call.sigma[image], stream, first, last, call.elements,
              static_cast<char*>(call.out) + row * row_bytes, call.out_type});
      begin += last - first;
    }
  });
}

int64_t find_votes(const VoteCall& call, int num_threads) {
  check(call.classes >= 1, "count_votes: logits must have at least one class; got ", call.classes,
        ".");
  const auto kernel = pick(&SamplingKernels::vote_rows);
  const int64_t row_bytes = call.classes * float_type_bytes(call.type);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerGrain / call.classes);
  std::atomic<int64_t> first_nan{call.rows};
  parallel_for(call.rows, grain, 1, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t found = kernel({static_cast<const char*>(call.logits) + begin * row_bytes,
                                  call.type, end - begin, call.classes, call.votes + begin});
    if (found < 0) return;
    int64_t known = first_nan.load();
    while (begin + found < known && !first_nan.compare_exchange_weak(known, begin + found)) {
    }
  });
  return first_nan.load() < call.rows ? first_nan.load() : -1;
}

}  // namespace sampling
}  // namespace pyrobust
