// The convolution by minimal filtering along rows and columns: a band of output rows at a time
// becomes tiles, so that they and their sums stay in a second-level cache. Included by
// convolution.cpp alone; see filtering.h.
#pragma once

#include <algorithm>
#include <vector>

#include "interval/convolution_plan.h"
#include "interval/epilogue.h"
#include "interval/filtered_convolution.h"

namespace pyrobust {
namespace interval {
namespace {

// Rows as whole parts, of which a band has at least a pair of rows, and bands for all threads:
// fewer pixels are shared by threads as rows of tiles. Radii in bfloat16 are not filtered.
bool squares_apply(const Call& call, const Images& images, const Window& window,
                   const IntervalKernels& table) {
  constexpr int64_t kLeastPixels = 2048;
  return table.filter.squares.tiles != nullptr && !call.coarse_radius &&
         window.out_height % 2 == 0 && window.out_width % kPartPixels == 0 &&
         window.out_width <= kPartPixels * kSquareParts &&
         images.batch * window.out_height * window.out_width >= kLeastPixels;
}

struct Squares {
  const Call& call;
  const Images& images;
  const Window& window;
  const IntervalKernels& table;
  bool strided;
  int64_t of_row;                    // parts of a row
  int64_t tall;                      // tiles down a band
  int64_t bands;                     // of an image
  int64_t lines, line;               // of a band, and floats of a line
  Constants constants;               // without the centre's own error; a band may have its own
  std::vector<float> centre_errors;  // (channels), which join radii in tiles
  float radius_error;
  Floats decoded, filters;  // of centres, then of radii

  // The tiles of a band for centres or radii.
  struct Planes {
    int64_t filters;
    int64_t tiles;    // of kSquareParts
    int64_t channel;  // floats of a channel for one product
    int64_t size;     // and of all
    std::vector<int64_t> places;

    int64_t floats() const { return filters * size; }
  } centres, radii;

  int64_t weight_plane() const { return call.weight.rows * images.channels; }
  int64_t pixels() const { return window.out_height * window.out_width; }
  int64_t step() const {
    return blocks(call.weight.rows, blocks(call.weight.rows, kRowsOfFilterPass));
  }
  int64_t sums(const Planes& planes) const { return planes.filters * step() * planes.tiles; }
};

Squares::Planes square_planes(const Squares& plan, int64_t filters, int64_t tiles_of_part) {
  Squares::Planes out{filters, kSquareParts * tiles_of_part, 0, 0, {}};
  out.channel = whole_lines(plan.of_row * plan.tall * tiles_of_part);
  // off by a line: planes a multiple of 4096 bytes apart would share cache sets
  out.size = plan.images.channels * out.channel + kTileGroup;
  for (int64_t c = 0; c < plan.images.channels; ++c) out.places.push_back(c * out.channel);
  return out;
}

// What radii grow with.
void set_errors(Squares& plan) {
  const int64_t channels = plan.images.channels, runs = blocks(channels, kSquareRun);
  plan.constants = constants_for(plan.call, plan.call.weight.terms, 0.0);
  plan.centre_errors.assign(static_cast<size_t>(channels), 0.0f);
  if (!plan.constants.outward) return;
  // 1 + 2^-20 covers the roundings of the sums that these are multiplied with
  constexpr double kRoundings = 1.0 + 1.0 / 1048576.0;
  const auto gamma_of = [](int64_t roundings) {
    return rounding::gamma_bound(static_cast<double>(roundings));
  };
  const double late = 1.0 + static_cast<double>(plan.constants.value_gain);  // 1 + H
  for (int64_t channel = 0; channel < channels; ++channel) {
    const int64_t run = channel / kSquareRun;
    const int64_t in_run = std::min((run + 1) * kSquareRun, channels) - channel;
    const double own = gamma_of(in_run + additions_after(run, runs) + 2 * kPairRoundings);
    plan.centre_errors[static_cast<size_t>(channel)] =
        rounding::to_float_up(own * late * kRoundings);
  }
  const int64_t along_rows = plan.strided ? kPairRoundings : kQuadRoundings;
  const double own = gamma_of(kSquareRun + runs + along_rows + kPairRoundings);
  plan.radius_error = rounding::to_float_up(own / (1.0 - kSquareGrowth * own) * kRoundings);
}

Squares plan_squares(const Call& call, const Images& images, const Window& window,
                     const IntervalKernels& table) {
  const int64_t stride = window.stride_width;
  Squares out{call, images, window, table, stride == 2, window.out_width / kPartPixels,
              0,    0,      0,      0,     {},          {},
              0.0f, {},     {},     {},    {}};
  out.tall = std::min(kSquareParts / out.of_row, window.out_height / 2);
  out.bands = blocks(window.out_height / 2, out.tall);
  out.lines = (2 * out.tall - 1) * stride + kWindowRows;
  const int64_t width =
      std::max(window.pad_left + images.width, (window.out_width - 1) * stride + 3);
  out.line = whole_lines(kLineMargin + width + kLineEnd);
  const int64_t down = out.strided ? kStridedFilters : kFilters;
  out.centres = square_planes(out, down * down, kPartPixels / 2);
  out.radii = out.strided ? out.centres : square_planes(out, down * kQuadFilters, kPartPixels / 4);
  set_errors(out);
  return out;
}

void make_filters(Squares& plan, int num_threads) {
  const Weight& weight = plan.call.weight;
  const float* data = weight.data;
  if (weight.packed != nullptr) {
    plan.decoded = floats(weight.rows * weight.terms);
    data = rows_of(weight, 0, weight.rows, plan.decoded.get());
  }
  const int64_t channels = plan.images.channels, plane = plan.weight_plane();
  plan.filters = floats((plan.centres.filters + plan.radii.filters) * plane);
  float *filters = plan.filters.get(), *of_radii = filters + plan.centres.filters * plane;
  const Shares shares(weight.rows, 1, static_cast<double>(4 * plane), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    const int64_t at = begin * channels;
    plan.table.filter.squares.weights({data + 9 * at, (end - begin) * channels, !plan.strided,
                                       plan.strided, filters + at, of_radii + at, plane});
  });
}

// The buffers of one thread.
struct SquareBuffers {
  float *lines[2], *centre, *radius, *centre_sums, *radius_sums;

  static int64_t size(const Squares& plan) {
    return 2 * plan.lines * plan.line + plan.centres.floats() + plan.radii.floats() +
           plan.sums(plan.centres) + plan.sums(plan.radii);
  }

  SquareBuffers(const Squares& plan, float* memory) {
    for (float*& line : lines) {
      line = memory + kLineMargin;
      memory += plan.lines * plan.line;
    }
    centre = memory;
    radius = centre + plan.centres.floats();
    centre_sums = radius + plan.radii.floats();
    radius_sums = centre_sums + plan.sums(plan.centres);
    // zeros beside lines, which all of one width keep, and tiles that no part has
    std::fill(lines[0] - kLineMargin, centre_sums, 0.0f);
  }
};

// A band of the outputs of an image: pairs of rows from `first` on.
struct Band {
  int64_t image, first, tall;
  int64_t top;  // of its lines in the image
  Constants constants;

  Band(const Squares& plan, int64_t index);
};

Ends ends_of_line(const Squares& plan, const Band& band, int64_t channel, int64_t y) {
  const Images& images = plan.images;
  const int64_t row = (band.image * images.channels + channel) * images.height + band.top + y;
  return {plan.call.lower + row * images.width, plan.call.upper + row * images.width, images.width,
          plan.call.floor()};
}

bool in_image(const Squares& plan, const Band& band, int64_t y) {
  return band.top + y >= 0 && band.top + y < plan.images.height;
}

// For each pixel of the lines the channels that may be other than zero, as nonzero_terms counts.
std::vector<int32_t> nonzero_channels(const Squares& plan, const Band& band) {
  const int64_t width = plan.images.width;
  std::vector<int32_t> out(static_cast<size_t>(plan.lines * width), 0);
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    for (int64_t y = 0; y < plan.lines; ++y) {
      if (!in_image(plan, band, y)) continue;
      plan.table.filter.squares.count(ends_of_line(plan, band, channel, y), out.data() + y * width);
    }
  }
  return out;
}

// The most terms of an output of the band that may be other than zero.
int64_t nonzero_terms(const Squares& plan, const Band& band) {
  const std::vector<int32_t> channels = nonzero_channels(plan, band);
  const int64_t width = plan.images.width, stride = plan.window.stride_width;
  int64_t most = 0;
  for (int64_t row = 0; row < 2 * band.tall; ++row) {
    for (int64_t column = 0; column < plan.window.out_width; ++column) {
      const int64_t left = column * stride - plan.window.pad_left;
      int64_t count = 0;
      for (int64_t y = row * stride; y < row * stride + kWindowRows; ++y) {
        for (int64_t x = std::max<int64_t>(left, 0); x < std::min(left + 3, width); ++x) {
          count += channels[static_cast<size_t>(y * width + x)];
        }
      }
      most = std::max(most, count);
    }
  }
  return most;
}

Band::Band(const Squares& plan, int64_t index)
    : image(index / plan.bands),
      first(index % plan.bands * plan.tall),
      tall(std::min(plan.tall, plan.window.out_height / 2 - first)),
      top(2 * first * plan.window.stride_height - plan.window.pad_top),
      constants(plan.constants) {
  if (plan.call.rounding != Rounding::kDeployed) return;
  constants = constants_for(plan.call, nonzero_terms(plan, *this), 0.0);
}

// Lines of a channel that the band meets; returns the largest |x|.
float set_lines(const Squares& plan, const Band& band, int64_t channel, const SquareBuffers& own) {
  float largest = 0.0f;
  for (int64_t y = 0; y < plan.lines; ++y) {
    const int64_t to = y * plan.line + plan.window.pad_left;
    if (in_image(plan, band, y)) {
      const Ends ends = ends_of_line(plan, band, channel, y);
      largest = std::max(
          largest, plan.table.prepare(ends, band.constants, own.lines[0] + to, own.lines[1] + to));
      continue;
    }
    for (float* lines : own.lines) std::fill_n(lines + to, plan.images.width, 0.0f);
  }
  return largest;
}

// All channels as tiles; returns the absolute term of the band.
float make_tiles(const Squares& plan, const Band& band, const SquareBuffers& own) {
  float largest = 0.0f;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    largest = std::max(largest, set_lines(plan, band, channel, own));
    plan.table.filter.squares.tiles(
        {band.tall * plan.of_row, plan.of_row, plan.line, own.lines[0], own.lines[1], plan.strided,
         plan.centre_errors[static_cast<size_t>(channel)], plan.radius_error,
         band.constants.input_floor, own.centre + channel * plan.centres.channel, plan.centres.size,
         own.radius + channel * plan.radii.channel, plan.radii.size});
  }
  return offset_for(plan.call, largest);
}

// Sums of all parts for some rows of W, whose filters are given.
void multiply_squares(const Squares& plan, const Squares::Planes& planes, const float* tiles,
                      const float* filters, int64_t rows, int64_t parts, float* sums) {
  const int64_t groups = blocks(parts * planes.tiles / kSquareParts, kTileGroup);
  plan.table.filter.product({planes.filters, tiles, planes.size, planes.places.data(), filters,
                             plan.weight_plane(), rows, plan.images.channels, kSquareRun, groups,
                             sums, planes.tiles});
}

// Ends of a band for rows [n, n + rows) of W.
void finish_band(const Squares& plan, const LateSteps& late, const Band& band, int64_t n,
                 int64_t rows, float offset, const SquareBuffers& own) {
  const int64_t parts = band.tall * plan.of_row, of_rows = 2 * plan.window.out_width;
  const float* filters = plan.filters.get() + n * plan.images.channels;
  multiply_squares(plan, plan.centres, own.centre, filters, rows, parts, own.centre_sums);
  multiply_squares(plan, plan.radii, own.radius,
                   filters + plan.centres.filters * plan.weight_plane(), rows, parts,
                   own.radius_sums);
  const int64_t to =
      (band.image * plan.call.weight.rows + n) * plan.pixels() + band.first * of_rows;
  const bool streams = past_cache(output_bytes(plan.call, plan.images, plan.window));
  late.write({n, rows, band.tall * of_rows, to, plan.pixels(), streams},
             [&](int64_t row, int64_t asked, const EndsBlock& ends) {
               return plan.table.filter.squares.ends(
                   {plan.strided, own.centre_sums, own.radius_sums,
                    shifted(plan.call.bias, n + row), offset, rows, row, asked, parts, plan.of_row,
                    ends.row_stride, ends.lower, ends.upper, ends.past_cache},
                   band.constants);
             });
}

void convolve_by_squares(const Call& call, const Images& images, const Window& window,
                         const IntervalKernels& table, int num_threads) {
  Squares plan = plan_squares(call, images, window, table);
  make_filters(plan, num_threads);
  const LateSteps late(call, table);
  const int64_t step = plan.step(), size = SquareBuffers::size(plan);
  const double work =
      static_cast<double>(images.batch * plan.pixels()) * static_cast<double>(plan.weight_plane());
  const Shares shares(images.batch * plan.bands, 1, work, num_threads);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    const SquareBuffers own(plan, memory.get() + share * size);
    for (int64_t index = begin; index < end; ++index) {
      const Band band(plan, index);
      const float offset = make_tiles(plan, band, own);
      for (int64_t n = 0; n < call.weight.rows; n += step) {
        finish_band(plan, late, band, n, std::min(step, call.weight.rows - n), offset, own);
      }
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
