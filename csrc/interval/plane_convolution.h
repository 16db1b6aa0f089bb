// The convolution whose groups have one channel each (depthwise): a plane at a time is prepared and
// becomes the ends of its outputs while it is in a second-level cache. Included by convolution.cpp
// alone.
#pragma once

#include <algorithm>

#include "interval/convolution_plan.h"
#include "interval/epilogue.h"

namespace pyrobust {
namespace interval {
namespace {

// Dynamic rounding of patches needs the patches.
bool planes_apply(const Convolution& conv) {
  const int64_t taps = conv.call.weight.terms;
  return conv.table.plane != nullptr && conv.channels == 1 && !conv.call.int8 && taps > 0 &&
         taps <= kMostTaps;
}

// The buffers of one thread.
struct PlaneBuffers {
  Prepared plane;
  float *lower, *upper;  // of the convolution, where more follows

  static int64_t plane_size(const Convolution& conv) {
    return whole_lines(conv.height * conv.row_size + kPixels);
  }
  static int64_t ends_size(const Convolution& conv) {
    return conv.call.epilogue != nullptr ? whole_lines(conv.pixels) : 0;
  }
  static int64_t size(const Convolution& conv) {
    return 2 * plane_size(conv) + line_size(conv) + 2 * ends_size(conv);
  }

  PlaneBuffers(const Convolution& conv, float* memory) {
    const int64_t size = plane_size(conv);
    plane = {memory, memory + size, memory + 2 * size};
    std::fill(memory, plane.lines, 0.0f);  // the padding, which all planes keep
    lower = plane.lines + line_size(conv);
    upper = lower + ends_size(conv);
  }
};

// Returns the absolute term of its outputs.
float prepare_plane(const Convolution& conv, int64_t image, int64_t channel, PlaneBuffers& own) {
  const Images& images = conv.images;
  own.plane.first_channel = channel;
  float largest;
  const int64_t stride = conv.window.stride_width, pad = conv.window.pad_left;
  if (stride <= 2) {
    const int64_t from = (image * images.channels + channel) * images.height * images.width;
    const int64_t to = conv.window.pad_top * conv.row_size;
    const auto place = [&](int64_t x) { return x % stride * conv.phase_size + x / stride; };
    const Ends ends{conv.call.lower + from, conv.call.upper + from, images.height * images.width,
                    conv.call.floor()};
    largest = conv.table.fill_plane(
        {ends, images.width, conv.row_size, place(pad), stride == 2 ? place(pad + 1) : 0,
         own.plane.centre + to, own.plane.radius + to},
        conv.prepared[0]);
  } else {
    const int64_t first = channel * images.height;
    largest = prepare_lines(conv, image, first, first + images.height, own.plane);
  }
  return offset_for(conv.call, largest);
}

// Rows of W that read the channel.
void convolve_plane(const Convolution& conv, const LateSteps& late, const float* weight,
                    int64_t image, int64_t channel, float offset, const PlaneBuffers& own) {
  const Window& window = conv.window;
  const bool streams = past_cache(output_bytes(conv.call, conv.images, window));
  for (int64_t n = channel * conv.rows; n < (channel + 1) * conv.rows; ++n) {
    const int64_t at = (image * conv.call.weight.rows + n) * conv.pixels;
    Plane work{own.plane.centre,
               own.plane.radius,
               conv.column_offsets.data(),
               window.kernel_height,
               window.kernel_width,
               window.dilation_height * conv.row_size,
               window.stride_height * conv.row_size,
               window.out_height,
               window.out_width,
               weight + n * conv.call.weight.terms,
               conv.call.bias != nullptr ? conv.call.bias[n] : 0.0f,
               offset,
               conv.call.out_lower + at,
               conv.call.out_upper + at,
               streams};
    if (late.none()) {
      conv.call.report(conv.table.plane(work, conv.constants));
      continue;
    }
    work.out_lower = own.lower;
    work.out_upper = own.upper;
    work.past_cache = false;
    conv.call.report(conv.table.plane(work, conv.constants));
    late.follow(n, conv.pixels, own.lower, own.upper, at, streams);
  }
}

// Preparation and ends cost as much as some twenty terms of each output.
double work_of_planes(const Convolution& conv) {
  return static_cast<double>(conv.images.batch * conv.pixels) *
         static_cast<double>(conv.call.weight.rows * (conv.call.weight.terms + 20)) / 2;
}

void convolve_planes(Convolution& conv, int num_threads) {
  const Weight& packed = conv.call.weight;
  const Floats decoded = floats(decoded_size(packed, packed.rows));
  const float* weight = rows_of(packed, 0, packed.rows, decoded.get());
  const double of_sum = rounding::gamma_bound(static_cast<double>(packed.terms));
  conv.prepared = {constants_for(conv.call, packed.terms, of_sum)};
  const LateSteps late(conv.call, conv.table);
  const int64_t channels = conv.images.channels, size = PlaneBuffers::size(conv);
  const Shares shares(conv.images.batch * channels, 1, work_of_planes(conv), num_threads);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    PlaneBuffers own(conv, memory.get() + share * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / channels, channel = i % channels;
      const float offset = prepare_plane(conv, image, channel, own);
      convolve_plane(conv, late, weight, image, channel, offset, own);
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
