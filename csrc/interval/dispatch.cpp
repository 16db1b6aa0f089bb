// Picks the kernels, prepares centres and radii once, splits the work over threads: rows of W in
// the linear product, output pixels in the convolution.
#include <algorithm>
#include <memory>

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
constexpr double kPackedError = 1.1e-6;                // of matmul/matmul.h, exact mode
constexpr double kLimit = 8.507059173023462e37;        // 2^126

// Up to this many inputs the dot kernels read W once for all; beyond, panels do.
constexpr int64_t kFewInputs = 4;
// Rows of W that meet one panel after another: 20 K floats leave a second-level cache room for
// a panel (128 x 1024 x 1024: 1% faster than 32 K or 64 K).
constexpr int64_t kBlockFloats = 65536;
constexpr int64_t kRowStep = 60;  // a multiple of every kernel's tile height
// Panels of patches that share one pass over W.
constexpr int64_t kPanelsAtOnce = 8;
// About 20 us: below this a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

IntervalKernels pick_kernels() {
  IntervalKernels table = kPortableKernels;
  const auto take = [&table](const IntervalKernels* faster) {
    if (faster == nullptr) return;
    if (faster->prepare != nullptr) table.prepare = faster->prepare;
    if (faster->pack != nullptr) table.pack = faster->pack;
    if (faster->dots != nullptr) table.dots = faster->dots;
    if (faster->tiles != nullptr) table.tiles = faster->tiles;
    if (faster->finish_row != nullptr) table.finish_row = faster->finish_row;
    if (faster->finish_panel != nullptr) table.finish_panel = faster->finish_panel;
    if (faster->fused_dots != nullptr) {
      table.fused_columns = faster->fused_columns;
      table.fused_order = faster->fused_order;
      table.fused_dots = faster->fused_dots;
    }
  };
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) take(avx2_kernels());
  if (current_isa() >= Isa::kAvx512) take(avx512_kernels());
#else
  (void)take;
#endif
  return table;
}

Constants constants_for(const Call& call) {
  using rounding::gamma_bound;
  using rounding::to_float_up;
  const Rounding mode = call.rounding;
  const double own = gamma_bound(static_cast<double>(sum_depth(call.weight.terms)));
  double any = gamma_bound(static_cast<double>(call.weight.terms + 2));
  if (call.weight.packed != nullptr) any = std::max(any, kPackedError);
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

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

int64_t rows_at_once(int64_t rows, int64_t terms) {
  const int64_t fit = kBlockFloats / std::max<int64_t>(1, terms) / kRowStep * kRowStep;
  return std::min(std::max(fit, kRowStep), blocks(rows, kRowStep) * kRowStep);
}

int64_t decoded_size(const Weight& weight, int64_t rows) {
  return weight.packed != nullptr ? rows * weight.terms : 0;
}

// Rows [begin, begin + count); packed ones are decoded into `scratch`.
const float* rows_of(const Weight& weight, int64_t begin, int64_t count, float* scratch) {
  if (weight.packed == nullptr) return weight.data + begin * weight.terms;
  matmul::dequantize_rows(*weight.packed, begin, begin + count, scratch);
  return scratch;
}

const float* shifted(const float* bias, int64_t by) { return bias != nullptr ? bias + by : bias; }

// Centres and radii of the whole input, and the absolute term of every input.
struct Prepared {
  Floats centre, radius, offsets;
};

void few_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                const Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Shares shares(rows, kRowStep, static_cast<double>(rows * terms), num_threads);
  const int64_t step = rows_at_once(rows, terms), decoded = decoded_size(call.weight, step);
  const Floats scratch = floats(shares.number * (decoded + 2 * batch * step));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = scratch.get() + share * (decoded + 2 * batch * step);
    float *centre_sums = own + decoded, *radius_sums = centre_sums + batch * step;
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = std::min(step, end - n);
      table.dots({input.centre.get(), input.radius.get(), rows_of(call.weight, n, count, own),
                  batch, count, terms, centre_sums, radius_sums, step});
      for (int64_t b = 0; b < batch; ++b) {
        table.finish_row(
            {centre_sums + b * step, radius_sums + b * step, shifted(call.bias, n),
             input.offsets[b], count, call.out_lower + b * rows + n, call.out_upper + b * rows + n},
            constants);
      }
    }
  });
}

// The same with packed weights that the kernels decode in registers; `columns` an ordered input
// has.
void few_inputs_fused(const Call& call, const IntervalKernels& table, const Constants& constants,
                      const Prepared& input, int64_t batch, int64_t columns, int num_threads) {
  const matmul::PackedMatrix& weight = *call.weight.packed;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Floats ordered = floats(2 * batch * columns);
  for (int64_t b = 0; b < batch; ++b) {
    table.fused_order(weight, input.centre.get() + b * terms, ordered.get() + 2 * b * columns);
    table.fused_order(weight, input.radius.get() + b * terms,
                      ordered.get() + (2 * b + 1) * columns);
  }
  const Shares shares(rows, kRowStep, static_cast<double>(batch * rows * terms) / 4, num_threads);
  const Floats sums = floats(shares.number * 2 * kRowStep);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float *centre_sums = sums.get() + share * 2 * kRowStep, *radius_sums = centre_sums + kRowStep;
    for (int64_t n = begin; n < end; n += kRowStep) {
      const int64_t count = std::min(kRowStep, end - n);
      for (int64_t b = 0; b < batch; ++b) {
        const float* centre = ordered.get() + 2 * b * columns;
        table.fused_dots({centre, centre + columns, &weight, n, count, centre_sums, radius_sums});
        table.finish_row({centre_sums, radius_sums, shifted(call.bias, n), input.offsets[b], count,
                          call.out_lower + b * rows + n, call.out_upper + b * rows + n},
                         constants);
      }
    }
  });
}

Floats pack_panels(const IntervalKernels& table, const Prepared& input, int64_t batch,
                   int64_t terms, int num_threads) {
  const int64_t panels = blocks(batch, kLanes), panel_size = terms * kPanelWidth;
  Floats packed = floats(panels * panel_size);
  const Shares shares(panels, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * kLanes * terms;
      table.pack({input.centre.get() + at, input.radius.get() + at,
                  std::min(kLanes, batch - p * kLanes), terms, packed.get() + p * panel_size});
    }
  });
  return packed;
}

void many_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                 const Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const int64_t panels = blocks(batch, kLanes), panel_size = terms * kPanelWidth;
  const Floats packed = pack_panels(table, input, batch, terms, num_threads);
  const Shares shares(rows, kRowStep, static_cast<double>(batch) * rows * terms / 8, num_threads);
  const int64_t step = rows_at_once(rows, terms), decoded = decoded_size(call.weight, step);
  const int64_t sum_size = step * kPanelWidth;
  const Floats scratch = floats(shares.number * (decoded + kPanelsOfTile * sum_size));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = scratch.get() + share * (decoded + kPanelsOfTile * sum_size);
    float* sums = own + decoded;
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = std::min(step, end - n);
      const float* weight = rows_of(call.weight, n, count, own);
      for (int64_t first = 0; first < panels; first += kPanelsOfTile) {
        const int64_t last = std::min(first + kPanelsOfTile, panels);
        table.tiles({packed.get() + first * panel_size, last - first, panel_size, weight, count,
                     terms, sums, sum_size});
        for (int64_t p = first; p < last; ++p) {
          const int64_t at = p * kLanes * rows + n;
          table.finish_panel(
              {sums + (p - first) * sum_size, shifted(call.bias, n),
               input.offsets.get() + p * kLanes, count, std::min(kLanes, batch - p * kLanes), 1,
               rows, call.out_lower + at, call.out_upper + at},
              constants);
        }
      }
    }
  });
}

// The image's extent with padding: what is given, and what the last patch reaches.
int64_t padded_size(int64_t size, int64_t pad, int64_t out, int64_t stride, int64_t kernel,
                    int64_t dilation) {
  return std::max(pad + size, (out - 1) * stride + (kernel - 1) * dilation + 1);
}

// A convolution in progress: the padded images and where each number of the geometry comes from.
struct Convolution {
  const Call& call;
  const Images& images;
  const Window& window;
  const IntervalKernels& table;
  const Constants constants;
  int64_t height, width;    // of a padded image
  int64_t pixels;           // of an output image
  int64_t panels_of_image;  // panels of pixels; the last may be part empty
  int64_t channels, rows;   // of one group
  Prepared input;
};

void prepare_images(Convolution& conv, int num_threads) {
  const Images& images = conv.images;
  const int64_t plane = conv.height * conv.width;
  const int64_t rows = images.channels * images.height, size = images.channels * plane;
  const bool padded = conv.height != images.height || conv.width != images.width;
  const Shares shares(images.batch, 1, static_cast<double>(images.batch * size), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float *centre = conv.input.centre.get() + b * size,
            *radius = conv.input.radius.get() + b * size;
      if (padded) {
        std::fill(centre, centre + size, 0.0f);
        std::fill(radius, radius + size, 0.0f);
      }
      float largest = 0.0f;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t from = (b * rows + row) * images.width;
        const int64_t to = row / images.height * plane + conv.window.pad_left +
                           (conv.window.pad_top + row % images.height) * conv.width;
        largest = std::max(largest, conv.table.prepare({conv.call.lower + from,
                                                        conv.call.upper + from, images.width},
                                                       conv.constants, centre + to, radius + to));
      }
      conv.input.offsets[b] = offset_for(largest, conv.call.weight.terms);
    }
  });
}

void pack_group(const Convolution& conv, int64_t group, int64_t first, int64_t last,
                float* packed) {
  const int64_t terms = conv.call.weight.terms;
  for (int64_t p = first; p < last; ++p) {
    const int64_t pixel = p % conv.panels_of_image * kLanes;
    const int64_t at = (p / conv.panels_of_image * conv.images.channels + group * conv.channels) *
                       conv.height * conv.width;
    float* panel = packed + (p - first) * terms * kPanelWidth;
    pack_patches(
        {conv.input.centre.get() + at, conv.input.radius.get() + at, conv.height, conv.width},
        conv.window, conv.channels, pixel, std::min(kLanes, conv.pixels - pixel), panel);
    if (!conv.call.int8) continue;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      widen_to_int8(panel + lane, panel + kLanes + lane, terms, kPanelWidth, conv.constants);
    }
  }
}

// Rows [n, n + count) of W against packed panels [first, last), all of them at most kPanelsAtOnce.
void convolve_rows(const Convolution& conv, int64_t n, int64_t count, const float* weight,
                   int64_t first, int64_t last, const float* packed, float* sums) {
  const int64_t terms = conv.call.weight.terms, sum_size = count * kPanelWidth;
  for (int64_t begin = first; begin < last; begin += kPanelsOfTile) {
    const int64_t end = std::min(begin + kPanelsOfTile, last);
    conv.table.tiles({packed + (begin - first) * terms * kPanelWidth, end - begin,
                      terms * kPanelWidth, weight, count, terms, sums, sum_size});
    for (int64_t p = begin; p < end; ++p) {
      const int64_t image = p / conv.panels_of_image, pixel = p % conv.panels_of_image * kLanes;
      const int64_t at = (image * conv.call.weight.rows + n) * conv.pixels + pixel;
      float offsets[kLanes];
      std::fill(offsets, offsets + kLanes, conv.input.offsets[image]);
      conv.table.finish_panel({sums + (p - begin) * sum_size, shifted(conv.call.bias, n), offsets,
                               count, std::min(kLanes, conv.pixels - pixel), conv.pixels, 1,
                               conv.call.out_lower + at, conv.call.out_upper + at},
                              conv.constants);
    }
  }
}

void convolve(const Convolution& conv, int num_threads) {
  const Weight& weight = conv.call.weight;
  const int64_t panel_size = weight.terms * kPanelWidth;
  const double work = static_cast<double>(conv.images.batch * conv.pixels) *
                      static_cast<double>(weight.rows * weight.terms) / 8;
  const Shares shares(conv.images.batch * conv.panels_of_image, kPanelsAtOnce, work, num_threads);
  const int64_t step = rows_at_once(conv.rows, weight.terms);
  const int64_t decoded = decoded_size(weight, step);
  const int64_t scratch_size =
      decoded + kPanelsAtOnce * panel_size + kPanelsOfTile * step * kPanelWidth;
  const Floats scratch = floats(shares.number * scratch_size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = scratch.get() + share * scratch_size;
    float *packed = own + decoded, *sums = packed + kPanelsAtOnce * panel_size;
    for (int64_t first = begin; first < end; first += kPanelsAtOnce) {
      const int64_t last = std::min(first + kPanelsAtOnce, end);
      for (int64_t group = 0; group < conv.window.groups; ++group) {
        pack_group(conv, group, first, last, packed);
        for (int64_t n = group * conv.rows; n < (group + 1) * conv.rows; n += step) {
          const int64_t count = std::min(step, (group + 1) * conv.rows - n);
          convolve_rows(conv, n, count, rows_of(weight, n, count, own), first, last, packed, sums);
        }
      }
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
  const Constants constants = constants_for(call);
  const IntervalKernels table = pick_kernels();
  const int64_t padded = blocks(batch, kLanes) * kLanes;  // a panel reads kLanes offsets
  Prepared input{floats(batch * terms), floats(batch * terms), floats(padded)};
  std::fill(input.offsets.get(), input.offsets.get() + padded, 0.0f);
  const Shares shares(batch, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * terms;
      float *centre = input.centre.get() + at, *radius = input.radius.get() + at;
      const float largest =
          table.prepare({call.lower + at, call.upper + at, terms}, constants, centre, radius);
      if (call.int8) widen_to_int8(centre, radius, terms, 1, constants);
      input.offsets[b] = offset_for(largest, terms);
    }
  });
  const bool fusible = call.weight.packed != nullptr && table.fused_dots != nullptr;
  const int64_t columns = fusible ? table.fused_columns(*call.weight.packed) : 0;
  if (batch <= kFewInputs && columns > 0) {
    few_inputs_fused(call, table, constants, input, batch, columns, num_threads);
  } else if (batch <= kFewInputs) {
    few_inputs(call, table, constants, input, batch, num_threads);
  } else {
    many_inputs(call, table, constants, input, batch, num_threads);
  }
}

void interval_conv2d(const Call& call, const Images& images, const Window& window,
                     int num_threads) {
  check_window(call, images, window);
  check_terms("interval_conv2d", call.weight.terms);
  const int64_t pixels = window.out_height * window.out_width;
  if (images.batch == 0 || pixels <= 0 || call.weight.rows == 0) return;
  const IntervalKernels table = pick_kernels();
  const int64_t height =
      padded_size(images.height, window.pad_top, window.out_height, window.stride_height,
                  window.kernel_height, window.dilation_height);
  const int64_t width =
      padded_size(images.width, window.pad_left, window.out_width, window.stride_width,
                  window.kernel_width, window.dilation_width);
  const int64_t size = images.batch * images.channels * height * width;
  Convolution conv{call,
                   images,
                   window,
                   table,
                   constants_for(call),
                   height,
                   width,
                   pixels,
                   blocks(pixels, kLanes),
                   images.channels / window.groups,
                   call.weight.rows / window.groups,
                   {floats(size), floats(size), floats(images.batch)}};
  prepare_images(conv, num_threads);
  convolve(conv, num_threads);
}

}  // namespace interval
}  // namespace pyrobust
