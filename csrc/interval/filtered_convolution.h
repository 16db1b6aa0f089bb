// The convolution by minimal filtering: image by image, all rows become tiles, and blocks of tiles
// meet the filters of W. Included by convolution.cpp alone; see filtering.h.
#pragma once

#include <cstring>
#include <vector>

#include "interval/convolution_plan.h"
#include "interval/epilogue.h"
#include "interval/tiled_filters.h"

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
  const int64_t stride = window.stride_width, multiple = stride == 1 ? 2 : 8;
  if (window.stride_height != stride || stride > 2) return false;
  if (window.dilation_height != 1 || window.dilation_width != 1) return false;
  const int64_t pixels = window.out_height * window.out_width;
  return window.out_width % multiple == 0 && pixels >= 2 * kLeastTiles &&
         std::min(images.channels, call.weight.rows) >= kLeastChannels &&
         images.batch * pixels >= kLeastPixels;
}

struct Filtering {
  const Call& call;
  const Images& images;
  const Window& window;
  const IntervalKernels& table;
  Constants constants;               // without the centre's own error
  std::vector<float> centre_errors;  // (channels), which join radii in tiles
  float radius_error;
  int64_t terms;   // of each product
  int64_t tiles;   // of a row
  int64_t height;  // rows of tiles of a channel, with padding
  int64_t line;    // floats of a line
  bool quads;      // whether radii have tiles of four outputs
  bool strided;    // whether the stride is 2
  bool tiled;      // whether radii are not filtered

  // The tiles of an image for centres or radii.
  struct Planes {
    int64_t filters;
    int64_t outputs;  // of a tile
    int64_t size;     // floats for one product
    std::vector<int64_t> places;
  } centres, radii;
  Floats decoded, filters;  // of centres, then of radii
  RadiusPlanes plain;       // of radii that are not filtered

  // Floats of a channel's rows of tiles. With stride 2 the even rows are neighbours and so are the
  // odd ones; what is written behind either must not reach the other.
  int64_t channel_size(const Planes& planes) const {
    const int64_t of_row = window.out_width / planes.outputs;
    return strided ? 2 * (blocks(height, 2) * of_row + kTileGroup) : height * of_row;
  }
  int64_t place(const Planes& planes, int64_t channel, int64_t row) const {
    const int64_t of_row = window.out_width / planes.outputs, size = channel_size(planes);
    if (!strided) return channel * size + row * of_row;
    return channel * size + row % 2 * (size / 2) + row / 2 * of_row;
  }

  int64_t weight_plane() const { return call.weight.rows * terms; }
  int64_t block_pixels() const { return kBlockTiles * radii.outputs; }
  int64_t step() const {
    const int64_t rows = call.weight.rows;
    return blocks(rows, blocks(rows, kRowsOfFilterPass));
  }
};

Filtering::Planes planes_of(const Filtering& plan, int64_t filters, int64_t outputs) {
  Filtering::Planes out{filters, outputs, 0, {}};
  out.size = whole_lines(plan.images.channels * plan.channel_size(out) + 16) + 16;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    for (int64_t y = 0; y < kWindowRows; ++y) out.places.push_back(plan.place(out, channel, y));
  }
  return out;
}

// Roundings that the terms of a channel, one of every row of the window, pass at most.
int64_t roundings_of(const Filtering& plan, int64_t channel) {
  const int64_t first = channel * kWindowRows, last = first + kWindowRows;
  const int64_t runs = blocks(plan.terms, kFilterRun);
  int64_t most = 0;
  for (int64_t k = first; k < last; k = (k / kFilterRun + 1) * kFilterRun) {
    const int64_t end = std::min((k / kFilterRun + 1) * kFilterRun, plan.terms);
    most = std::max(most, end - k + additions_after(k / kFilterRun, runs));
  }
  return most + kPairRoundings;
}

Filtering plan_filters(const Call& call, const Images& images, const Window& window,
                       const IntervalKernels& table) {
  Filtering out{call, images, window, table, {}, {}, 0.0f, 0,  0, 0,
                0,    false,  false,  false, {}, {}, {},   {}, {}};
  out.terms = images.channels * kWindowRows;
  out.tiles = window.out_width / 2;
  const int64_t stride = window.stride_width;
  out.height = (window.out_height - 1) * stride + kWindowRows;
  const int64_t width =
      std::max(window.pad_left + images.width, (window.out_width - 1) * stride + 3);
  out.line = whole_lines(kLineMargin + width + kLineEnd);
  out.strided = stride == 2;
  out.tiled = call.coarse_radius;
  out.quads = !out.tiled && !out.strided && window.out_width % 16 == 0;
  out.centres = planes_of(out, out.strided ? kStridedFilters : kFilters, 2);
  out.radii = out.quads ? planes_of(out, kQuadFilters, 4) : out.centres;
  if (out.tiled) out.plain = radius_planes(images, window, out.height);
  const auto gamma_of = [](int64_t roundings) {
    return rounding::gamma_bound(static_cast<double>(roundings));
  };
  out.centre_errors.assign(static_cast<size_t>(images.channels), 0.0f);
  out.constants = constants_for(call, call.weight.terms, 0.0);
  if (out.constants.outward) {
    // 1 + 2^-20 covers the roundings of the sums that these are multiplied with
    constexpr double kRoundings = 1.0 + 1.0 / 1048576.0;
    const double own = gamma_of(filter_depth(out.terms, out.quads));
    const double late = 1.0 + static_cast<double>(out.constants.value_gain);  // 1 + H
    for (int64_t channel = 0; channel < images.channels; ++channel) {
      const double of_centre = gamma_of(roundings_of(out, channel));
      out.centre_errors[static_cast<size_t>(channel)] =
          rounding::to_float_up(of_centre * late * kRoundings);
    }
    out.radius_error = rounding::to_float_up(own / (1.0 - 256.0 * own) * kRoundings);
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
  if (plan.tiled) set_sizes(weight, data, plan.table, &plan.plain);
  const int64_t plane = plan.weight_plane();
  plan.filters = floats((plan.centres.filters + plan.radii.filters) * plane);
  float *filters = plan.filters.get(), *of_radii = filters + plan.centres.filters * plane;
  const Shares shares(weight.rows, 1, static_cast<double>(4 * plane), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    const int64_t at = begin * plan.terms;
    plan.table.filter.weights({data + 3 * at, (end - begin) * plan.terms, plan.quads, plan.strided,
                               filters + at, plan.tiled ? nullptr : of_radii + at, plane});
  });
}

// The buffers of one thread.
struct FilterBuffers {
  float *lines[2], *centre, *radius, *centre_sums, *radius_sums;
  uint32_t* words;  // of radii that are not filtered, in place of `radius`

  static int64_t tiles_size(const Filtering::Planes& planes) {
    return planes.filters * planes.size + kBlockTiles;  // a block may look beyond the last tile
  }
  static int64_t sums_size(const Filtering& plan, const Filtering::Planes& planes) {
    return plan.step() * planes.filters * plan.block_pixels() / planes.outputs;
  }

  static int64_t radii_size(const Filtering& plan) {
    return plan.tiled ? plan.plain.words() : tiles_size(plan.radii);
  }
  static int64_t radius_sums_size(const Filtering& plan) {
    return plan.tiled ? coarse_rows(plan.step()) * kTiledPixels : sums_size(plan, plan.radii);
  }

  static int64_t size(const Filtering& plan) {
    return 2 * kRowsAtOnce * plan.line + tiles_size(plan.centres) + radii_size(plan) +
           sums_size(plan, plan.centres) + radius_sums_size(plan);
  }

  FilterBuffers(const Filtering& plan, float* memory) {
    for (float*& line : lines) {
      line = memory + kLineMargin;
      memory += kRowsAtOnce * plan.line;
    }
    centre = memory;
    radius = centre + tiles_size(plan.centres);
    words = reinterpret_cast<uint32_t*>(radius);
    centre_sums = radius + radii_size(plan);
    radius_sums = centre_sums + sums_size(plan, plan.centres);
    // zeros beside lines, which rows of one width keep, behind tiles and around images of words
    std::fill(lines[0] - kLineMargin, centre_sums, 0.0f);
  }
};

// Rows [row, row + rows) of a channel that lie outside of the image.
void clear_rows(const Filtering& plan, const Filtering::Planes& planes, int64_t channel,
                int64_t row, int64_t rows, float* tiles) {
  const auto bytes = static_cast<size_t>(plan.window.out_width / planes.outputs) * sizeof(float);
  for (int64_t i = 0; i < planes.filters; ++i) {
    for (int64_t y = row; y < row + rows; ++y) {
      std::memset(tiles + i * planes.size + plan.place(planes, channel, y), 0, bytes);
    }
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
  const int64_t step = plan.window.stride_height;  // rows that are neighbours as tiles
  for (int64_t y = 0; y < std::min(step, rows); ++y) {
    const int64_t to = plan.window.pad_top + row + y, line = y * plan.line;
    plan.table.filter.tiles(
        {blocks(rows - y, step), step * plan.line, own.lines[0] + line, own.lines[1] + line,
         plan.tiles, plan.quads, plan.strided, plan.centre_errors[static_cast<size_t>(channel)],
         plan.radius_error, plan.constants.input_floor,
         own.centre + plan.place(plan.centres, channel, to), plan.centres.size,
         plan.tiled ? nullptr : own.radius + plan.place(plan.radii, channel, to), plan.radii.size});
  }
  if (plan.tiled) {
    plan.table.tiled_filter.radii(
        {rows, plan.line, own.lines[0], own.lines[1], plan.strided, channel % 2 == 1,
         plan.centre_errors[static_cast<size_t>(channel)], plan.constants.input_floor,
         own.words + channel / 2 * plan.plain.plane +
             (plan.window.pad_top + row) * plan.plain.row_size,
         plan.plain.row_size});
  }
  return largest;
}

// All rows of an image as tiles, in the order of memory, as each is written in whole registers.
// Returns the absolute term of the image.
float make_tiles(const Filtering& plan, int64_t image, const FilterBuffers& own) {
  const int64_t top = plan.window.pad_top;
  const int64_t seen = std::min(plan.images.height, plan.height - top);  // rows of the image
  float largest = 0.0f;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    const auto clear = [&](int64_t row, int64_t rows) {
      clear_rows(plan, plan.centres, channel, row, rows, own.centre);
      if (!plan.tiled) clear_rows(plan, plan.radii, channel, row, rows, own.radius);
    };
    clear(0, top);
    for (int64_t row = 0; row < seen; row += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, seen - row);
      largest = std::max(largest, tiles_of_rows(plan, image, channel, row, rows, own));
    }
    clear(top + seen, plan.height - top - seen);
  }
  return offset_for(plan.call, largest);
}

// The sums of pixels [first, first + count) for rows [n, n + rows) of W, whose filters are given.
void multiply_tiles(const Filtering& plan, const Filtering::Planes& planes, const float* tiles,
                    const float* filters, int64_t rows, int64_t first, int64_t count, float* sums) {
  const int64_t stride = plan.block_pixels() / planes.outputs;
  const int64_t groups = blocks(blocks(count, planes.outputs), kTileGroup);
  for (int64_t group = 0; group < groups; group += kGroupsOfBlock) {
    const int64_t at = group * kTileGroup;
    plan.table.filter.product({planes.filters, tiles + first / planes.outputs + at, planes.size,
                               planes.places.data(), filters, plan.weight_plane(), rows, plan.terms,
                               std::min(kGroupsOfBlock, groups - group), sums + at, stride});
  }
}

// The ends of a block of pixels from `first` on, of rows [n, n + rows) of W.
void filter_block(const Filtering& plan, const LateSteps& late, int64_t image, int64_t first,
                  int64_t n, int64_t rows, float offset, const FilterBuffers& own) {
  const float* filters = plan.filters.get() + n * plan.terms;
  const int64_t pixels = plan.window.out_height * plan.window.out_width;
  const int64_t count = std::min(plan.block_pixels(), pixels - first);
  multiply_tiles(plan, plan.centres, own.centre, filters, rows, first, count, own.centre_sums);
  if (plan.tiled) {
    multiply_radii(plan.plain, plan.window, plan.table, own.words, n, rows, first, count,
                   own.radius_sums);
  } else {
    multiply_tiles(plan, plan.radii, own.radius,
                   filters + plan.centres.filters * plan.weight_plane(), rows, first, count,
                   own.radius_sums);
  }
  const int64_t to = (image * plan.call.weight.rows + n) * pixels + first;
  const bool streams = past_cache(output_bytes(plan.call, plan.images, plan.window));
  late.write({n, rows, count, to, pixels, streams},
             [&](int64_t row, int64_t asked, const EndsBlock& ends) {
               return plan.table.filter.ends(
                   {plan.quads, plan.strided, plan.tiled, own.centre_sums, own.radius_sums,
                    shifted(plan.call.bias, n + row), offset, rows, row, asked, count,
                    ends.row_stride, ends.lower, ends.upper, ends.past_cache},
                   plan.constants);
             });
}

void convolve_by_filters(const Call& call, const Images& images, const Window& window,
                         const IntervalKernels& table, int num_threads) {
  Filtering plan = plan_filters(call, images, window, table);
  make_filters(plan, num_threads);
  const LateSteps late(call, table);
  const int64_t pixels = window.out_height * window.out_width, step = plan.step();
  const double work = static_cast<double>(images.batch * pixels) *
                      static_cast<double>(2 * kFilters * plan.weight_plane()) / 8;
  const Shares shares(images.batch, 1, work, num_threads);
  const int64_t size = FilterBuffers::size(plan);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    const FilterBuffers own(plan, memory.get() + share * size);
    for (int64_t image = begin; image < end; ++image) {
      const float offset = make_tiles(plan, image, own);
      for (int64_t first = 0; first < pixels; first += plan.block_pixels()) {
        for (int64_t n = 0; n < call.weight.rows; n += step) {
          filter_block(plan, late, image, first, n, std::min(step, call.weight.rows - n), offset,
                       own);
        }
      }
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
