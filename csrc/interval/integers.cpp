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

// Sums up what is known of each group; false where the input is better served, or only served, by
// the float kernels. (Groups ascending: the same answer however threads shared them.)
bool suits(IntegerInput* input, float* largest) {
  *largest = 0.0f;
  input->shifted = false;
  double widening = 0.0, radii = 0.0;
  for (int64_t g = 0; g < input->groups; ++g) {
    if (!rounding::is_finite(input->largest[g])) return false;
    *largest = std::max(*largest, input->largest[g]);
    input->shifted = input->shifted || input->shift[g] != 0;
    radii += input->radius_step[g] * static_cast<double>(input->spread[g]);
    widening += static_cast<double>(input->count(g)) *
                (0.25 * input->step[g] + 0.5 * input->radius_step[g]);
  }
  return widening <= kMostWidening * radii;
}

void mark_columns(const IntegerInput& input) {
  for (int64_t g = 0; g < input.groups; ++g) {
    uint8_t* ones = input.ones + g * input.stride;
    std::fill_n(ones, input.count(g), uint8_t{1});
    std::fill(ones + input.count(g), ones + input.stride, uint8_t{0});
  }
}

// Rows of a layer that one thread of a team makes.
struct RowShare {
  int64_t begin = 0, end = 0;

  RowShare(const IntegerLayer& layer, const Team& team) {
    if (team.rank >= layer.shares) return;
    begin = border(layer, team, team.rank);
    end = std::min(layer.weight.rows, border(layer, team, team.rank + 1));
  }

  static int64_t sharers(const IntegerLayer& layer, const Team& team) {
    return std::min(layer.shares, team.size);
  }

  // Where the rows of a thread begin.
  static int64_t border(const IntegerLayer& layer, const Team& team, int64_t rank) {
    const int64_t all = blocks(layer.weight.rows, kIntegerRows);
    return all * rank / sharers(layer, team) * kIntegerRows;
  }
};

// One thread's part in a chain. Integers of an input are made by every thread for itself, sooner
// than to wait for another core's; or, where the rows that each thread makes are whole groups of
// the next layer's input, by the thread that has their ends at hand, in one of two blocks that all
// share by turns.
class ChainThread {
 public:
  ChainThread(const IntegerKernels& table, const Team& team, char* own, char* shared, int64_t size)
      : table_(table), team_(team), own_(own), shared_(shared), size_(size) {}

  // False, and nothing is written, where the input does not suit.
  bool serve(const IntegerLayer& layer, const IntegerLayer* next) {
    const bool ready = ready_;
    ready_ = next != nullptr && hands_on(layer, *next);
    turn_ = 1 - turn_;
    if (team_.rank >= layer.shares) return true;
    IntegerMemory memory = layer.memory(own_);
    const Ends ends = ends_of(layer.call);
    if (ready) {
      take(layer, &memory.input);
    } else {
      make(layer, ends, &memory);
    }
    float largest;
    if (!suits(&memory.input, &largest)) return false;
    if (memory.input.shifted && layer.source != CodeSource::kRows) mark_columns(memory.input);
    const RowShare rows(layer, team_);
    make_rows(layer, rows, memory, offset_for(layer.call, largest));
    if (ready_) hand_on(*next, rows);
    return true;
  }

 private:
  static Ends ends_of(const Call& call) {
    return {call.lower, call.upper, call.weight.terms, call.floor()};
  }

  // Whether every thread's rows are whole groups, and no number of all ends is asked for first.
  bool hands_on(const IntegerLayer& layer, const IntegerLayer& next) const {
    const bool follows =
        next.call.lower == layer.call.out_lower && next.call.upper == layer.call.out_upper;
    if (!follows || next.call.rounding == Rounding::kDeployed) return false;
    const int64_t group = columns_of_group(next.weight);
    for (int64_t rank = 1; rank < RowShare::sharers(layer, team_); ++rank) {
      if (RowShare::border(layer, team_, rank) % group != 0) return false;
    }
    return true;
  }

  void make(const IntegerLayer& layer, const Ends& ends, IntegerMemory* memory) const {
    fetch_lines(ends.lower, ends.count * int64_t{sizeof(float)});
    fetch_lines(ends.upper, ends.count * int64_t{sizeof(float)});
    prepare(layer, ends, *memory, &memory->input, 0, memory->input.groups);
  }

  void prepare(const IntegerLayer& layer, const Ends& ends, const IntegerMemory& memory,
               IntegerInput* input, int64_t first, int64_t last) const {
    const IntegerConstants constants = integer_constants(layer.call, ends, input->groups);
    table_.prepare({ends, constants, memory.scratch, input, first, last});
    if (layer.source != CodeSource::kRows) table_.order(input, first, last);
  }

  // The integers that all threads have made.
  void take(const IntegerLayer& layer, IntegerInput* input) const {
    uint8_t* const ones = input->ones;
    *input = layer.memory(block(turn_)).input;
    input->ones = ones;
    const int64_t all = input->groups * input->stride;
    if (layer.source != CodeSource::kRows) {
      fetch_lines(input->quads, 4 * all);
    } else {
      fetch_lines(input->centre, all * int64_t{sizeof(int16_t)});
      fetch_lines(input->radius, all * int64_t{sizeof(int16_t)});
    }
  }

  void hand_on(const IntegerLayer& next, const RowShare& rows) const {
    if (rows.begin == rows.end) return;
    IntegerInput input = next.memory(block(1 - turn_)).input;
    const int64_t last = rows.end == next.weight.cols ? input.groups : rows.end / input.group;
    prepare(next, ends_of(next.call), next.memory(own_), &input, rows.begin / input.group, last);
  }

  void make_rows(const IntegerLayer& layer, const RowShare& rows, const IntegerMemory& memory,
                 double offset) const {
    const Call& call = layer.call;
    const IntegerConstants constants = integer_constants(call, ends_of(call), memory.input.groups);
    for (int64_t n = rows.begin; n < rows.end; n += kIntegerRows) {
      const int64_t count = std::min(kIntegerRows, rows.end - n);
      multiply(layer, table_, memory, n, count);
      call.report(table_.finish({memory.sums, memory.sums + kIntegerRows, shifted(call.bias, n),
                                 offset, count, call.out_lower + n, call.out_upper + n},
                                constants));
    }
  }

  char* block(int turn) const { return shared_ + turn * size_; }

  const IntegerKernels& table_;
  const Team& team_;
  char *own_, *shared_;
  int64_t size_;
  bool ready_ = false;  // whether the next layer's input is made by all
  int turn_ = 0;
};

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
  const Floats memory = floats((threads + 2) * (size / int64_t{sizeof(float)}));
  std::atomic<int64_t> served{fitting};
  run_together(static_cast<int>(threads), [&](const Team& team) {
    const DefaultFloatEnvironment environment;
    char* const shared = reinterpret_cast<char*>(memory.get());
    ChainThread thread(table, team, shared + (2 + team.rank) * size, shared, size);
    for (int64_t i = 0; i < fitting; ++i) {
      const IntegerLayer layer(layers[i], table, num_threads);
      const IntegerLayer next(layers[i + 1 < fitting ? i + 1 : i], table, num_threads);
      // All threads find the same; the first, which has a share of every layer, tells.
      const bool suits = thread.serve(layer, i + 1 < fitting ? &next : nullptr);
      if (team.rank == 0 && !suits) served.store(i);
      team.meet();
      if (served.load() <= i) return;  // one that has gone on may have stored a later layer
    }
  });
  return served.load();
}

}  // namespace interval
}  // namespace pyrobust
