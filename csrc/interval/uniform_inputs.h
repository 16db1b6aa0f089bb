// Included by dispatch.cpp alone: many inputs whose radii are all the same but for the rounding of
// their ends, as those of a ball are. One product, of centres, is left; the sums of radii are those
// of |W| and a bound on the centres' errors (interval.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "interval/ends.h"
#include "interval/input_panels.h"
#include "interval/interval.h"
#include "interval/kernels.h"
#include "interval/panels.h"
#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

static_assert(kTermsAtOnce <= kWeighedTerms);

// Whether all inputs have uniform radii, and the radii.
struct UniformRadii {
  bool serve = false;
  std::vector<RadiusRange> ranges;  // (batch)

  UniformRadii(const Call& call, const IntervalKernels& table, int64_t batch, int num_threads) {
    constexpr int64_t kLeastRows = 16, kLeastTerms = 64;
    const int64_t terms = call.weight.terms;
    if (batch <= kLanes || call.weight.rows < kLeastRows || terms < kLeastTerms) return;
    const float gain = constants_for(call, terms).centre_gain;
    if (!fits(range_of(call, table, 0), gain)) return;  // most calls end here
    ranges.resize(static_cast<size_t>(batch));
    std::atomic<bool> all{true};
    const Shares shares(batch, 1, static_cast<double>(batch * terms), num_threads);
    shares.run([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end && all.load(std::memory_order_relaxed); ++b) {
        const RadiusRange range = ranges[static_cast<size_t>(b)] = range_of(call, table, b);
        if (!fits(range, gain)) all.store(false, std::memory_order_relaxed);
      }
    });
    serve = all.load();
  }

 private:
  static bool close(const RadiusRange& range) {
    return range.most - range.least <= range.most / 64;
  }

  // Ends that rounding moved by some units leave radii within 2^-20 of the largest |x|. Errors of
  // centres are bounded more loosely than term by term, by a third where both are spread evenly:
  // nothing beside a radius 64 times as large as any. In between no square leaves the range.
  static bool fits(const RadiusRange& range, float gain) {
    constexpr float kSpread = 9.5367431640625e-7f, kLeast = 9.094947e-13f, kMost = 1.152921e18f;
    return close(range) && range.most - range.least <= kSpread * range.size &&
           64.0f * gain * range.size <= range.least && range.least >= kLeast && range.most <= kMost;
  }

  // Of the input up to where it is no longer uniform.
  static RadiusRange range_of(const Call& call, const IntervalKernels& table, int64_t b) {
    constexpr int64_t kStep = 128;
    const int64_t terms = call.weight.terms, at = b * terms;
    RadiusRange range{rounding::infinity(), 0.0f, 0.0f};
    for (int64_t k = 0; k < terms; k += kStep) {
      const RadiusRange here = table.uniform.range(
          {call.lower + at + k, call.upper + at + k, std::min(kStep, terms - k), call.floor()});
      range = {std::min(range.least, here.least), std::max(range.most, here.most),
               std::max(range.size, here.size)};
      if (!close(range)) break;
    }
    return range;
  }
};

// Panels of kPanelWidth inputs: their centres, and what their radii are made of.
struct UniformPanels : PanelBlocks {
  int64_t inputs;
  int64_t factors;  // of a sum of radii: 1, and the runs whose errors are bounded
  InputConstants constants;
  Floats radii;  // (count, factors, kPanelWidth): rho', then norms of errors
  Floats most;   // (count, kPanelWidth): the largest error, then the largest r'

  UniformPanels(const Call& call, int64_t batch, int num_threads)
      : PanelBlocks(call, blocks(batch, kPanelWidth)),
        inputs(batch),
        factors(1 + (call.rounding != Rounding::kNearest ? blocks(call.weight.terms, kRun) : 0)),
        constants(call, batch, num_threads),
        radii(floats(count * factors * kPanelWidth)),
        most(floats(count * kPanelWidth)) {
    std::fill(most.get(), most.get() + count * kPanelWidth, 0.0f);
  }

  int64_t lanes(int64_t p) const { return std::min(kPanelWidth, inputs - p * kPanelWidth); }
  float* radii_of(int64_t p) const { return radii.get() + p * factors * kPanelWidth; }
  float* most_of(int64_t p) const { return most.get() + p * kPanelWidth; }
  // Absent inputs count as the first.
  const Constants& constants_of_lane(int64_t p, int64_t lane) const {
    const int64_t at = p * kPanelWidth + (lane < lanes(p) ? lane : 0);
    return constants.panels[static_cast<size_t>(at / kLanes)].inputs[at % kLanes];
  }
};

// Terms [begin, end) of panel p.
inline void fill_centres(const Call& call, const IntervalKernels& table, int64_t p, int64_t begin,
                         int64_t end, float* scratch, const UniformPanels& panels) {
  const int64_t terms = call.weight.terms, lanes = panels.lanes(p);
  const int64_t block = std::min(terms, kTermsAtOnce);
  float *centre = scratch, *unused = scratch + kPanelWidth * block;
  const Constants plain = plain_radii();
  const Constants* inputs[kPanelWidth];
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    inputs[lane] = &panels.constants_of_lane(p, lane);
  }
  std::fill(centre + lanes * block, centre + kPanelWidth * block, 0.0f);
  for (int64_t k = begin; k < end; k += kTermsAtOnce) {
    const int64_t count = std::min(kTermsAtOnce, end - k);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = (p * kPanelWidth + lane) * terms + k;
      const Ends ends{call.lower + at, call.upper + at, count, call.floor()};
      table.prepare(ends, plain, centre + lane * block, unused);
    }
    float* panel = panels.at(p, k);
    table.pack({centre, centre + kLanes * block, kLanes, count, block, panel});
    if (call.rounding == Rounding::kNearest) continue;
    float* norms = panels.radii_of(p) + (1 + k / kRun) * kPanelWidth;
    table.uniform.errors(
        {panel, k, count, terms, inputs, counts_roundings(call), norms, panels.most_of(p)});
  }
}

// rho' of an input, and the largest r' from the largest error of a centre.
inline void put_radius(const Call& call, const RadiusRange& range, const Constants& constants,
                       float* radius, float* most) {
  if (call.rounding == Rounding::kNearest) {
    *most = *radius = 0.5f * (range.least + range.most);
    if (call.int8) *most = *radius += half_step(range.size);
    return;
  }
  const float extra = call.int8 ? half_step(range.size) * constants.radius_gain : 0.0f;
  *radius = (range.most * constants.radius_gain + extra) * kSlack;
  *most = (*radius + *most) * kSlack;
}

// Terms [begin, end) of all panels.
inline void fill_centres(const Call& call, const IntervalKernels& table, int64_t begin, int64_t end,
                         int num_threads, UniformPanels* panels) {
  panels->first = begin;
  // some 0.8 ns an input, as for 40 flops
  const double work = static_cast<double>(5 * panels->inputs * (end - begin));
  const Shares shares(panels->count, 1, work, num_threads);
  const int64_t size = (kPanelWidth + 1) * whole_lines(std::min(call.weight.terms, kTermsAtOnce));
  const Floats scratch = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      fill_centres(call, table, p, begin, end, scratch.get() + share * size, *panels);
    }
  });
}

// After all terms are filled.
inline void put_radii(const Call& call, const UniformRadii& radii, UniformPanels* panels) {
  for (int64_t p = 0; p < panels->count; ++p) {
    float *first = panels->radii_of(p), *most = panels->most_of(p);
    std::fill(first, first + kPanelWidth, 0.0f);
    for (int64_t lane = 0; lane < panels->lanes(p); ++lane) {
      const auto input = static_cast<size_t>(p * kPanelWidth + lane);
      put_radius(call, radii.ranges[input], panels->constants_of_lane(p, lane), first + lane,
                 most + lane);
      panels->constants.largest[input] = radii.ranges[input].size;
    }
  }
}

// What a thread needs for rows [begin, end) against all panels.
struct UniformShare {
  const Call& call;
  const IntervalKernels& table;
  const UniformPanels& panels;
  int64_t begin, end;
  int64_t step;    // rows at once
  float* decoded;  // of packed rows
  float* sums;     // (panels, end - begin, kPanelWidth)
  float* radii;    // (kPanelsOfTile, step, kPanelWidth)
  float* sizes;    // (end - begin, factors)

  static int64_t scratch_size(const Call& call, int64_t rows, int64_t step,
                              const UniformPanels& panels) {
    return whole_lines(decoded_size(call.weight, step)) +
           (panels.count * rows + kPanelsOfTile * step) * kPanelWidth +
           whole_lines(rows * panels.factors);
  }

  UniformShare(const Call& call, const IntervalKernels& table, const UniformPanels& panels,
               int64_t begin, int64_t end, int64_t step, float* memory)
      : call(call), table(table), panels(panels), begin(begin), end(end), step(step) {
    decoded = memory;
    sums = decoded + whole_lines(decoded_size(call.weight, step));
    radii = sums + panels.count * (end - begin) * kPanelWidth;
    sizes = radii + kPanelsOfTile * step * kPanelWidth;
  }

  int64_t sum_stride() const { return (end - begin) * kPanelWidth; }

  // Terms [from, from + count) of rows [n, n + rows), whose W starts at `weight`.
  void add(const float* weight, int64_t n, int64_t rows, int64_t from, int64_t count) const {
    const int64_t terms = call.weight.terms;
    table.uniform.weigh({weight + from, terms, rows, from, count,
                         call.rounding != Rounding::kNearest, sizes + (n - begin) * panels.factors,
                         panels.factors});
    for (int64_t p = 0; p < panels.count; p += kPanelsOfTile) {
      table.uniform.tiles({panels.at(p, from), std::min(kPanelsOfTile, panels.count - p),
                           panels.stride, weight + from, terms, rows, count,
                           sums + p * sum_stride() + (n - begin) * kPanelWidth, sum_stride(),
                           from > 0,
                           next_ends(call, panels.inputs, p, kPanelWidth, n, from + count)});
    }
  }

  // Terms [from, to) of W against the panels of this pass, and the ends after the last of them.
  void add_pass(int64_t from, int64_t to) const {
    const bool packed = call.weight.packed != nullptr;
    // Packed rows are decoded once: rows outside, terms inside.
    const int64_t outer = packed ? to - from : kTermsAtOnce;
    for (int64_t k = from; k < to; k += outer) {
      for (int64_t n = begin; n < end; n += step) {
        const int64_t count = std::min(step, end - n);
        const float* weight = rows_of(call.weight, n, count, decoded);
        for (int64_t inner = k; inner < std::min(k + outer, to); inner += kTermsAtOnce) {
          add(weight, n, count, inner, std::min(kTermsAtOnce, to - inner));
        }
        if (k + outer >= call.weight.terms) finish(n, count);
      }
    }
  }

  // Ends of rows [n, n + rows), while their sums are at hand.
  void finish(int64_t n, int64_t rows) const {
    const int64_t factors = panels.factors;
    const float* of_rows = sizes + (n - begin) * factors;
    for (int64_t p = 0; p < panels.count; ++p) {
      if (p % kPanelsOfTile == 0) {
        table.uniform.tiles({panels.radii_of(p), std::min(kPanelsOfTile, panels.count - p),
                             factors * kPanelWidth, of_rows, factors, rows, factors, radii,
                             rows * kPanelWidth, false});
      }
      float* own[2] = {sums + p * sum_stride() + (n - begin) * kPanelWidth,
                       radii + p % kPanelsOfTile * rows * kPanelWidth};
      table.uniform.join({own[0], own[1], rows, panels.most_of(p), of_rows, factors});
      for (int64_t half = 0; half < 2 && half * kLanes < panels.lanes(p); ++half) {
        panels.constants.finish(call, table, panels.inputs, 2 * p + half, n, rows, own[half]);
      }
    }
  }
};

void uniform_inputs(const Call& call, const IntervalKernels& table, const UniformRadii& radii,
                    int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  UniformPanels panels(call, batch, num_threads);
  const Shares shares(rows, kShareStep, static_cast<double>(batch) * rows * terms / 16,
                      num_threads);
  const bool packed = call.weight.packed != nullptr;
  const int64_t step = rows_at_once(rows, packed ? terms : std::min(terms, kTermsAtOnce));
  const int64_t most = blocks(blocks(rows, kShareStep), shares.number) * kShareStep;
  const int64_t size = UniformShare::scratch_size(call, most, step, panels);
  const Floats memory = floats(shares.number * size);
  for (int64_t from = 0; from < terms; from += panels.pass) {
    const int64_t to = std::min(terms, from + panels.pass);
    fill_centres(call, table, from, to, num_threads, &panels);
    if (to == terms) put_radii(call, radii, &panels);
    shares.run([&](int64_t share, int64_t begin, int64_t end) {
      const UniformShare own(call, table, panels, begin, end, step, memory.get() + share * size);
      own.add_pass(from, to);
    });
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
