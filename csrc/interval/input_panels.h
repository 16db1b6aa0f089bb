// Included by dispatch.cpp alone: many inputs side by side as panels, a range of terms at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "interval/interval.h"
#include "interval/kernels.h"
#include "interval/panels.h"
#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

// Terms that meet all rows of a share before the next ones: the panels of 128 inputs then stay in a
// second-level cache. Whole chunks, so that the order of the sums does not change.
constexpr int64_t kTermsAtOnce = 2 * kChunk;

// The constants of a panel's inputs, and those of its ends, which suit all of them.
struct PanelConstants {
  Constants inputs[kLanes];
  Constants ends;

  PanelConstants() = default;
  // Absent inputs count as the first.
  PanelConstants(const Call& call, const Constants& of_all, int64_t first, int64_t lanes) {
    const int64_t terms = call.weight.terms;
    const bool counted = counts_roundings(call);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t at = (first + (lane < lanes ? lane : 0)) * terms;
      const Ends input{call.lower + at, call.upper + at, terms, call.floor()};
      Constants& own = inputs[lane];
      own = lane < lanes ? constants_of_input(call, input, of_all, counted) : inputs[0];
      if (lane == 0) ends = own;
      suit_ends(ends, own);
    }
  }
};

// `count` panels in blocks of kTermsAtOnce terms: those of one pass over W at a time.
struct PanelBlocks {
  int64_t count;
  int64_t stride;  // from a block's panel to the next
  int64_t pass;    // terms: as many blocks as fit 2 MiB, or all of them
  int64_t first = 0;
  Floats values;

  PanelBlocks(const Call& call, int64_t count) : count(count) {
    constexpr int64_t kFloatsOfPass = int64_t{1} << 19;
    const int64_t terms = call.weight.terms, all = blocks(terms, kTermsAtOnce);
    // A panel is set off by a line: panels a multiple of 4096 bytes apart would share cache sets.
    stride = std::min(terms, kTermsAtOnce) * kPanelWidth + kPanelWidth;
    const int64_t fit = std::max<int64_t>(1, kFloatsOfPass / (count * stride));
    // Packed rows are decoded once for all terms, and the rounding of activations needs whole
    // inputs.
    const bool whole = call.weight.packed != nullptr || call.int8;
    pass = std::max<int64_t>(1, whole ? all : std::min(fit, all)) * kTermsAtOnce;
    values = floats(std::min(pass / kTermsAtOnce, all) * count * stride);
  }

  // Panel p of the block that starts at term `begin` of this pass.
  float* at(int64_t p, int64_t begin) const {
    return values.get() + ((begin - first) / kTermsAtOnce * count + p) * stride;
  }
};

// What the inputs of eight lanes after another bring to their ends.
struct InputConstants {
  std::vector<PanelConstants> panels;
  std::vector<float> largest;  // (panels * kLanes) |x| so far, 0 for absent inputs

  InputConstants(const Call& call, int64_t batch, int num_threads)
      : panels(static_cast<size_t>(blocks(batch, kLanes))), largest(panels.size() * kLanes, 0.0f) {
    const int64_t terms = call.weight.terms, count = blocks(batch, kLanes);
    const Constants of_all = constants_of(call, terms, counts_roundings(call));
    const Shares shares(count, 1, static_cast<double>(batch * terms), num_threads);
    shares.run([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        panels[static_cast<size_t>(p)] =
            PanelConstants(call, of_all, p * kLanes, std::min(kLanes, batch - p * kLanes));
      }
    });
  }

  // Ends of rows [begin, begin + rows) of the inputs of panel p from their sums.
  void finish(const Call& call, const IntervalKernels& table, int64_t batch, int64_t p,
              int64_t begin, int64_t rows, const float* sums) const {
    const int64_t at = p * kLanes * call.weight.rows + begin;
    const int64_t lanes = std::min(kLanes, batch - p * kLanes);
    float offsets[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      offsets[lane] = offset_for(call, largest[static_cast<size_t>(p * kLanes + lane)]);
    }
    call.report(table.finish_panel({sums, shifted(call.bias, begin), offsets, rows, lanes, 1,
                                    call.weight.rows, 0, call.out_lower + at, call.out_upper + at},
                                   panels[static_cast<size_t>(p)].ends));
  }
};

// What follows the terms up to `to` of a tile at panel p and row n: ends, after the last of them.
inline NextEnds next_ends(const Call& call, int64_t batch, int64_t p, int64_t lanes_of_panel,
                          int64_t n, int64_t to) {
  if (to < call.weight.terms) return {};
  const int64_t first = p * lanes_of_panel, at = first * call.weight.rows + n;
  return {call.out_lower + at, call.out_upper + at,
          std::min(kPanelsOfTile * lanes_of_panel, batch - first), call.weight.rows};
}

// All inputs as panels of centres and radii.
struct Panels : PanelBlocks {
  InputConstants constants;

  Panels(const Call& call, int64_t batch, int num_threads)
      : PanelBlocks(call, blocks(batch, kLanes)), constants(call, batch, num_threads) {}
};

// Radii of terms [begin, begin + terms) of a panel, of the sums of all terms.
inline void widen_panel(const Call& call, const IntervalKernels& table,
                        const PanelConstants& constants, int64_t begin, int64_t terms,
                        float* panel) {
  const Constants* inputs[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) inputs[lane] = constants.inputs + lane;
  table.widen.panel({panel, begin, terms, call.weight.terms, inputs});
}

// Terms [begin, end) of the inputs of panel p: prepared a block of terms at a time and copied while
// they are in a first-level cache.
inline void fill_panel(const Call& call, const IntervalKernels& table, int64_t batch, int64_t p,
                       int64_t begin, int64_t end, float* scratch, Panels* panels) {
  const int64_t terms = call.weight.terms, lanes = std::min(kLanes, batch - p * kLanes);
  const int64_t block = call.int8 ? terms : std::min(terms, kTermsAtOnce);
  float *centre = scratch, *radius = scratch + kLanes * block;
  float* largest = panels->constants.largest.data() + p * kLanes;
  const PanelConstants& constants = panels->constants.panels[static_cast<size_t>(p)];
  const bool counted = counts_roundings(call);
  const Constants plain = plain_radii();
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = (p * kLanes + lane) * terms + from, to = lane * block;
      const Ends ends{call.lower + at, call.upper + at, count, call.floor()};
      const Constants& own = constants.inputs[lane];
      const float here = table.prepare(ends, counted ? plain : own, centre + to, radius + to);
      largest[lane] = std::max(largest[lane], here);
      if (call.int8) widen_to_int8(centre + to, radius + to, terms, 1, own);
    }
    for (int64_t k = from; k < from + count; k += kTermsAtOnce) {
      const int64_t now = std::min(kTermsAtOnce, from + count - k);
      table.pack({centre + k - from, radius + k - from, lanes, now, block, panels->at(p, k)});
      if (counted) widen_panel(call, table, constants, k, now, panels->at(p, k));
    }
  }
}

// Terms [begin, end) of all panels.
inline void fill_panels(const Call& call, const IntervalKernels& table, int64_t batch,
                        int64_t begin, int64_t end, int num_threads, Panels* panels) {
  panels->first = begin;
  // some 0.8 ns an input, as for 40 flops
  const double work = static_cast<double>(5 * batch * (end - begin));
  const Shares shares(panels->count, 1, work, num_threads);
  const int64_t terms = call.weight.terms;
  const int64_t size = 2 * kLanes * (call.int8 ? terms : std::min(terms, kTermsAtOnce));
  const Floats scratch = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      fill_panel(call, table, batch, p, begin, end, scratch.get() + share * size, panels);
    }
  });
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
