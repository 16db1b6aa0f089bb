// Python entry points of the sampling launches.
#include <pybind11/stl.h>

#include <array>

#include "bindings/cuda_families.h"
#include "bindings/cuda_queue.h"
#include "sampling/cuda.h"

namespace py = pybind11;

namespace pyrobust {
namespace {

// (images, samples, elements, first_sample, first_index)
using Sizes = std::array<int64_t, 5>;
// (device, stream)
using Where = std::pair<int, uintptr_t>;

sampling::Positions positions(const Sizes& sizes, uint64_t seed) {
  return {sizes[0], sizes[1], sizes[2], seed, sizes[3], sizes[4]};
}

FloatType float_type(int code) { return static_cast<FloatType>(code); }

void noise_samples(int noise, uintptr_t x, uintptr_t scale, uintptr_t out, int out_type,
                   const Sizes& sizes, uint64_t seed, Where where) {
  const Launching on(where.first, where.second);
  const sampling::NoiseCall call{
      static_cast<sampling::Noise>(noise), positions(sizes, seed),
      device_pointer<const float>(x),      device_pointer<const float>(scale),
      device_pointer<void>(out),           float_type(out_type)};
  require_launched("noise_samples", sampling::gpu::noise_samples(call, on.queue));
}

void split_gaussian_samples(uintptr_t x, uintptr_t mask, float sigma_left, float sigma_right,
                            uintptr_t left, uintptr_t right, const Sizes& sizes, uint64_t seed,
                            Where where) {
  const Launching on(where.first, where.second);
  const sampling::SplitCall call{positions(sizes, seed),
                                 device_pointer<const float>(x),
                                 device_pointer<const uint8_t>(mask),
                                 sigma_left,
                                 sigma_right,
                                 device_pointer<float>(left),
                                 device_pointer<float>(right)};
  require_launched("split_gaussian_samples", sampling::gpu::split_samples(call, on.queue));
}

void masked_samples(uintptr_t x, int64_t channels, uint64_t keep, float fill, uintptr_t out,
                    int out_type, const Sizes& sizes, uint64_t seed, Where where) {
  const Launching on(where.first, where.second);
  const sampling::KeepCall call{positions(sizes, seed),
                                channels,
                                device_pointer<const float>(x),
                                keep,
                                fill,
                                device_pointer<void>(out),
                                float_type(out_type)};
  require_launched("masked_samples", sampling::gpu::keep_samples(call, on.queue));
}

// thresholds: (4, steps) words; out_type -1 for int16.
void grid_samples(uintptr_t x, uintptr_t thresholds, int32_t steps, double scale, float levels,
                  uintptr_t out, int out_type, const Sizes& sizes, uint64_t seed, Where where) {
  const Launching on(where.first, where.second);
  GridTable table{};
  table.count = steps;
  for (int word = 0; word < kGridWords; ++word) {
    table.word[word] =
        device_pointer<const uint32_t>(thresholds) + static_cast<int64_t>(word) * steps;
  }
  const bool integers = out_type < 0;
  const sampling::GridCall call{positions(sizes, seed),
                                device_pointer<const uint8_t>(x),
                                table,
                                scale,
                                levels,
                                device_pointer<void>(out),
                                integers,
                                integers ? FloatType::kFloat32 : float_type(out_type)};
  require_launched("grid_samples", sampling::gpu::grid_samples(call, on.queue));
}

void substituted_tokens(uintptr_t tokens, uintptr_t offsets, uintptr_t candidates, int64_t lists,
                        int64_t members, uintptr_t out, const Sizes& sizes, uint64_t seed,
                        Where where) {
  const Launching on(where.first, where.second);
  const sampling::ChoiceCall call{positions(sizes, seed),
                                  device_pointer<const int64_t>(tokens),
                                  device_pointer<const int64_t>(offsets),
                                  device_pointer<const int64_t>(candidates),
                                  lists,
                                  device_pointer<int64_t>(out)};
  require_launched("substituted_tokens", sampling::gpu::choice_samples(call, members, on.queue));
}

void count_votes(uintptr_t logits, int type, int64_t rows, int64_t samples, int64_t classes,
                 uintptr_t counts, uintptr_t first_nan, Where where) {
  const Launching on(where.first, where.second);
  const sampling::gpu::CountCall call{device_pointer<const void>(logits),
                                      float_type(type),
                                      rows,
                                      samples,
                                      classes,
                                      device_pointer<int64_t>(counts),
                                      device_pointer<int64_t>(first_nan)};
  require_launched("count_votes", sampling::gpu::count_votes(call, on.queue));
}

}  // namespace

void bind_cuda_sampling(py::module_& m) {
  m.def("noise_samples", &noise_samples);
  m.def("split_gaussian_samples", &split_gaussian_samples);
  m.def("masked_samples", &masked_samples);
  m.def("grid_samples", &grid_samples);
  m.def("substituted_tokens", &substituted_tokens);
  m.def("count_votes", &count_votes);
}

}  // namespace pyrobust
