// Picks the kernels, prepares centres and radii once, splits the work over threads: rows of W in
// the linear product, output pixels in the convolution.
#include <algorithm>
#include <vector>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "interval/panels.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"
#include "runtime/float_environment.h"
#include "runtime/parallel.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kFlush = 4.70197740328915e-38;        // 2^-124
constexpr double kInputFloor = 7.888609052210118e-31;  // 2^-100
constexpr double kLimit = 8.507059173023462e37;        // 2^126

// Up to this many inputs the dot kernels read W once for all; beyond, panels do.
constexpr int64_t kFewInputs = 4;
// Rows of W that meet one panel after another: 64 K floats stay in a second-level cache.
constexpr int64_t kBlockFloats = 65536;
constexpr int64_t kRowStep = 20;  // a multiple of every kernel's tile height
// Panels of patches that share one pass over W.
constexpr int64_t kPanelsAtOnce = 8;
// About 20 us: below this a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

IntervalKernels pick_kernels() {
  IntervalKernels table = kPortableKernels;
  const auto take = [&table](const IntervalKernels* faster) {
    if (faster == nullptr) return;
    if (faster->prepare != nullptr) table.prepare = faster->prepare;
    if (faster->dots != nullptr) table.dots = faster->dots;
    if (faster->tiles != nullptr) table.tiles = faster->tiles;
    if (faster->finish_row != nullptr) table.finish_row = faster->finish_row;
    if (faster->finish_panel != nullptr) table.finish_panel = faster->finish_panel;
  };
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) take(avx2_kernels());
#else
  (void)take;
#endif
  return table;
}

Constants constants_for(Rounding mode, int64_t terms) {
  using rounding::gamma_bound;
  using rounding::to_float_up;
  const double own = gamma_bound(static_cast<double>(sum_depth(terms)));
  const double any = gamma_bound(static_cast<double>(terms + 2));
  const bool deployed = mode == Rounding::kDeployed;
  Constants out{};
  out.outward = mode != Rounding::kNearest;
  out.centre_gain = to_float_up(deployed ? own + any : own);
  out.radius_gain = to_float_up(deployed ? 1.0 + any : 1.0);
  out.input_floor = out.outward ? to_float_up(kInputFloor) : 0.0f;
  out.inflate = to_float_up((1.0 + 8.0 * rounding::kUnit) / (1.0 - own));
  out.bias_gain = deployed ? to_float_up(any) : 0.0f;
  out.limit = deployed ? rounding::to_float_down(any * kLimit) : rounding::infinity();
  return out;
}

float offset_for(float largest, int64_t terms) {
  const double scale = kFlush * static_cast<double>(terms + 8);
  return rounding::to_float_up(scale * (1.0 + 2.0 * static_cast<double>(largest)));
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Equal shares of [0, count) with borders on multiples of `step`, at least kGrain of work each.
struct Shares {
  int64_t count, step, number;

  Shares(int64_t count, int64_t step, double work, int num_threads) : count(count), step(step) {
    const auto useful = static_cast<int64_t>(work / static_cast<double>(kGrain));
    number = std::max<int64_t>(
        1, std::min({static_cast<int64_t>(num_threads), useful, blocks(count, step)}));
  }
  int64_t begin(int64_t share) const {
    return std::min(count, blocks(count, step) * share / number * step);
  }

  template <typename Body>  // body(share, begin, end)
  void run(const Body& body) const {
    parallel_for(number, 1, 1, static_cast<int>(number), [&](int64_t first, int64_t last) {
      const DefaultFloatEnvironment environment;
      for (int64_t share = first; share < last; ++share) {
        if (begin(share) < begin(share + 1)) body(share, begin(share), begin(share + 1));
      }
    });
  }
};

int64_t rows_at_once(const Weight& weight) {
  const int64_t fit = kBlockFloats / std::max<int64_t>(1, weight.terms) / kRowStep * kRowStep;
  return std::min(std::max(fit, kRowStep), blocks(weight.rows, kRowStep) * kRowStep);
}

const float* rows_of(const Weight& weight, int64_t begin) {
  return weight.data + begin * weight.terms;
}

const float* shifted(const float* bias, int64_t by) { return bias != nullptr ? bias + by : bias; }

// Centres and radii of the whole input, in one buffer, and the absolute term of every input.
struct Prepared {
  std::vector<float> values;
  std::vector<float> offsets;
  float* centre = nullptr;
  float* radius = nullptr;

  Prepared(int64_t inputs, int64_t size)
      : values(static_cast<size_t>(2 * inputs * size)), offsets(static_cast<size_t>(inputs)) {
    centre = values.data();
    radius = centre + inputs * size;
  }
};

void few_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                const Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Shares shares(rows, kRowStep, static_cast<double>(rows * terms), num_threads);
  std::vector<float> sums(static_cast<size_t>(2 * batch * rows));
  float *centre_sums = sums.data(), *radius_sums = centre_sums + batch * rows;
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    table.dots({input.centre, input.radius, rows_of(call.weight, begin), batch, end - begin, terms,
                centre_sums + begin, radius_sums + begin, rows});
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t at = b * rows + begin;
      table.finish_row({centre_sums + at, radius_sums + at, shifted(call.bias, begin),
                        input.offsets[static_cast<size_t>(b)], end - begin, call.out_lower + at,
                        call.out_upper + at},
                       constants);
    }
  });
}

void many_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                 Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const int64_t panels = blocks(batch, kLanes), panel_size = terms * kPanelWidth;
  std::vector<float> packed(static_cast<size_t>(panels * panel_size));
  input.offsets.resize(static_cast<size_t>(panels * kLanes));
  const Shares packing(panels, 1, static_cast<double>(batch * terms), num_threads);
  packing.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * kLanes * terms;
      pack_rows(input.centre + at, input.radius + at, std::min(kLanes, batch - p * kLanes), terms,
                packed.data() + p * panel_size);
    }
  });
  const Shares shares(rows, kRowStep, static_cast<double>(batch) * rows * terms / 8, num_threads);
  const int64_t step = rows_at_once(call.weight);
  std::vector<float> sums(static_cast<size_t>(shares.number * step * kPanelWidth));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = sums.data() + share * step * kPanelWidth;
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = std::min(step, end - n);
      const float* weight = rows_of(call.weight, n);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = p * kLanes * rows + n;
        table.tiles({packed.data() + p * panel_size, weight, count, terms, own});
        table.finish_panel({own, shifted(call.bias, n), input.offsets.data() + p * kLanes, count,
                            std::min(kLanes, batch - p * kLanes), 1, rows, call.out_lower + at,
                            call.out_upper + at},
                           constants);
      }
    }
  });
}

// The image's extent with padding: what is given, and what the last patch reaches.
int64_t padded_size(int64_t size, int64_t pad, int64_t out, int64_t stride, int64_t kernel,
                    int64_t dilation) {
  return std::max(pad + size, (out - 1) * stride + (kernel - 1) * dilation + 1);
}

void prepare_images(const Call& call, const IntervalKernels& table, const Constants& constants,
                    const Images& images, const Window& window, int64_t height, int64_t width,
                    Prepared& input, int num_threads) {
  const int64_t plane = height * width, size = images.channels * images.height * images.width;
  const Shares shares(images.batch, 1, static_cast<double>(images.batch * size), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin * images.channels * images.height;
         row < end * images.channels * images.height; ++row) {
      const int64_t b = row / images.height / images.channels;
      const int64_t at = row / images.height * plane +
                         (window.pad_top + row % images.height) * width + window.pad_left;
      const Ends ends{call.lower + row * images.width, call.upper + row * images.width,
                      images.width};
      const float largest = table.prepare(ends, constants, input.centre + at, input.radius + at);
      float& offset = input.offsets[static_cast<size_t>(b)];
      offset = std::max(offset, offset_for(largest, call.weight.terms));
    }
  });
}

void check_window(const Call& call, const Images& images, const Window& window) {
  const int64_t least =
      std::min({window.kernel_height, window.kernel_width, window.stride_height,
                window.stride_width, window.dilation_height, window.dilation_width, window.groups});
  check(least >= 1, "interval_conv2d: kernel, stride, dilation and groups must be at least 1; got ",
        least, ".");
  check(std::min(window.pad_top, window.pad_left) >= 0,
        "interval_conv2d: padding must not be negative.");
  check(images.channels % window.groups == 0 && call.weight.rows % window.groups == 0,
        "interval_conv2d: groups must divide the channels; got ", images.channels, " inputs, ",
        call.weight.rows, " outputs and ", window.groups, " groups.");
  const int64_t terms =
      images.channels / window.groups * window.kernel_height * window.kernel_width;
  check(call.weight.terms == terms, "interval_conv2d: weight must have ", terms,
        " values per output channel; got ", call.weight.terms, ".");
}

void check_terms(const char* subject, int64_t terms) {
  check(terms <= kMaxTerms, subject, ": an output may sum at most ", kMaxTerms, " products; got ",
        terms, ".");
}

}  // namespace

void interval_linear(const Call& call, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms;
  check_terms("interval_linear", terms);
  if (batch == 0 || call.weight.rows == 0) return;
  const Constants constants = constants_for(call.rounding, terms);
  const IntervalKernels table = pick_kernels();
  Prepared input(batch, terms);
  const Shares shares(batch, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * terms;
      const float largest = table.prepare({call.lower + at, call.upper + at, terms}, constants,
                                          input.centre + at, input.radius + at);
      input.offsets[static_cast<size_t>(b)] = offset_for(largest, terms);
    }
  });
  if (batch <= kFewInputs) {
    few_inputs(call, table, constants, input, batch, num_threads);
  } else {
    many_inputs(call, table, constants, input, batch, num_threads);
  }
}

void interval_conv2d(const Call& call, const Images& images, const Window& window,
                     int num_threads) {
  check_window(call, images, window);
  const int64_t terms = call.weight.terms, rows = call.weight.rows / window.groups;
  check_terms("interval_conv2d", terms);
  const int64_t pixels = window.out_height * window.out_width;
  if (images.batch == 0 || pixels <= 0 || rows == 0) return;
  const Constants constants = constants_for(call.rounding, terms);
  const IntervalKernels table = pick_kernels();
  const int64_t height =
      padded_size(images.height, window.pad_top, window.out_height, window.stride_height,
                  window.kernel_height, window.dilation_height);
  const int64_t width =
      padded_size(images.width, window.pad_left, window.out_width, window.stride_width,
                  window.kernel_width, window.dilation_width);
  Prepared input(images.batch, images.channels * height * width);
  std::fill(input.offsets.begin(), input.offsets.end(), offset_for(0.0f, terms));
  prepare_images(call, table, constants, images, window, height, width, input, num_threads);

  const int64_t panels_of_image = blocks(pixels, kLanes), panel_size = terms * kPanelWidth;
  const int64_t channels = images.channels / window.groups;
  const double work = static_cast<double>(images.batch * pixels) * call.weight.rows * terms / 8;
  const Shares shares(images.batch * panels_of_image, kPanelsAtOnce, work, num_threads);
  const int64_t step = rows_at_once({call.weight.data, rows, terms});
  const int64_t scratch_size = kPanelsAtOnce * panel_size + step * kPanelWidth;
  std::vector<float> scratch(static_cast<size_t>(shares.number * scratch_size));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* packed = scratch.data() + share * scratch_size;
    float* sums = packed + kPanelsAtOnce * panel_size;
    for (int64_t first = begin; first < end; first += kPanelsAtOnce) {
      const int64_t last = std::min(first + kPanelsAtOnce, end);
      for (int64_t group = 0; group < window.groups; ++group) {
        for (int64_t p = first; p < last; ++p) {
          const int64_t pixel = p % panels_of_image * kLanes;
          const int64_t at =
              (p / panels_of_image * images.channels + group * channels) * height * width;
          pack_patches({input.centre + at, input.radius + at, height, width}, window, channels,
                       pixel, std::min(kLanes, pixels - pixel), packed + (p - first) * panel_size);
        }
        for (int64_t n = group * rows; n < (group + 1) * rows; n += step) {
          const int64_t count = std::min(step, (group + 1) * rows - n);
          const float* weight = rows_of(call.weight, n);
          for (int64_t p = first; p < last; ++p) {
            const int64_t image = p / panels_of_image, pixel = p % panels_of_image * kLanes;
            const int64_t at = (image * call.weight.rows + n) * pixels + pixel;
            float offsets[kLanes];
            std::fill(offsets, offsets + kLanes, input.offsets[static_cast<size_t>(image)]);
            table.tiles({packed + (p - first) * panel_size, weight, count, terms, sums});
            table.finish_panel(
                {sums, shifted(call.bias, n), offsets, count, std::min(kLanes, pixels - pixel),
                 pixels, 1, call.out_lower + at, call.out_upper + at},
                constants);
          }
        }
      }
    }
  });
}

}  // namespace interval
}  // namespace pyrobust
