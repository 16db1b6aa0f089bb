// The convolution without copies: kernels read sixteen neighbouring output pixels of a prepared
// image at every offset of the window. Included by convolution.cpp alone.
#pragma once

#include <vector>

#include "interval/convolution_plan.h"
#include "interval/epilogue.h"

namespace pyrobust {
namespace interval {
namespace {

// Groups whose ends are written together: two lines of each output channel would evict one another,
// as channels are often a multiple of 4096 bytes apart.
constexpr int64_t kGroupsOfPass = 8;

// Dynamic rounding of patches needs the patches; short output rows would waste lanes. Coarse radii
// come in pairs of channels.
bool direct_applies(const Convolution& conv) {
  if (conv.table.direct == nullptr || conv.call.int8) return false;
  if (conv.window.out_width < kPixels || conv.call.weight.terms == 0) return false;
  return !conv.call.coarse_radius ||
         (conv.channels % 2 == 0 && conv.channels >= conv.table.coarse_channels);
}

// Constants of the inputs by channel, whose terms follow one another in a sum: the later a channel,
// the fewer roundings its terms pass. Coarse radii take two channels in turns.
std::vector<Constants> constants_by_channel(const Convolution& conv) {
  const int64_t taps = conv.window.kernel_height * conv.window.kernel_width;
  const int64_t together = conv.call.coarse_radius ? 2 : 1, terms = conv.call.weight.terms;
  std::vector<Constants> out;
  for (int64_t channel = 0; channel < conv.channels; channel += together) {
    const int64_t first = channel * taps, last = first + together * taps;
    int64_t most = 0;
    for (int64_t k = first; k < last; k = (k / kRun + 1) * kRun) {  // the first of each run
      const int64_t in_run = std::min((k / kRun + 1) * kRun, terms) - k;
      most = std::max(most, in_run + additions_after_run(k, terms));
    }
    const double of_sum = rounding::gamma_bound(static_cast<double>(most));
    out.insert(out.end(), static_cast<size_t>(together), constants_for(conv.call, terms, of_sum));
  }
  return out;
}

// Where the terms, or for coarse radii the pairs of terms of neighbouring channels, are in a
// prepared image, and in a row of W.
struct Places {
  std::vector<int64_t> pixels, radii, weights;
  std::vector<uint32_t> sizes;  // of all rows, for coarse radii
  int64_t size_stride;          // of a row of sizes
  int64_t taps;                 // of a channel
  Floats decoded;               // all rows of a packed W
  const float* weight;
};

Places places_of(const Convolution& conv) {
  const Weight& weight = conv.call.weight;
  const int64_t taps = conv.window.kernel_height * conv.window.kernel_width;
  Places out{{}, {}, {}, {}, taps * coarse_pairs(pairs_of(conv.channels)), taps, {}, weight.data};
  const int64_t step = conv.call.coarse_radius ? 2 : 1;
  for (int64_t channel = 0; channel < conv.channels; channel += step) {
    for (int64_t tap = 0; tap < out.taps; ++tap) {
      const int64_t y = tap / conv.window.kernel_width, x = tap % conv.window.kernel_width;
      const auto place = [&](int64_t plane) {  // plane 0 has the window's offsets
        return plane * conv.height * conv.row_size + conv.row_offsets[y] + conv.column_offsets[x];
      };
      out.pixels.push_back(place(channel));
      out.radii.push_back(place(channel / 2));
      out.weights.push_back(channel * out.taps + tap);
    }
  }
  if (weight.packed != nullptr) {
    out.decoded = floats(weight.rows * weight.terms);
    out.weight = rows_of(weight, 0, weight.rows, out.decoded.get());
  }
  if (conv.call.coarse_radius) {
    out.sizes.resize(static_cast<size_t>(coarse_sizes(weight.rows, out.size_stride)));
    conv.table.round_channels(
        {out.weight, weight.rows, weight.terms, out.taps, out.sizes.data(), out.size_stride});
  }
  return out;
}

// The buffers of one thread.
struct DirectBuffers {
  Prepared image;
  uint32_t* radii;  // coarse: pairs of channels of the image's radii
  float* sums;
  float* scratch;  // of the coarse kernel

  // Kernels may read whole tiles of pairs of channels.
  static int64_t radii_size(const Convolution& conv) {
    if (!conv.call.coarse_radius) return 0;
    const int64_t planes = pairs_of(conv.images.channels) + kCoarsePairs - 1;
    return whole_lines(planes * conv.height * conv.row_size);
  }

  static int64_t size(const Convolution& conv, int64_t step) {
    const int64_t image = whole_lines(conv.image_size());
    return 2 * image + line_size(conv) + kGroupsOfPass * step * 2 * kPanelWidth + radii_size(conv) +
           (conv.call.coarse_radius ? coarse_scratch() : 0);
  }

  DirectBuffers(const Convolution& conv, int64_t step, float* memory) {
    const int64_t size = whole_lines(conv.image_size());
    image = {memory, memory + size, memory + 2 * size};
    std::fill(memory, image.lines, 0.0f);  // the padding; images of one size keep it
    sums = image.lines + line_size(conv);
    float* after = sums + kGroupsOfPass * step * 2 * kPanelWidth;
    scratch = after + radii_size(conv);
    std::fill(after, scratch, 0.0f);
    radii = reinterpret_cast<uint32_t*>(after);
  }
};

// Sixteen neighbouring pixels of an output row; the last of a row moves back to end with it.
struct PixelGroup {
  int64_t image, row, column;

  PixelGroup(const Convolution& conv, int64_t index) {
    const int64_t of_row = blocks(conv.window.out_width, kPixels);
    const int64_t line = index / of_row;
    image = line / conv.window.out_height;
    row = line % conv.window.out_height;
    column = std::min(index % of_row * kPixels, conv.window.out_width - kPixels);
  }
};

// Rows [n, n + count) of W against groups [first, last), all of one image.
void multiply_groups(const Convolution& conv, const Places& places, int64_t n, int64_t count,
                     int64_t first, int64_t last, const DirectBuffers& own) {
  const int64_t terms = conv.call.weight.terms, sum_stride = count * kPanelWidth;
  const int64_t plane = conv.height * conv.row_size;
  const int64_t channels = n / conv.rows * conv.channels * plane;
  for (int64_t from = first; from < last; from += kGroupsAtOnce) {
    const int64_t groups = std::min(kGroupsAtOnce, last - from);
    Direct work{own.image.centre,
                own.image.radius,
                {},
                groups,
                places.pixels.data(),
                places.weight + n * terms,
                count,
                terms,
                own.sums + 2 * (from - first) * sum_stride,
                sum_stride};
    int64_t radii[kGroupsAtOnce] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const PixelGroup at(conv, from + g);
      const int64_t base = at.row * conv.window.stride_height * conv.row_size + at.column;
      work.bases[g] = channels + base;
      radii[g] = channels / 2 + base;
    }
    if (conv.call.coarse_radius) {
      conv.table.coarse_direct({work,
                                own.radii,
                                {radii[0], radii[1]},
                                places.radii.data(),
                                plane,
                                places.taps,
                                places.weights.data(),
                                places.sizes.data() + n * places.size_stride,
                                places.size_stride,
                                own.scratch});
    } else {
      conv.table.direct(work);
    }
  }
}

// Their ends; whole groups of a channel are neighbours in memory.
void finish_groups(const Convolution& conv, const LateSteps& late, int64_t n, int64_t count,
                   int64_t first, int64_t last, float offset, const DirectBuffers& own) {
  const int64_t sum_stride = count * kPanelWidth;
  float offsets[kLanes];
  std::fill(offsets, offsets + kLanes, offset);
  const bool whole = conv.window.out_width % kPixels == 0;
  const bool streams = past_cache(output_bytes(conv.call, conv.images, conv.window));
  for (int64_t from = first, groups; from < last; from += groups) {
    groups = whole ? last - from : 1;
    const PixelGroup at(conv, from);
    const int64_t to = (at.image * conv.call.weight.rows + n) * conv.pixels +
                       at.row * conv.window.out_width + at.column;
    const float* sums = own.sums + 2 * (from - first) * sum_stride;
    late.write({n, count, groups * kPixels, to, conv.pixels, streams},
               [&](int64_t row, int64_t rows, const EndsBlock& ends) {
                 return conv.table.finish_panel(
                     {sums + row * kPanelWidth, shifted(conv.call.bias, n + row), offsets, rows,
                      groups * kPixels, ends.row_stride, 1, sum_stride, ends.lower, ends.upper,
                      ends.past_cache},
                     conv.constants);
               });
  }
}

void convolve_directly(Convolution& conv, int num_threads) {
  conv.prepared = constants_by_channel(conv);
  const Places places = places_of(conv);
  const LateSteps late(conv.call, conv.table);
  const Shares shares(conv.images.batch * conv.window.out_height, 1, work_of(conv), num_threads);
  const int64_t of_row = blocks(conv.window.out_width, kPixels);
  const int64_t of_image = of_row * conv.window.out_height;
  const int64_t step = rows_of_pass(conv), size = DirectBuffers::size(conv, step);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    const DirectBuffers own(conv, step, memory.get() + share * size);
    int64_t prepared = -1;
    float offset = 0.0f;
    for (int64_t first = begin * of_row, last; first < end * of_row; first = last) {
      const int64_t image = first / of_image;
      last = std::min({first + kGroupsOfPass, (image + 1) * of_image, end * of_row});
      if (image != prepared) {
        offset = prepare_image(conv, image, own.image);
        if (conv.call.coarse_radius) {
          conv.table.pair_channels(own.image.radius, conv.images.channels,
                                   conv.height * conv.row_size, own.radii);
        }
        prepared = image;
      }
      for (int64_t group = 0; group < conv.window.groups; ++group) {
        for (int64_t n = group * conv.rows; n < (group + 1) * conv.rows; n += step) {
          const int64_t count = std::min(step, (group + 1) * conv.rows - n);
          multiply_groups(conv, places, n, count, first, last, own);
          finish_groups(conv, late, n, count, first, last, offset, own);
        }
      }
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
