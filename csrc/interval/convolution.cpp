// The convolution, in three forms. Groups of one channel are planes that become ends in registers
// (plane_convolution.h). Where output rows have 16 pixels or more, kernels read the prepared images
// themselves (direct_convolution.h). Else patches of a few output pixels are copied to panels, and
// the panel kernels do the rest; a few images at a time are in slots of a cache-sized buffer. The
// work is split over threads by output pixels, or by planes.
#include <vector>

#include "interval/convolution_plan.h"
#include "interval/direct_convolution.h"
#include "interval/epilogue.h"
#include "interval/filter_parts.h"
#include "interval/plane_convolution.h"
#include "interval/square_convolution.h"
#include "runtime/check.h"

namespace pyrobust {
namespace interval {
namespace {

// A panel is set off by a line: panels a multiple of 4096 bytes apart would share cache sets.
int64_t panel_stride(const Convolution& conv) {
  return conv.call.weight.terms * kPanelWidth + kPanelWidth;
}

// Panels of an image's pixels; the last may be part empty.
int64_t panels_of_image(const Convolution& conv) { return blocks(conv.pixels, kLanes); }

// As many images as one pass over W meets.
int64_t slots_of(const Convolution& conv) { return (kMaxPanels - 1) / panels_of_image(conv) + 2; }

// The buffers of one thread.
struct Buffers {
  float *decoded, *centre, *radius, *lines, *packed, *sums;
  float *scratch, *gathered;      // of the coarse kernel
  float offsets[kMaxPanels + 1];  // of the images in the slots
  Constants ends[kMaxPanels];     // of the packed panels

  static int64_t size(const Convolution& conv, int64_t step) {
    return whole_lines(decoded_size(conv.call.weight, step)) +
           2 * whole_lines(slots_of(conv) * conv.image_size()) + line_size(conv) +
           kMaxPanels * (panel_stride(conv) + step * kPanelWidth) +
           (conv.call.coarse_radius ? coarse_scratch() + gathered_size(conv) : 0);
  }
  static int64_t gathered_size(const Convolution& conv) {
    return kMaxPanels / kPanelsOfCoarseTile * coarse_gathered(conv.call.weight.terms);
  }

  Buffers(const Convolution& conv, int64_t step, float* memory) : offsets{}, ends{} {
    const int64_t images = whole_lines(slots_of(conv) * conv.image_size());
    decoded = memory;
    centre = decoded + whole_lines(decoded_size(conv.call.weight, step));
    radius = centre + images;
    lines = radius + images;
    packed = lines + line_size(conv);
    sums = packed + kMaxPanels * panel_stride(conv);
    scratch = sums + kMaxPanels * step * kPanelWidth;
    gathered = scratch + coarse_scratch();
    std::fill(centre, lines, 0.0f);  // the padding; images of one size keep it
  }

  float* gathered_at(const Convolution& conv, int64_t p) const {
    return gathered + p / kPanelsOfCoarseTile * coarse_gathered(conv.call.weight.terms);
  }
};

// In deployed mode constants depend on how many terms of a patch may be other than zero: one for
// every `step` of them, rounded up; else there is one for all. Empty where none are counted.
struct ConstantsByCount {
  std::vector<Constants> entries;
  int64_t step = 1;

  explicit ConstantsByCount(const Convolution& conv) {
    constexpr int64_t kEntries = 64;
    const int64_t terms = conv.call.weight.terms;
    if (!counts_roundings(conv.call)) return;
    if (conv.call.rounding == Rounding::kDeployed) step = blocks(terms, kEntries);
    const int64_t first = conv.call.rounding == Rounding::kDeployed ? 0 : terms;
    for (int64_t count = first; count < terms + step; count += step) {
      entries.push_back(constants_for(conv.call, std::min(count, terms), 0.0));
    }
  }
};

// Radii of a panel of patches; returns the constants of its ends.
Constants widen_patches(const Convolution& conv, const ConstantsByCount& by_count, float* panel) {
  const int64_t terms = conv.call.weight.terms;
  int32_t nonzero[kLanes] = {};
  if (by_count.entries.size() > 1) conv.table.widen.count(panel, terms, nonzero);
  const Constants* inputs[kLanes];
  Constants ends = by_count.entries[static_cast<size_t>(blocks(nonzero[0], by_count.step))];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    inputs[lane] = by_count.entries.data() + blocks(nonzero[lane], by_count.step);
    suit_ends(ends, *inputs[lane]);
  }
  conv.table.widen.panel({panel, 0, terms, terms, inputs});
  return ends;
}

// Patches of panels [first, last) of one group.
void pack_group(const Convolution& conv, const ConstantsByCount& by_count, int64_t group,
                int64_t first, int64_t last, Buffers& own) {
  const Window& window = conv.window;
  int64_t images[kMaxPanels], pixels[kMaxPanels];
  for (int64_t p = first; p < last; ++p) {
    images[p - first] = p / panels_of_image(conv) % slots_of(conv) * conv.image_size() +
                        group * conv.channels * conv.height * conv.row_size;
    pixels[p - first] = p % panels_of_image(conv) * kLanes;
  }
  conv.table.patches({own.centre, own.radius, images, pixels, last - first, conv.row_offsets.data(),
                      conv.column_offsets.data(), conv.channels, window.kernel_height,
                      window.kernel_width, conv.row_size, window.stride_height, window.out_width,
                      conv.pixels, own.packed, panel_stride(conv)});
  for (int64_t p = 0; p < last - first; ++p) {
    float* panel = own.packed + p * panel_stride(conv);
    own.ends[p] = by_count.entries.empty() ? conv.constants : widen_patches(conv, by_count, panel);
  }
  for (int64_t p = 0; p < last - first && conv.call.int8; ++p) {
    float* panel = own.packed + p * panel_stride(conv);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      widen_to_int8(panel + lane, panel + kLanes + lane, conv.call.weight.terms, kPanelWidth,
                    conv.constants);
    }
  }
}

void gather_group(const Convolution& conv, int64_t panels, const Buffers& own) {
  for (int64_t p = 0; p < panels; p += kPanelsOfCoarseTile) {
    conv.table.gather_panels({own.packed + p * panel_stride(conv),
                              std::min(kPanelsOfCoarseTile, panels - p), panel_stride(conv),
                              conv.call.weight.terms, own.gathered_at(conv, p)});
  }
}

// Rows [n, n + count) of W against the packed panels [first, last).
void convolve_rows(const Convolution& conv, const LateSteps& late, int64_t n, int64_t count,
                   int64_t first, int64_t last, const uint32_t* sizes, const Buffers& own) {
  const float* weight = rows_of(conv.call.weight, n, count, own.decoded);
  const int64_t terms = conv.call.weight.terms, sum_size = count * kPanelWidth;
  const bool coarse = conv.call.coarse_radius;
  const int64_t at_once = coarse ? kPanelsOfCoarseTile : kPanelsOfTile;
  for (int64_t p = first; p < last; p += at_once) {
    const Tiles tiles{own.packed + (p - first) * panel_stride(conv),
                      std::min(at_once, last - p),
                      panel_stride(conv),
                      weight,
                      terms,
                      count,
                      terms,
                      own.sums + (p - first) * sum_size,
                      sum_size,
                      false};
    if (coarse) {
      const int64_t stride = coarse_pairs(pairs_of(terms));
      conv.table.coarse_tiles(
          {tiles, own.gathered_at(conv, p - first), sizes + n * stride, stride, own.scratch});
    } else {
      conv.table.tiles(tiles);
    }
  }
  for (int64_t p = first; p < last;) {  // the panels of one image at a time
    const int64_t image = p / panels_of_image(conv), pixel = p % panels_of_image(conv) * kLanes;
    const int64_t end = std::min(last, (image + 1) * panels_of_image(conv));
    const int64_t at = (image * conv.call.weight.rows + n) * conv.pixels + pixel;
    float offsets[kLanes];
    std::fill(offsets, offsets + kLanes, own.offsets[image % slots_of(conv)]);
    Constants ends = own.ends[p - first];
    for (int64_t other = p + 1; other < end; ++other) suit_ends(ends, own.ends[other - first]);
    const int64_t lanes = std::min((end - p) * kLanes, conv.pixels - pixel);
    const float* sums = own.sums + (p - first) * sum_size;
    late.write({n, count, lanes, at, conv.pixels, false},
               [&](int64_t from, int64_t rows, const EndsBlock& to) {
                 return conv.table.finish_panel(
                     {sums + from * kPanelWidth, shifted(conv.call.bias, n + from), offsets, rows,
                      lanes, to.row_stride, 1, sum_size, to.lower, to.upper},
                     ends);
               });
    p = end;
  }
}

// |W| for the coarse kernel; packed rows are decoded a block at a time.
std::vector<uint32_t> sizes_of(const Convolution& conv) {
  const Weight& weight = conv.call.weight;
  const int64_t stride = coarse_pairs(pairs_of(weight.terms));
  std::vector<uint32_t> sizes(static_cast<size_t>(coarse_sizes(weight.rows, stride)));
  const int64_t step = rows_at_once(weight.rows, weight.terms);
  const Floats decoded = floats(decoded_size(weight, step));
  for (int64_t n = 0; n < weight.rows; n += step) {
    const int64_t count = std::min(step, weight.rows - n);
    conv.table.round_sizes({rows_of(weight, n, count, decoded.get()), weight.terms, count,
                            weight.terms, sizes.data() + n * stride, stride});
  }
  return sizes;
}

void convolve_panels(Convolution& conv, int num_threads) {
  const ConstantsByCount by_count(conv);
  const LateSteps late(conv.call, conv.table);
  conv.prepared.assign(static_cast<size_t>(conv.channels),
                       by_count.entries.empty() ? conv.constants : plain_radii());
  const std::vector<uint32_t> sizes =
      conv.call.coarse_radius ? sizes_of(conv) : std::vector<uint32_t>();
  const int64_t of_image = panels_of_image(conv);
  const Shares shares(conv.images.batch * of_image, kMaxPanels, work_of(conv), num_threads);
  const int64_t step = rows_of_pass(conv);
  const int64_t size = Buffers::size(conv, step);
  const Floats scratch = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    Buffers own(conv, step, scratch.get() + share * size);
    int64_t prepared = begin / of_image;  // images before it are in their slots
    for (int64_t first = begin; first < end; first += kMaxPanels) {
      const int64_t last = std::min(first + kMaxPanels, end);
      for (; prepared <= (last - 1) / of_image; ++prepared) {
        const int64_t slot = prepared % slots_of(conv), at = slot * conv.image_size();
        own.offsets[slot] =
            prepare_image(conv, prepared, {own.centre + at, own.radius + at, own.lines});
      }
      for (int64_t group = 0; group < conv.window.groups; ++group) {
        pack_group(conv, by_count, group, first, last, own);
        if (conv.call.coarse_radius) gather_group(conv, last - first, own);
        for (int64_t n = group * conv.rows; n < (group + 1) * conv.rows; n += step) {
          const int64_t count = std::min(step, (group + 1) * conv.rows - n);
          convolve_rows(conv, late, n, count, first, last, sizes.data(), own);
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

void interval_conv2d(const Call& asked, const Images& images, const Window& window,
                     int num_threads) {
  check_window(asked, images, window);
  check_terms("interval_conv2d", asked.weight.terms);
  if (images.batch == 0 || window.out_height * window.out_width <= 0 || asked.weight.rows == 0) {
    return;
  }
  const IntervalKernels table = pick_kernels();
  Call call = asked;
  const bool filters = filters_apply(asked, images, window, table);
  call.coarse_radius = filters ? tiles_take_radii(asked, images, window, table)
                               : coarse_pays(asked, table, asked.weight.rows / window.groups);
  const int64_t bytes = output_bytes(call, images, window);
  prefer_large_pages(call.out_lower, bytes);
  prefer_large_pages(call.out_upper, bytes);
  if (filters && squares_apply(call, images, window, table)) {
    return convolve_by_squares(call, images, window, table, num_threads);
  }
  if (filters) return convolve_by_filters(call, images, window, table, num_threads);
  Convolution conv = plan(call, images, window, table);
  if (planes_apply(conv)) {
    convolve_planes(conv, num_threads);
  } else if (direct_applies(conv)) {
    convolve_directly(conv, num_threads);
  } else {
    convolve_panels(conv, num_threads);
  }
}

}  // namespace interval
}  // namespace pyrobust
