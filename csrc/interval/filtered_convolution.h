// The convolution by minimal filtering: image by image, all rows become tiles, and blocks of tiles
// meet the filters of W. Included by filter_parts.h alone; see filtering.h.
#pragma once

#include <algorithm>
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

// Where it pays: enough channels to make up for the tiles, and enough pixels for the filters. By
// stride 2, which saves less, 128 channels and one image of 8 x 8 outputs do not (490 us and 485).
bool filters_apply(const Call& call, const Images& images, const Window& window,
                   const IntervalKernels& table) {
  constexpr int64_t kLeastChannels = 16, kLeastPixels = 64, kLeastStrided = 256;
  if (table.filter.product == nullptr || call.int8 || window.groups != 1) return false;
  if (window.kernel_height != kWindowRows || window.kernel_width != 3) return false;
  const int64_t stride = window.stride_width, multiple = stride == 1 ? 2 : 8;
  if (window.stride_height != stride || stride > 2) return false;
  if (window.dilation_height != 1 || window.dilation_width != 1) return false;
  const int64_t pixels = window.out_height * window.out_width;
  return window.out_width % multiple == 0 && pixels >= kLeastPixels &&
         std::min(images.channels, call.weight.rows) >= kLeastChannels &&
         (stride == 1 || images.batch * pixels >= kLeastStrided);
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
  RadiusPlanes plain;  // of radii that are not filtered

  // Floats of a channel's rows of tiles. With stride 2 the even rows are neighbours and so are the
  // odd ones. What is written behind either must not reach the other, nor the next channel, which
  // may be another thread's.
  int64_t channel_size(const Planes& planes) const {
    const int64_t of_row = window.out_width / planes.outputs;
    return strided ? 2 * (blocks(height, 2) * of_row + kTileGroup) : height * of_row + kTileGroup;
  }
  int64_t place(const Planes& planes, int64_t channel, int64_t row) const {
    const int64_t of_row = window.out_width / planes.outputs, size = channel_size(planes);
    if (!strided) return channel * size + row * of_row;
    return channel * size + row % 2 * (size / 2) + row / 2 * of_row;
  }

  int64_t pixels() const { return window.out_height * window.out_width; }
  int64_t block_pixels() const { return kBlockTiles * radii.outputs; }
  int64_t passes() const { return blocks(call.weight.rows, kRowsOfFilterPass); }
  int64_t step() const { return blocks(call.weight.rows, passes()); }
};

Filtering::Planes planes_of(const Filtering& plan, int64_t filters, int64_t outputs) {
  Filtering::Planes out{filters, outputs, 0, {}};
  out.size = whole_lines(plan.images.channels * plan.channel_size(out)) + 16;
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
  Filtering out{call, images, window, table, {},    {}, 0.0f, 0, 0,
                0,    0,      false,  false, false, {}, {},   {}};
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
  if (out.tiled) {
    out.plain = radius_planes(images, window, out.height);
    const Floats decoded = floats(decoded_size(call.weight, call.weight.rows));
    set_sizes(call.weight, rows_of(call.weight, 0, call.weight.rows, decoded.get()), table,
              &out.plain);
  }
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

// The filters of W for rows [first, first + rows): of centres, then of radii.
struct FilterSet {
  int64_t first, rows;
  float* values;

  static int64_t size(const Filtering& plan, int64_t rows) {
    const int64_t decoded = plan.call.weight.packed != nullptr ? 3 : 0;
    return whole_lines(rows * plan.terms * (plan.centres.filters + plan.radii.filters + decoded));
  }
  int64_t plane(const Filtering& plan) const { return rows * plan.terms; }
  const float* of_centres(const Filtering& plan, int64_t n) const {
    return values + (n - first) * plan.terms;
  }
  const float* of_radii(const Filtering& plan, int64_t n) const {
    return of_centres(plan, n) + plan.centres.filters * plane(plan);
  }

  // Those of rows [begin, end), which may be decoded behind all filters.
  void make(const Filtering& plan, int64_t begin, int64_t end) const {
    const int64_t at = (begin - first) * plan.terms, count = (end - begin) * plan.terms;
    float* centres = values + at;
    float* radii = centres + plan.centres.filters * plane(plan);
    float* decoded = values + (plan.centres.filters + plan.radii.filters) * plane(plan) + 3 * at;
    plan.table.filter.weights({rows_of(plan.call.weight, begin, end - begin, decoded), count,
                               plan.quads, plan.strided, centres, plan.tiled ? nullptr : radii,
                               plane(plan)});
  }
};

// The tiles of an image.
struct Tiling {
  float *centre, *radius;
  uint32_t* words;  // of radii that are not filtered, in place of `radius`

  static int64_t plane_size(const Filtering::Planes& planes) {
    return planes.filters * planes.size;
  }
  static int64_t size(const Filtering& plan) {
    return plane_size(plan.centres) + (plan.tiled ? plan.plain.words() : plane_size(plan.radii));
  }

  Tiling(const Filtering& plan, float* memory)
      : centre(memory),
        radius(memory + plane_size(plan.centres)),
        words(reinterpret_cast<uint32_t*>(radius)) {}

  // Zeros behind the tiles of channels, which blocks may look at, and around images of words.
  void clear(const Filtering& plan) const {
    clear_behind(plan, plan.centres, centre);
    if (plan.tiled) {
      std::fill(words, words + plan.plain.words(), 0u);
    } else {
      clear_behind(plan, plan.radii, radius);
    }
  }
  static void clear_behind(const Filtering& plan, const Filtering::Planes& planes, float* tiles) {
    for (int64_t at = 0; at < planes.filters * plan.images.channels; ++at) {
      float* plane = tiles + at / plan.images.channels * planes.size;
      for (int64_t y = 0; y < plan.window.stride_height; ++y) {
        std::fill_n(plane + plan.place(planes, at % plan.images.channels, plan.height + y),
                    kTileGroup, 0.0f);
      }
    }
  }
};

// The buffers of one thread, the tiles that it makes, and filters.
struct FilterBuffers {
  float *lines[2], *centre_sums, *radius_sums;
  FilterSet filters;
  Tiling tiles;

  static int64_t sums_size(const Filtering& plan, const Filtering::Planes& planes) {
    return plan.step() * planes.filters * plan.block_pixels() / planes.outputs;
  }
  static int64_t radius_sums_size(const Filtering& plan) {
    return plan.tiled ? coarse_rows(plan.step()) * kTiledPixels : sums_size(plan, plan.radii);
  }
  static int64_t size(const Filtering& plan) {
    return 2 * kRowsAtOnce * plan.line + sums_size(plan, plan.centres) + radius_sums_size(plan) +
           Tiling::size(plan);
  }

  FilterBuffers(const Filtering& plan, const FilterSet& filters, float* memory)
      : filters(filters), tiles(plan, memory + size(plan) - Tiling::size(plan)) {
    for (float*& line : lines) {
      line = memory + kLineMargin;
      memory += kRowsAtOnce * plan.line;
    }
    centre_sums = memory;
    radius_sums = centre_sums + sums_size(plan, plan.centres);
  }

  // Before the first tiles: zeros beside lines, which rows of one width keep, and behind tiles.
  void clear(const Filtering& plan) const {
    std::fill_n(lines[0] - kLineMargin, 2 * kRowsAtOnce * plan.line, 0.0f);
    tiles.clear(plan);
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
         own.tiles.centre + plan.place(plan.centres, channel, to), plan.centres.size,
         plan.tiled ? nullptr : own.tiles.radius + plan.place(plan.radii, channel, to),
         plan.radii.size});
  }
  if (plan.tiled) {
    plan.table.tiled_filter.radii(
        {rows, plan.line, own.lines[0], own.lines[1], plan.strided, channel % 2 == 1,
         plan.centre_errors[static_cast<size_t>(channel)], plan.constants.input_floor,
         own.tiles.words + channel / 2 * plan.plain.plane +
             (plan.window.pad_top + row) * plan.plain.row_size,
         plan.plain.row_size});
  }
  return largest;
}

// Rows [begin, end) of all channels of an image and its padding as tiles, in the order of memory,
// as each is written in whole registers. Returns the largest |x|.
float make_tiles(const Filtering& plan, int64_t image, int64_t begin, int64_t end,
                 const FilterBuffers& own) {
  const int64_t top = plan.window.pad_top;
  const int64_t first = std::clamp(top, begin, end);  // of the image's rows, and behind the last
  const int64_t last = std::clamp(top + plan.images.height, first, end);
  float largest = 0.0f;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel) {
    const auto clear = [&](int64_t row, int64_t rows) {
      clear_rows(plan, plan.centres, channel, row, rows, own.tiles.centre);
      if (!plan.tiled) clear_rows(plan, plan.radii, channel, row, rows, own.tiles.radius);
    };
    clear(begin, first - begin);
    for (int64_t row = first; row < last; row += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, last - row);
      largest = std::max(largest, tiles_of_rows(plan, image, channel, row - top, rows, own));
    }
    clear(last, end - last);
  }
  return largest;
}

// The sums of pixels [first, first + count) for rows [n, n + rows) of W, whose filters are given.
void multiply_tiles(const Filtering& plan, const Filtering::Planes& planes, const float* tiles,
                    const float* filters, int64_t filter_plane, int64_t rows, int64_t first,
                    int64_t count, float* sums) {
  const int64_t stride = plan.block_pixels() / planes.outputs;
  const int64_t groups = blocks(blocks(count, planes.outputs), kTileGroup);
  for (int64_t group = 0; group < groups; group += kGroupsOfBlock) {
    const int64_t at = group * kTileGroup;
    plan.table.filter.product({planes.filters, tiles + first / planes.outputs + at, planes.size,
                               planes.places.data(), filters, filter_plane, rows, plan.terms,
                               kFilterRun, std::min(kGroupsOfBlock, groups - group), sums + at,
                               stride});
  }
}

// Some rows of W and neighbouring pixels of an image: [begin, end) of both.
struct Part {
  int64_t rows_begin, rows_end, pixels_begin, pixels_end;
};

// The ends of a block of pixels, of a few rows of W.
void filter_block(const Filtering& plan, const LateSteps& late, int64_t image, const Part& block,
                  float offset, const FilterBuffers& own) {
  const int64_t n = block.rows_begin, rows = block.rows_end - n, pixels = plan.pixels();
  const int64_t first = block.pixels_begin, count = block.pixels_end - first;
  multiply_tiles(plan, plan.centres, own.tiles.centre, own.filters.of_centres(plan, n),
                 own.filters.plane(plan), rows, first, count, own.centre_sums);
  if (plan.tiled) {
    multiply_radii(plan.plain, plan.window, plan.table, own.tiles.words, n, rows, first, count,
                   own.radius_sums);
  } else {
    multiply_tiles(plan, plan.radii, own.tiles.radius, own.filters.of_radii(plan, n),
                   own.filters.plane(plan), rows, first, count, own.radius_sums);
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

// The ends of a part of an image whose tiles are made.
void filter_part(const Filtering& plan, const LateSteps& late, int64_t image, const Part& part,
                 float offset, const FilterBuffers& own) {
  const int64_t step = plan.step(), size = plan.block_pixels();
  for (int64_t first = part.pixels_begin; first < part.pixels_end; first += size) {
    for (int64_t n = part.rows_begin; n < part.rows_end; n += step) {
      const Part block{n, std::min(n + step, part.rows_end), first,
                       std::min(first + size, part.pixels_end)};
      filter_block(plan, late, image, block, offset, own);
    }
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
