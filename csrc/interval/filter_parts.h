// Threads and minimal filtering: they have images of their own, and share those that are left over,
// or the only one. Included by convolution.cpp alone.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "interval/filtered_convolution.h"
#include "runtime/team.h"

namespace pyrobust {
namespace interval {
namespace {

// Threads that share an image divide its outputs by rows of W and by pixels. Each makes the filters
// of its rows and the tiles around its pixels in memory of its own, though others may make some of
// them too: what another core wrote last comes late and is late to be written again. With tiles and
// filters made by halves in memory that changed hands, two threads took 850 us in place of 545 (64
// to 64 channels of 32 x 32).
struct Split {
  int64_t rows, pixels;  // into how many parts

  int64_t parts() const { return rows * pixels; }
  Part part(const Filtering& plan, int64_t index) const {
    const int64_t unit = kTileGroup * plan.radii.outputs, units = blocks(plan.pixels(), unit);
    const int64_t row = index / pixels, column = index % pixels, n = plan.call.weight.rows;
    const auto pixel = [&](int64_t at) {
      return std::min(units * at / pixels * unit, plan.pixels());
    };
    return {n * row / rows, n * (row + 1) / rows, pixel(column), pixel(column + 1)};
  }
};

// The one that takes least time, in cycles of a core with 512-bit FMAs for one channel. Filters
// weigh more than the time they take to make, as each is read once for a few pixels. Parts by
// pixels must save a tenth: on a busy machine they lose more (by rows 559 us and 571, by pixels 545
// and 670: two threads, 64 to 64 channels of 32 x 32).
Split split_of(const Filtering& plan, int64_t threads, bool filters_made) {
  constexpr double kOfProduct = 0.7, kOfFilter = 16.0, kOfTile = 4.0;
  const int64_t unit = kTileGroup * plan.radii.outputs, units = blocks(plan.pixels(), unit);
  Split best{1, 1};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t pixels = 1; pixels <= std::min(threads, units); ++pixels) {
    const Split split{std::min(threads / pixels, plan.call.weight.rows), pixels};
    const auto of_rows = static_cast<double>(blocks(plan.call.weight.rows, split.rows));
    const auto of_pixels = static_cast<double>(blocks(units, pixels) * unit);
    const double cycles =
        of_rows * (kOfProduct * of_pixels + (filters_made ? 0.0 : kOfFilter)) + kOfTile * of_pixels;
    if (cycles < 0.9 * least) {
      least = cycles;
      best = split;
    }
  }
  return best;
}

// A convolution in progress. Its memory is one block: of several, calls might take now one and now
// the other, so that each core finds what another wrote.
struct FilterWork {
  const Filtering& plan;
  const LateSteps& late;
  int64_t alone;  // images that are one thread's; threads share the others
  Split split;
  bool together;      // whether filters are of all threads
  float* largest[2];  // |x| of each part, of even images and of odd ones
  float* memory = nullptr;

  int64_t all_rows() const { return plan.call.weight.rows; }
  int64_t shared_size() const { return together ? FilterSet::size(plan, all_rows()) : 0; }
  // Of the filters of one thread, and all that it has.
  int64_t filters_size() const {
    if (together) return 0;
    return FilterSet::size(plan, alone > 0 ? all_rows() : blocks(all_rows(), split.rows));
  }
  int64_t own_size() const { return filters_size() + FilterBuffers::size(plan); }

  FilterBuffers buffers(int64_t index, const Part& part) const {
    float* own = memory + shared_size() + index * own_size();
    FilterSet filters{0, all_rows(), together ? memory : own};
    if (alone == 0) filters = {part.rows_begin, part.rows_end - part.rows_begin, own};
    return {plan, filters, own + filters_size()};
  }
};

// Whether threads with images of their own make all filters together: where there are few pixels
// for each filter, or no room. Else the way to another thread's takes longer than to make them
// twice (four images of 128 to 128 channels, 16 x 16, two threads: 2.72 ms, and 1.94 by each for
// itself).
bool filters_together(const Filtering& plan, int64_t alone, int64_t threads) {
  constexpr int64_t kLeastPixels = 256;
  const int64_t bytes = FilterSet::size(plan, plan.call.weight.rows) * int64_t{sizeof(float)};
  return alone > 0 &&
         (plan.pixels() * (alone / threads) < kLeastPixels || threads * bytes > kKeptBytes / 2);
}

// Whole images, one after another.
void filter_alone(const FilterWork& work, const Team& team) {
  const auto share = [&](int64_t count, int64_t rank) { return count * rank / team.size; };
  const Filtering& plan = work.plan;
  const Part all{0, plan.call.weight.rows, 0, plan.pixels()};
  const FilterBuffers own = work.buffers(team.rank, all);
  if (work.together) {
    own.filters.make(plan, share(all.rows_end, team.rank), share(all.rows_end, team.rank + 1));
    team.meet();
  } else {
    own.filters.make(plan, 0, all.rows_end);
  }
  own.clear(plan);
  for (int64_t i = share(work.alone, team.rank); i < share(work.alone, team.rank + 1); ++i) {
    const float largest = make_tiles(plan, i, 0, plan.height, own);
    filter_part(plan, work.late, i, all, offset_for(plan.call, largest), own);
  }
}

// Images by parts. The absolute term of an image needs the largest |x| of all parts.
void filter_together(const FilterWork& work, const Team& team) {
  const Filtering& plan = work.plan;
  const int64_t stride = plan.window.stride_height, width = plan.window.out_width;
  const auto each = [&](const auto& body) {  // of the thread's parts: one where the team is whole
    for (int64_t i = team.rank; i < work.split.parts(); i += team.size) {
      const Part part = work.split.part(plan, i);
      body(i, part, work.buffers(i, part));
    }
  };
  each([&](int64_t i, const Part&, const FilterBuffers& own) {
    const bool made = work.together || (work.alone > 0 && i == team.rank);
    if (!made) own.filters.make(plan, own.filters.first, own.filters.first + own.filters.rows);
    own.clear(plan);
  });
  for (int64_t image = work.alone; image < plan.images.batch; ++image) {
    float* largest = work.largest[image % 2];
    each([&](int64_t i, const Part& part, const FilterBuffers& own) {
      const int64_t first = part.pixels_begin / width, last = (part.pixels_end - 1) / width;
      largest[i] = make_tiles(plan, image, first * stride, last * stride + kWindowRows, own);
    });
    team.meet();
    const float offset =
        offset_for(plan.call, *std::max_element(largest, largest + work.split.parts()));
    each([&](int64_t, const Part& part, const FilterBuffers& own) {
      filter_part(plan, work.late, image, part, offset, own);
    });
  }
}

void convolve_by_filters(const Call& call, const Images& images, const Window& window,
                         const IntervalKernels& table, int num_threads) {
  const Filtering plan = plan_filters(call, images, window, table);
  const LateSteps late(call, table);
  const int64_t rows = call.weight.rows;
  const double flops = static_cast<double>(images.batch * plan.pixels()) *
                       static_cast<double>(2 * kFilters * rows * plan.terms) / 8;
  const int64_t threads = Shares(images.batch * plan.pixels(), 1, flops, num_threads).number;
  const int64_t alone = images.batch - images.batch % threads;
  const Split split = split_of(plan, threads, alone > 0);
  std::vector<float> largest(static_cast<size_t>(2 * split.parts()));
  FilterWork work{plan,
                  late,
                  alone,
                  split,
                  filters_together(plan, alone, threads),
                  {largest.data(), largest.data() + split.parts()}};
  const Floats memory = floats(work.shared_size() + threads * work.own_size());
  work.memory = memory.get();
  run_together(static_cast<int>(threads), [&](const Team& team) {
    const DefaultFloatEnvironment environment;
    if (alone > 0) filter_alone(work, team);
    if (alone < images.batch) filter_together(work, team);
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
