// The convolution by minimal filtering: image by image, all rows become tiles, and blocks of tiles
// meet the filters of W. Threads have images of their own; those that are left over, or the only
// one, they share. Included by convolution.cpp alone; see filtering.h.
#pragma once

#include <cstring>
#include <vector>

#include "interval/convolution_plan.h"
#include "interval/epilogue.h"
#include "interval/tiled_filters.h"
#include "runtime/team.h"

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
  Floats decoded, filters;  // of centres, then of radii
  RadiusPlanes plain;       // of radii that are not filtered

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
  int64_t weight_plane() const { return call.weight.rows * terms; }
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

void take_filters(Filtering& plan) {
  const Weight& weight = plan.call.weight;
  if (weight.packed != nullptr) plan.decoded = floats(weight.rows * weight.terms);
  if (plan.tiled) {
    set_sizes(weight, rows_of(weight, 0, weight.rows, plan.decoded.get()), plan.table, &plan.plain);
  }
  plan.filters = floats((plan.centres.filters + plan.radii.filters) * plan.weight_plane());
}

// Those of rows [begin, end) of W.
void make_filters(const Filtering& plan, int64_t begin, int64_t end) {
  const Weight& weight = plan.call.weight;
  const int64_t at = begin * plan.terms, plane = plan.weight_plane();
  float* decoded = plan.decoded != nullptr ? plan.decoded.get() + 3 * at : nullptr;
  const float* data = rows_of(weight, begin, end - begin, decoded);
  float *centres = plan.filters.get() + at, *radii = centres + plan.centres.filters * plane;
  plan.table.filter.weights({data, (end - begin) * plan.terms, plan.quads, plan.strided, centres,
                             plan.tiled ? nullptr : radii, plane});
}

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

// The buffers of one thread, and the tiles that it makes and reads.
struct FilterBuffers {
  float *lines[2], *centre_sums, *radius_sums;
  Tiling tiles;

  static int64_t sums_size(const Filtering& plan, const Filtering::Planes& planes) {
    return plan.step() * planes.filters * plan.block_pixels() / planes.outputs;
  }
  static int64_t radius_sums_size(const Filtering& plan) {
    return plan.tiled ? coarse_rows(plan.step()) * kTiledPixels : sums_size(plan, plan.radii);
  }
  static int64_t size(const Filtering& plan) {
    return 2 * kRowsAtOnce * plan.line + sums_size(plan, plan.centres) + radius_sums_size(plan);
  }

  FilterBuffers(const Filtering& plan, float* memory, const Tiling& tiles) : tiles(tiles) {
    // zeros beside lines, which rows of one width keep
    std::fill_n(memory, 2 * kRowsAtOnce * plan.line, 0.0f);
    for (float*& line : lines) {
      line = memory + kLineMargin;
      memory += kRowsAtOnce * plan.line;
    }
    centre_sums = memory;
    radius_sums = centre_sums + sums_size(plan, plan.centres);
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

// All rows of channels [begin, end) of an image as tiles, in the order of memory, as each is
// written in whole registers. Returns the largest |x|.
float make_tiles(const Filtering& plan, int64_t image, int64_t begin, int64_t end,
                 const FilterBuffers& own) {
  const int64_t top = plan.window.pad_top;
  const int64_t seen = std::min(plan.images.height, plan.height - top);  // rows of the image
  float largest = 0.0f;
  for (int64_t channel = begin; channel < end; ++channel) {
    const auto clear = [&](int64_t row, int64_t rows) {
      clear_rows(plan, plan.centres, channel, row, rows, own.tiles.centre);
      if (!plan.tiled) clear_rows(plan, plan.radii, channel, row, rows, own.tiles.radius);
    };
    clear(0, top);
    for (int64_t row = 0; row < seen; row += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, seen - row);
      largest = std::max(largest, tiles_of_rows(plan, image, channel, row, rows, own));
    }
    clear(top + seen, plan.height - top - seen);
  }
  return largest;
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
  const int64_t pixels = plan.pixels();
  const int64_t count = std::min(plan.block_pixels(), pixels - first);
  multiply_tiles(plan, plan.centres, own.tiles.centre, filters, rows, first, count,
                 own.centre_sums);
  if (plan.tiled) {
    multiply_radii(plan.plain, plan.window, plan.table, own.tiles.words, n, rows, first, count,
                   own.radius_sums);
  } else {
    multiply_tiles(plan, plan.radii, own.tiles.radius,
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

// An image by one thread.
void filter_image(const Filtering& plan, const LateSteps& late, int64_t image,
                  const FilterBuffers& own) {
  const int64_t rows = plan.call.weight.rows, step = plan.step();
  const float offset = offset_for(plan.call, make_tiles(plan, image, 0, plan.images.channels, own));
  for (int64_t first = 0; first < plan.pixels(); first += plan.block_pixels()) {
    for (int64_t n = 0; n < rows; n += step) {
      filter_block(plan, late, image, first, n, std::min(step, rows - n), offset, own);
    }
  }
}

// Part `rank` of [0, count) in `size` nearly equal ones.
int64_t share_of(int64_t count, int64_t rank, int64_t size) { return count * rank / size; }

// An image by all threads. Each makes the tiles of some channels, and then the ends of some rows of
// W, whose filters its cache holds, or of some blocks of pixels; `largest` has a place for each.
void share_image(const Filtering& plan, const LateSteps& late, int64_t image, const Team& team,
                 float* largest, const FilterBuffers& own) {
  // words of radii hold two channels
  const int64_t pairs = blocks(plan.images.channels, 2), rows = plan.call.weight.rows;
  const int64_t begin = 2 * share_of(pairs, team.rank, team.size);
  const int64_t end = 2 * share_of(pairs, team.rank + 1, team.size);
  largest[team.rank] = make_tiles(plan, image, begin, std::min(end, plan.images.channels), own);
  team.meet();
  const float offset = offset_for(plan.call, *std::max_element(largest, largest + team.size));
  const int64_t of_rows = blocks(plan.pixels(), plan.block_pixels());
  int64_t parts = plan.passes();
  while (of_rows * parts % team.size != 0) ++parts;
  const int64_t last = share_of(of_rows * parts, team.rank + 1, team.size);
  for (int64_t at = share_of(of_rows * parts, team.rank, team.size); at < last; ++at) {
    const int64_t n = share_of(rows, at / of_rows, parts);
    const int64_t count = share_of(rows, at / of_rows + 1, parts) - n;
    if (count == 0) continue;
    filter_block(plan, late, image, at % of_rows * plan.block_pixels(), n, count, offset, own);
  }
}

void convolve_by_filters(const Call& call, const Images& images, const Window& window,
                         const IntervalKernels& table, int num_threads) {
  Filtering plan = plan_filters(call, images, window, table);
  take_filters(plan);
  const LateSteps late(call, table);
  const double work = static_cast<double>(images.batch * plan.pixels()) *
                      static_cast<double>(2 * kFilters * plan.weight_plane()) / 8;
  const int64_t threads = Shares(images.batch * plan.pixels(), 1, work, num_threads).number;
  const int64_t tilings = std::min(threads, images.batch);
  const int64_t of_tiles = Tiling::size(plan), of_thread = FilterBuffers::size(plan);
  const Floats memory = floats(tilings * of_tiles + threads * of_thread);
  std::vector<float> largest(static_cast<size_t>(threads));
  run_together(static_cast<int>(threads), [&](const Team& team) {
    const DefaultFloatEnvironment environment;
    const auto share = [&](int64_t count, int64_t after) {
      return share_of(count, team.rank + after, team.size);
    };
    make_filters(plan, share(call.weight.rows, 0), share(call.weight.rows, 1));
    const int64_t alone = images.batch - images.batch % team.size;  // images of one thread
    float* own_memory = memory.get() + tilings * of_tiles + team.rank * of_thread;
    const Tiling first(plan, memory.get());
    const Tiling own(plan, memory.get() + (alone > 0 ? team.rank : 0) * of_tiles);
    if (alone > 0 || team.rank == 0) own.clear(plan);
    const FilterBuffers buffers(plan, own_memory, own);
    team.meet();
    for (int64_t image = share(alone, 0); image < share(alone, 1); ++image) {
      filter_image(plan, late, image, buffers);
    }
    const FilterBuffers together(plan, own_memory, first);
    for (int64_t image = alone; image < images.batch; ++image) {
      if (image > 0) team.meet();  // the tiles of the image before have been read
      share_image(plan, late, image, team, largest.data(), together);
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
