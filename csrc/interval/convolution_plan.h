// What both forms of the convolution share: its geometry, and images prepared with their padding.
#pragma once

#include <utility>
#include <vector>

#include "interval/panels.h"
#include "interval/plan.h"

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
  const Constants constants;             // of the ends
  std::vector<Constants> prepared;       // of the inputs, (channels) of a group
  int64_t pixels;                        // of an output image
  int64_t channels, rows;                // of one group
  int64_t height, phase_size, row_size;  // of a prepared image; phase_size columns a remainder
  std::vector<int64_t> row_offsets;      // of (channel, kernel row) in a group
  std::vector<int64_t> column_offsets;   // of a kernel column

  int64_t image_size() const { return images.channels * height * row_size; }
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
  // planes of one channel are written by whole registers (FillPlane)
  const int64_t spare = images.channels == window.groups && window.stride_width == 2 ? kPixels : 0;
  const int64_t phase = blocks(width, window.stride_width) + spare;
  Convolution conv{call,
                   images,
                   window,
                   table,
                   constants_for(call, call.weight.terms),
                   {},
                   pixels,
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

// Where a thread prepares images: centres and radii of one image, and lines for strides.
struct Prepared {
  float* centre;
  float* radius;
  float* lines;  // line_size() of them
  int64_t first_channel = 0;
};

// Rows whose columns are spread together: loads wait where they read what was just stored.
constexpr int64_t kSpreadRows = 8;

int64_t line_size(const Convolution& conv) {
  return whole_lines(2 * kSpreadRows * conv.images.width);
}

// Rows [first, first + count) of all channels of an image; returns the largest |x|.
float prepare_rows(const Convolution& conv, int64_t image, int64_t first, int64_t count,
                   const Prepared& own) {
  const Images& images = conv.images;
  const bool direct = conv.window.stride_width == 1;
  float* line_radius = own.lines + kSpreadRows * images.width;
  const auto place = [&](int64_t row) {
    const int64_t plane = row / images.height - own.first_channel;
    return (plane * conv.height + conv.window.pad_top + row % images.height) * conv.row_size;
  };
  float largest = 0.0f;
  for (int64_t row = first; row < first + count; ++row) {
    const int64_t from = (image * images.channels * images.height + row) * images.width;
    const int64_t at = (row - first) * images.width, to = place(row) + conv.window.pad_left;
    const Ends ends{conv.call.lower + from, conv.call.upper + from, images.width,
                    conv.call.floor()};
    const Constants& constants =
        conv.prepared[static_cast<size_t>(row / images.height % conv.channels)];
    largest = std::max(
        largest, conv.table.prepare(ends, constants, direct ? own.centre + to : own.lines + at,
                                    direct ? own.radius + to : line_radius + at));
  }
  for (int64_t row = first; !direct && row < first + count; ++row) {
    const int64_t at = (row - first) * images.width, to = place(row);
    for (const auto& [line, out] :
         {std::pair(own.lines + at, own.centre + to), {line_radius + at, own.radius + to}}) {
      conv.table.spread({line, images.width, conv.window.pad_left, conv.window.stride_width,
                         conv.phase_size, out});
    }
  }
  return largest;
}

// Rows [first, last) of all channels, as above.
float prepare_lines(const Convolution& conv, int64_t image, int64_t first, int64_t last,
                    const Prepared& own) {
  float largest = 0.0f;
  for (int64_t row = first; row < last; row += kSpreadRows) {
    const int64_t count = std::min(kSpreadRows, last - row);
    largest = std::max(largest, prepare_rows(conv, image, row, count, own));
  }
  return largest;
}

// Returns the absolute term of the image.
float prepare_image(const Convolution& conv, int64_t image, const Prepared& own) {
  const int64_t rows = conv.images.channels * conv.images.height;
  const float largest = prepare_lines(conv, image, 0, rows, own);
  return offset_for(conv.call, largest);
}

// Rows that meet the inputs in one pass: all of a group where they fit a second-level cache, else
// nearly equal parts.
int64_t rows_of_pass(const Convolution& conv) {
  constexpr int64_t kCacheFloats = 196608;
  const int64_t fit =
      std::max(kRowStep, kCacheFloats / std::max<int64_t>(1, conv.call.weight.terms));
  return blocks(conv.rows, blocks(conv.rows, fit));
}

// Of one of the two ends.
int64_t output_bytes(const Call& call, const Images& images, const Window& window) {
  return images.batch * call.weight.rows * window.out_height * window.out_width *
         int64_t{sizeof(float)};
}

double work_of(const Convolution& conv) {
  return static_cast<double>(conv.images.batch * conv.pixels) *
         static_cast<double>(conv.call.weight.rows * conv.call.weight.terms) / 2;
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
