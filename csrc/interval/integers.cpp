// Packed layers of one input by integer sums, one layer after another: constants, memory, shares of
// rows. Threads stay together for all layers and meet after each.
#include "interval/integers.h"

#include <algorithm>
#include <atomic>

#include "interval/integer_memory.h"
#include "interval/plan.h"
#include "matmul/panels.h"
#include "runtime/team.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kUnitOfDouble = 1.0 / 9007199254740992.0;  // 2^-53

IntegerConstants integer_constants(const Call& call, const Ends& input, int64_t groups) {
  // gamma_{n+3} for at most 2^21 groups
  const double own = static_cast<double>(groups + 4) * kUnitOfDouble;
  const bool deployed = call.rounding == Rounding::kDeployed;
  const int64_t nonzero = deployed ? nonzero_terms(input) : call.weight.terms;
  const Constants floats = constants_for(call, nonzero, own);
  return {floats.centre_gain, floats.radius_gain, floats.input_floor, 1.0 + 2.0 * own,
          floats.bias_gain,   floats.value_gain,  floats.limit,       floats.least};
}

// Asks for lines that another core may have written last, all at once: loops that meet them one
// after the other would wait for each (1 to 2 us for an input of 1024 columns).
void fetch_lines(const void* memory, int64_t bytes) {
  const auto* line = static_cast<const char*>(memory);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
}

bool by_integers(const Call& call) {
  const bool sound = call.rounding != Rounding::kNearest;
  return call.weight.packed != nullptr && !call.int8 && sound &&
         integer_format(*call.weight.packed);
}

// A layer, how its codes are read, and how many threads share its rows.
struct IntegerLayer {
  const Call& call;
  const matmul::PackedMatrix& weight;
  CodeSource source;
  int64_t panel_bytes;  // of kIntegerRows rows, where panels are made
  int64_t shares;

  IntegerLayer(const Call& call, const IntegerKernels& table, int num_threads)
      : call(call), weight(*call.weight.packed), source(CodeSource::kRows), panel_bytes(0) {
    // (Quads of two or four groups have heads of their own, which the kernel does not read.)
    if (table.panels != nullptr && matmul::PanelLayout(weight).head_groups == 1) {
      if (weight.panels != nullptr) {
        source = CodeSource::kPanels;
      } else {
        const int64_t rows = std::min(kIntegerRows, weight.rows);
        panel_bytes = matmul::panel_bytes(matmul::part_of(weight, 0, rows));
        if (panel_bytes > 0) source = CodeSource::kMade;
      }
    }
    // Panels: some 100 products a nanosecond, and half of 5 us pays for a second thread that spins.
    const double products = static_cast<double>(weight.rows * weight.cols);
    const double work = products / (source == CodeSource::kPanels ? 2.5 : 0.5);
    shares = Shares(weight.rows, kIntegerRows, work, num_threads).number;
  }

  IntegerMemory memory(char* base) const { return {weight, source, panel_bytes, base}; }
};

// Rows [n, n + count) meet the input.
void multiply(const IntegerLayer& layer, const IntegerKernels& table, const IntegerMemory& memory,
              int64_t n, int64_t count) {
  double *centre = memory.sums, *radius = memory.sums + kIntegerRows;
  if (layer.source == CodeSource::kMade) {
    matmul::PackedMatrix part = matmul::part_of(layer.weight, n, count);
    matmul::write_panels(part, memory.panels);
    part.panels = memory.panels;
    table.panels({&part, &memory.input, 0, count, memory.codes, centre, radius});
  } else {
    const bool panels = layer.source == CodeSource::kPanels;
    (panels ? table.panels
            : table.rows)({&layer.weight, &memory.input, n, count, memory.codes, centre, radius});
  }
}

// The shares of one thread; false, and nothing is written, where the input does not suit.
bool serve(const IntegerLayer& layer, const IntegerKernels& table, const Team& team, char* base) {
  if (team.rank >= layer.shares) return true;
  const Call& call = layer.call;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Ends ends{call.lower, call.upper, terms, call.floor()};
  // Every thread makes the integers for itself: sooner than to wait for another core's.
  fetch_lines(ends.lower, terms * int64_t{sizeof(float)});
  fetch_lines(ends.upper, terms * int64_t{sizeof(float)});
  IntegerMemory memory = layer.memory(base);
  const IntegerConstants constants = integer_constants(call, ends, memory.input.groups);
  float largest;
  if (!table.prepare({ends, constants, memory.scratch, &memory.input}, &largest)) return false;
  if (layer.source != CodeSource::kRows) table.order(&memory.input);
  const double offset = offset_for(call, largest);
  const int64_t all = blocks(rows, kIntegerRows), sharers = std::min(layer.shares, team.size);
  const int64_t begin = all * team.rank / sharers * kIntegerRows;
  const int64_t end = std::min(rows, all * (team.rank + 1) / sharers * kIntegerRows);
  for (int64_t n = begin; n < end; n += kIntegerRows) {
    const int64_t count = std::min(kIntegerRows, end - n);
    multiply(layer, table, memory, n, count);
    call.report(table.finish({memory.sums, memory.sums + kIntegerRows, shifted(call.bias, n),
                              offset, count, call.out_lower + n, call.out_upper + n},
                             constants));
  }
  return true;
}

}  // namespace

int64_t integer_chain(const Call* layers, int64_t count, int num_threads) {
  const IntegerKernels& table = *pick_kernels().integers;
  int64_t fitting = 0, size = 0, threads = 1;
  for (; fitting < count && by_integers(layers[fitting]); ++fitting) {
    const IntegerLayer layer(layers[fitting], table, num_threads);
    size = std::max(size, layer.memory(nullptr).bytes);
    threads = std::max(threads, layer.shares);
  }
  if (fitting == 0) return 0;
  const Floats memory = floats(threads * (size / int64_t{sizeof(float)}));
  std::atomic<int64_t> served{fitting};
  run_together(static_cast<int>(threads), [&](const Team& team) {
    const DefaultFloatEnvironment environment;
    char* own = reinterpret_cast<char*>(memory.get()) + team.rank * size;
    for (int64_t i = 0; i < fitting; ++i) {
      const IntegerLayer layer(layers[i], table, num_threads);
      // All threads find the same; the first, which has a share of every layer, tells.
      const bool suits = serve(layer, table, team, own);
      if (team.rank == 0 && !suits) served.store(i);
      team.meet();
      if (served.load() <= i) return;  // one that has gone on may have stored a later layer
    }
  });
  return served.load();
}

}  // namespace interval
}  // namespace pyrobust
