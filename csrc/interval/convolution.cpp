// The convolution: a few images at a time are prepared into a cache-sized buffer with their
// padding, patches of a few output pixels are copied to panels, and the panel kernels do the rest.
// The work is split over threads by output pixels.
#include <vector>

#include "interval/panels.h"
#include "interval/plan.h"
#include "runtime/check.h"

namespace pyrobust {
namespace interval {
namespace {

// The image's extent with padding: what is given, and what the last patch reaches.
int64_t padded_size(int64_t size, int64_t pad, int64_t out, int64_t stride, int64_t kernel,
                    int64_t dilation) {
  return std::max(pad + size, (out - 1) * stride + (kernel - 1) * dilation + 1);
}

// A convolution in progress. A row of a prepared image holds its columns by their remainder modulo
// the stride: the patches of neighbouring pixels are neighbours then, whatever the stride.
struct Convolution {
  const Call& call;
  const Images& images;
  const Window& window;
  const IntervalKernels& table;
  const Constants constants;
  int64_t pixels;                        // of an output image
  int64_t panels_of_image;               // panels of pixels; the last may be part empty
  int64_t channels, rows;                // of one group
  int64_t height, phase_size, row_size;  // of a prepared image; phase_size columns a remainder
  std::vector<int64_t> row_offsets;      // of (channel, kernel row) in a group
  std::vector<int64_t> column_offsets;   // of a kernel column

  int64_t image_size() const { return images.channels * height * row_size; }
  // A panel is set off by a line: panels a multiple of 4096 bytes apart would share cache sets.
  int64_t panel_stride() const { return call.weight.terms * kPanelWidth + kPanelWidth; }
  // As many images as one pass over W meets.
  int64_t slots() const { return (kMaxPanels - 1) / panels_of_image + 2; }
};

Convolution plan(const Call& call, const Images& images, const Window& window,
                 const IntervalKernels& table) {
  const int64_t pixels = window.out_height * window.out_width;
  const int64_t height =
      padded_size(images.height, window.pad_top, window.out_height, window.stride_height,
                  window.kernel_height, window.dilation_height);
  const int64_t width =
      padded_size(images.width, window.pad_left, window.out_width, window.stride_width,
                  window.kernel_width, window.dilation_width);
  const int64_t phase = blocks(width, window.stride_width);
  Convolution conv{call,
                   images,
                   window,
                   table,
                   constants_for(call),
                   pixels,
                   blocks(pixels, kLanes),
                   images.channels / window.groups,
                   call.weight.rows / window.groups,
                   height,
                   phase,
                   phase * window.stride_width,
                   {},
                   {}};
  for (int64_t channel = 0; channel < conv.channels; ++channel) {
    for (int64_t y = 0; y < window.kernel_height; ++y) {
      conv.row_offsets.push_back((channel * height + y * window.dilation_height) * conv.row_size);
    }
  }
  for (int64_t x = 0; x < window.kernel_width; ++x) {
    const int64_t column = x * window.dilation_width;
    conv.column_offsets.push_back(column % window.stride_width * phase +
                                  column / window.stride_width);
  }
  return conv;
}

// The buffers of one thread.
struct Buffers {
  float *decoded, *centre, *radius, *line, *packed, *sums;
  float offsets[kMaxPanels + 1];  // of the images in the slots

  static int64_t size(const Convolution& conv, int64_t step) {
    return decoded_size(conv.call.weight, step) + 2 * conv.slots() * conv.image_size() +
           2 * conv.images.width + kMaxPanels * (conv.panel_stride() + step * kPanelWidth);
  }

  Buffers(const Convolution& conv, int64_t step, float* memory) : offsets{} {
    const int64_t images = conv.slots() * conv.image_size();
    decoded = memory;
    centre = decoded + decoded_size(conv.call.weight, step);
    radius = centre + images;
    line = radius + images;
    packed = line + 2 * conv.images.width;
    sums = packed + kMaxPanels * conv.panel_stride();
    std::fill(centre, line, 0.0f);  // the padding; images of one size keep it
  }
};

// Columns [0, count) of a row to their places by remainder modulo the stride.
void spread_columns(const Convolution& conv, const float* line, float* row) {
  const int64_t stride = conv.window.stride_width, pad = conv.window.pad_left;
  for (int64_t remainder = 0; remainder < stride; ++remainder) {
    float* to = row + remainder * conv.phase_size;
    const int64_t first = blocks(std::max<int64_t>(0, pad - remainder), stride);
    for (int64_t i = first; i * stride + remainder < pad + conv.images.width; ++i) {
      to[i] = line[i * stride + remainder - pad];
    }
  }
}

void prepare_image(const Convolution& conv, int64_t image, const Buffers& own, float* offset) {
  const Images& images = conv.images;
  const int64_t at = image % conv.slots() * conv.image_size();
  const bool direct = conv.window.stride_width == 1;
  float *line_centre = own.line, *line_radius = own.line + images.width;
  float largest = 0.0f;
  for (int64_t row = 0; row < images.channels * images.height; ++row) {
    const int64_t from = (image * images.channels * images.height + row) * images.width;
    const int64_t to =
        at + (row / images.height * conv.height + conv.window.pad_top + row % images.height) *
                 conv.row_size;
    float *centre = own.centre + to, *radius = own.radius + to;
    const Ends ends{conv.call.lower + from, conv.call.upper + from, images.width,
                    conv.call.floor()};
    const float here = conv.table.prepare(ends, conv.constants,
                                          direct ? centre + conv.window.pad_left : line_centre,
                                          direct ? radius + conv.window.pad_left : line_radius);
    largest = std::max(largest, here);
    if (direct) continue;
    spread_columns(conv, line_centre, centre);
    spread_columns(conv, line_radius, radius);
  }
  *offset = offset_for(conv.call, largest);
}

// Patches of panels [first, last) of one group.
void pack_group(const Convolution& conv, int64_t group, int64_t first, int64_t last,
                const Buffers& own) {
  const Window& window = conv.window;
  int64_t images[kMaxPanels], pixels[kMaxPanels];
  for (int64_t p = first; p < last; ++p) {
    images[p - first] = p / conv.panels_of_image % conv.slots() * conv.image_size() +
                        group * conv.channels * conv.height * conv.row_size;
    pixels[p - first] = p % conv.panels_of_image * kLanes;
  }
  conv.table.patches({own.centre, own.radius, images, pixels, last - first, conv.row_offsets.data(),
                      conv.column_offsets.data(), conv.channels, window.kernel_height,
                      window.kernel_width, conv.row_size, window.stride_height, window.out_width,
                      conv.pixels, own.packed, conv.panel_stride()});
  if (!conv.call.int8) return;
  for (int64_t p = 0; p < last - first; ++p) {
    float* panel = own.packed + p * conv.panel_stride();
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      widen_to_int8(panel + lane, panel + kLanes + lane, conv.call.weight.terms, kPanelWidth,
                    conv.constants);
    }
  }
}

// Rows [n, n + count) of W against the packed panels [first, last).
void convolve_rows(const Convolution& conv, int64_t n, int64_t count, int64_t first, int64_t last,
                   const Buffers& own) {
  const float* weight = rows_of(conv.call.weight, n, count, own.decoded);
  const int64_t terms = conv.call.weight.terms, sum_size = count * kPanelWidth;
  for (int64_t p = first; p < last; p += kPanelsOfTile) {
    const int64_t panels = std::min(kPanelsOfTile, last - p);
    conv.table.tiles({own.packed + (p - first) * conv.panel_stride(), panels, conv.panel_stride(),
                      weight, count, terms, own.sums + (p - first) * sum_size, sum_size});
  }
  for (int64_t p = first; p < last;) {  // the panels of one image at a time
    const int64_t image = p / conv.panels_of_image, pixel = p % conv.panels_of_image * kLanes;
    const int64_t end = std::min(last, (image + 1) * conv.panels_of_image);
    const int64_t at = (image * conv.call.weight.rows + n) * conv.pixels + pixel;
    float offsets[kLanes];
    std::fill(offsets, offsets + kLanes, own.offsets[image % conv.slots()]);
    conv.table.finish_panel({own.sums + (p - first) * sum_size, shifted(conv.call.bias, n), offsets,
                             count, std::min((end - p) * kLanes, conv.pixels - pixel), conv.pixels,
                             1, sum_size, conv.call.out_lower + at, conv.call.out_upper + at},
                            conv.constants);
    p = end;
  }
}

void convolve(const Convolution& conv, int num_threads) {
  const Weight& weight = conv.call.weight;
  const double work = static_cast<double>(conv.images.batch * conv.pixels) *
                      static_cast<double>(weight.rows * weight.terms) / 8;
  const Shares shares(conv.images.batch * conv.panels_of_image, kMaxPanels, work, num_threads);
  const int64_t step = rows_at_once(conv.rows, weight.terms);
  const int64_t size = Buffers::size(conv, step);
  const Floats scratch = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    Buffers own(conv, step, scratch.get() + share * size);
    int64_t prepared = begin / conv.panels_of_image;  // images before it are in their slots
    for (int64_t first = begin; first < end; first += kMaxPanels) {
      const int64_t last = std::min(first + kMaxPanels, end);
      for (; prepared <= (last - 1) / conv.panels_of_image; ++prepared) {
        prepare_image(conv, prepared, own, &own.offsets[prepared % conv.slots()]);
      }
      for (int64_t group = 0; group < conv.window.groups; ++group) {
        pack_group(conv, group, first, last, own);
        for (int64_t n = group * conv.rows; n < (group + 1) * conv.rows; n += step) {
          const int64_t count = std::min(step, (group + 1) * conv.rows - n);
          convolve_rows(conv, n, count, first, last, own);
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

}  // namespace

void interval_conv2d(const Call& call, const Images& images, const Window& window,
                     int num_threads) {
  check_window(call, images, window);
  check_terms("interval_conv2d", call.weight.terms);
  if (images.batch == 0 || window.out_height * window.out_width <= 0 || call.weight.rows == 0) {
    return;
  }
  const IntervalKernels table = pick_kernels();
  convolve(plan(call, images, window, table), num_threads);
}

}  // namespace interval
}  // namespace pyrobust
