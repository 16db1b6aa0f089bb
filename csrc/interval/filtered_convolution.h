// The convolution by minimal filtering: image by image, all rows become tiles, and blocks of tiles
// meet the filters of W. Included by convolution.cpp alone; see filtering.h.
#pragma once

#include <cstring>
#include <vector>

#include "interval/convolution_plan.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr int64_t kWindowRows = 3;
constexpr int64_t kRowsOfFilterPass = 48;  // whose sums stay in a second-level cache

// Where it pays: enough channels and pixels to make up for the tiles and the filters.
bool filters_apply(const Call& call, const Images& images, const Window& window,
                   const IntervalKernels& table) {
  constexpr int64_t kLeastChannels = 16, kLeastTiles = 32, kLeastPixels = 2048;
  if (table.filter.product == nullptr || call.int8 || window.groups != 1) return false;
  if (window.kernel_height != kWindowRows || window.kernel_width != 3) return false;
  if (window.stride_height != 1 || window.stride_width != 1) return false;
  if (window.dilation_height != 1 || window.dilation_width != 1) return false;
  const int64_t pixels = window.out_height * window.out_width;
  return window.out_width % 2 == 0 && pixels >= 2 * kLeastTiles &&
         std::min(images.channels, call.weight.rows) >= kLeastChannels &&
         images.batch * pixels >= kLeastPixels;
}

struct Filtering {
  const Call& call;
  const Images& images;
  const Window& window;
  const IntervalKernels& table;
  Constants constants;  // without the centre's own error
  float centre_error, radius_error;
  int64_t terms;   // of each product
  int64_t tiles;   // of a row
  int64_t height;  // rows of tiles of a channel, with padding
  int64_t plane;   // floats of the tiles of an image for one product
  int64_t line;    // floats of a line
  std::vector<int64_t> places;
  Floats decoded, filters;  // of centres, then of radii

  int64_t weight_plane() const { return call.weight.rows * terms; }
  int64_t step() const {
    const int64_t rows = call.weight.rows;
    return blocks(rows, blocks(rows, kRowsOfFilterPass));
  }
};

Filtering plan_filters(const Call& call, const Images& images, const Window& window,
                       const IntervalKernels& table) {
  Filtering out{call, images, window, table, {}, 0.0f, 0.0f, 0, 0, 0, 0, 0, {}, {}, {}};
  out.terms = images.channels * kWindowRows;
  out.tiles = window.out_width / 2;
  out.height = window.out_height + kWindowRows - 1;
  out.plane = whole_lines(images.channels * out.height * out.tiles + 16) + 16;
  const int64_t width = std::max(window.pad_left + images.width, window.out_width + 2);
  out.line = whole_lines(kLineMargin + width + kLineEnd);
  const double gain = rounding::gamma_bound(static_cast<double>(filter_depth(out.terms)));
  out.constants = constants_for(call, call.weight.terms, 0.0);
  if (out.constants.outward) {
    out.centre_error =
        rounding::to_float_up(gain * (1.0 + static_cast<double>(out.constants.value_gain)));
    out.radius_error = rounding::to_float_up(4.0 * gain / (1.0 - 4.0 * gain));
  }
  for (int64_t channel = 0; channel < images.channels; ++channel) {
    for (int64_t y = 0; y < kWindowRows; ++y) {
      out.places.push_back((channel * out.height + y) * out.tiles);
    }
  }
  return out;
}

void make_filters(Filtering& plan, int num_threads) {
  const Weight& weight = plan.call.weight;
  const float* data = weight.data;
  if (weight.packed != nullptr) {
    plan.decoded = floats(weight.rows * weight.terms);
    data = rows_of(weight, 0, weight.rows, plan.decoded.get());
  }
  const int64_t plane = plan.weight_plane();
  plan.filters = floats(2 * kFilters * plane);
  float* filters = plan.filters.get();
  const Shares shares(weight.rows, 1, static_cast<double>(4 * plane), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    const int64_t at = begin * plan.terms;
    plan.table.filter.weights({data + 3 * at, (end - begin) * plan.terms, filters + at,
                               filters + kFilters * plane + at, plane});
  });
}

// The buffers of one thread.
struct FilterBuffers {
  float *lines[2], *centre, *radius, *centre_sums, *radius_sums;

  static int64_t size(const Filtering& plan) {
    return 2 * kRowsAtOnce * plan.line + 2 * (kFilters * plan.plane + kBlockTiles) +
           plan.step() * 2 * kFilters * kBlockTiles;
  }

  FilterBuffers(const Filtering& plan, float* memory) {
    for (float*& line : lines) {
      line = memory + kLineMargin;
      memory += kRowsAtOnce * plan.line;
    }
    centre = memory;
    radius = centre + kFilters * plan.plane + kBlockTiles;
    centre_sums = radius + kFilters * plan.plane + kBlockTiles;
    radius_sums = centre_sums + plan.step() * kFilters * kBlockTiles;
    // zeros beside lines, which rows of one width keep, and behind tiles
    std::fill(lines[0] - kLineMargin, centre_sums, 0.0f);
  }
};

void clear_tiles(const Filtering& plan, int64_t at, int64_t rows, const FilterBuffers& own) {
  const auto size = static_cast<size_t>(rows * plan.tiles) * sizeof(float);
  for (int64_t i = 0; i < kFilters; ++i) {
    std::memset(own.centre + i * plan.plane + at, 0, size);
    std::memset(own.radius + i * plan.plane + at, 0, size);
  }
}

// `rows` rows of the image, the first of which is `row` of `channel`; returns the largest |x|.
float tiles_of_rows(const Filtering& plan, int64_t image, int64_t channel, int64_t row,
                    int64_t rows, const FilterBuffers& own) {
  const Images& images = plan.images;
  float largest = 0.0f;
  for (int64_t y = 0; y < rows; ++y) {
    const int64_t from =
        ((image * images.channels + channel) * images.height + row + y) * images.width;
    const Ends ends{plan.call.lower + from, plan.call.upper + from, images.width,
                    plan.call.floor()};
    const int64_t to = y * plan.line + plan.window.pad_left;
    largest = std::max(
        largest, plan.table.prepare(ends, plan.constants, own.lines[0] + to, own.lines[1] + to));
  }
  const int64_t at = (channel * plan.height + plan.window.pad_top + row) * plan.tiles;
  plan.table.filter.tiles({rows, plan.line, own.lines[0], own.lines[1], plan.tiles,
                           plan.centre_error, plan.radius_error, plan.constants.input_floor,
                           own.centre + at, own.radius + at, plan.plane});
  return largest;
}

// All rows of an image as tiles, in the order of memory, as each is written in whole registers.
// Returns the absolute term of the image.
float make_tiles(const Filtering& plan, int64_t image, const FilterBuffers& own) {
  const int64_t top = plan.window.pad_top;
  const int64_t seen = std::min(plan.images.height, plan.height - top);  // rows of the image
  float largest = 0.0f;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    const int64_t at = channel * plan.height * plan.tiles;
    clear_tiles(plan, at, top, own);
    for (int64_t row = 0; row < seen; row += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, seen - row);
      largest = std::max(largest, tiles_of_rows(plan, image, channel, row, rows, own));
    }
    clear_tiles(plan, at + (top + seen) * plan.tiles, plan.height - top - seen, own);
  }
  return offset_for(plan.call, largest);
}

// The ends of `groups` groups of tiles from the one at `first` on, of rows [n, n + count) of W.
void filter_block(const Filtering& plan, int64_t image, int64_t first, int64_t groups, int64_t n,
                  int64_t count, float offset, const FilterBuffers& own) {
  const int64_t plane = plan.weight_plane();
  const float* filters = plan.filters.get() + n * plan.terms;
  plan.table.filter.product({own.centre + first, plan.plane, plan.places.data(), filters, plane,
                             count, plan.terms, groups, own.centre_sums});
  plan.table.filter.product({own.radius + first, plan.plane, plan.places.data(),
                             filters + kFilters * plane, plane, count, plan.terms, groups,
                             own.radius_sums});
  const int64_t pixels = plan.window.out_height * plan.window.out_width;
  const int64_t to = (image * plan.call.weight.rows + n) * pixels + 2 * first;
  plan.call.report(
      plan.table.filter.ends({own.centre_sums, own.radius_sums, shifted(plan.call.bias, n), offset,
                              count, std::min(2 * kBlockTiles, pixels - 2 * first), pixels,
                              plan.call.out_lower + to, plan.call.out_upper + to},
                             plan.constants));
}

void convolve_by_filters(const Call& call, const Images& images, const Window& window,
                         const IntervalKernels& table, int num_threads) {
  Filtering plan = plan_filters(call, images, window, table);
  make_filters(plan, num_threads);
  const int64_t tiles = plan.tiles * window.out_height, step = plan.step();
  const double work = static_cast<double>(images.batch * tiles) *
                      static_cast<double>(kFilters * plan.weight_plane()) / 8;
  const Shares shares(images.batch, 1, work, num_threads);
  const int64_t size = FilterBuffers::size(plan);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    const FilterBuffers own(plan, memory.get() + share * size);
    for (int64_t image = begin; image < end; ++image) {
      const float offset = make_tiles(plan, image, own);
      for (int64_t first = 0; first < tiles; first += kBlockTiles) {
        const int64_t groups = blocks(std::min(kBlockTiles, tiles - first), kTileGroup);
        for (int64_t n = 0; n < call.weight.rows; n += step) {
          filter_block(plan, image, first, groups, n, std::min(step, call.weight.rows - n), offset,
                       own);
        }
      }
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
