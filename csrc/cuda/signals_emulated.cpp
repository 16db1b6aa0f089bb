// Signals of the emulation: phases are counted here, beside the eight bytes of shared memory that
// stand for them.
#include <array>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

#include "cuda/primitives.h"

namespace pyrobust {
namespace cuda {
namespace {

struct Signal {
  uint64_t grid = 0;
  const uint8_t* block = nullptr;  // whose thread `maker` made it
  unsigned maker = 0;
  bool shown = false;
  uint32_t arrivals = 0;  // of a phase
  uint32_t missing = 0;   // of this one
  int64_t bytes = 0;      // expected and not yet on their way; negative while early
  uint64_t phases = 0;    // that are over
  std::vector<fibres::Copy> under_way, complete;
  std::deque<std::array<float, 4>> sent;  // what copies of send16 read
};

std::unordered_map<SharedPlace, Signal> signals;
uint64_t outermost = 0;  // the grid that, with those ahead of it, `signals` belong to

bool made_here(const Signal& signal) {
  return signal.grid == fibres::grid_number() && signal.block == fibres::shared_memory() &&
         signal.maker == threadIdx.x;
}

Signal& signal_at(SharedPlace place) {
  const auto found = signals.find(place);
  if (found == signals.end() || found->second.grid != fibres::grid_number()) {
    fibres::fault("a signal that nobody has made");
  }
  return found->second;
}

// For others than its maker, and for copies.
Signal& shown_signal(SharedPlace place) {
  Signal& signal = signal_at(place);
  if (!signal.shown) fibres::fault("a signal that its maker has not shown");
  return signal;
}

Signal& own_or_shown(SharedPlace place) {
  Signal& signal = signal_at(place);
  return made_here(signal) ? signal : shown_signal(place);
}

void end_phase_if_complete(Signal& signal) {
  if (signal.missing != 0 || signal.bytes != 0) return;
  if (!signal.complete.empty()) {
    fibres::fault("a phase of a signal ended that nobody waited for before the next one did");
  }
  signal.missing = signal.arrivals;
  ++signal.phases;
  signal.complete.insert(signal.complete.end(), signal.under_way.begin(), signal.under_way.end());
  signal.under_way.clear();
}

void arrive(Signal& signal) {
  if (signal.missing == 0) fibres::fault("more arrivals than a phase of the signal has");
  --signal.missing;
  end_phase_if_complete(signal);
}

void start(Signal& signal, const fibres::Copy& copy) {
  signal.under_way.push_back(copy);
  if (fibres::options().copies_land_at_once) fibres::land({copy});
  signal.bytes -= static_cast<int64_t>(copy.bytes);
  end_phase_if_complete(signal);
}

}  // namespace

void make_signal(SharedPlace place, uint32_t arrivals) {
  fibres::check_shared(reinterpret_cast<const void*>(place), 8, "make_signal");
  if (outermost != fibres::outermost_grid()) signals.clear();
  outermost = fibres::outermost_grid();
  Signal& signal = signals[place];
  signal = Signal();
  signal.arrivals = signal.missing = arrivals;
  signal.grid = fibres::grid_number();
  signal.block = fibres::shared_memory();
  signal.maker = threadIdx.x;
}

void show_signals() {
  for (auto& each : signals) {
    if (made_here(each.second)) each.second.shown = true;
  }
  fibres::show_writes();
}

void arrive_at(SharedPlace place) { arrive(own_or_shown(place)); }

void arrive_expecting(SharedPlace place, uint32_t bytes) {
  Signal& signal = own_or_shown(place);
  signal.bytes += bytes;
  arrive(signal);
}

void arrive_with_copies(SharedPlace place) {
  Signal& signal = own_or_shown(place);
  const std::vector<fibres::Copy> copies = fibres::take_copies();
  signal.under_way.insert(signal.under_way.end(), copies.begin(), copies.end());
  arrive(signal);
}

void await_signal(SharedPlace place, uint32_t parity) {
  while ((own_or_shown(place).phases & 1) == (parity & 1)) fibres::yield_while_spinning();
  Signal& signal = signal_at(place);
  fibres::land(signal.complete);
  signal.complete.clear();
}

void copy_bulk(SharedPlace to, const void* from, uint32_t bytes, SharedPlace signal) {
  auto* const first = reinterpret_cast<uint8_t*>(to);
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fibres::fault("a bulk copy that is not of whole, aligned vectors");
  }
  fibres::check_shared(first, 16, "copy_bulk");
  fibres::check_shared(first + bytes - 16, 16, "copy_bulk");
  fibres::check_shown(first, bytes, "a bulk copy");
  start(shown_signal(signal), {first, from, bytes, 0, true});
}

void send16(SharedPlace to, const float (&values)[4], uint32_t rank, SharedPlace place) {
  fibres::check_shared(reinterpret_cast<const void*>(to), 16, "send16");
  uint8_t* theirs = fibres::shared_memory_of(static_cast<int>(rank));
  const auto ours = reinterpret_cast<SharedPlace>(fibres::shared_memory());
  Signal& signal = shown_signal(reinterpret_cast<SharedPlace>(theirs + (place - ours)));
  signal.sent.push_back({values[0], values[1], values[2], values[3]});
  start(signal, {theirs + (to - ours), signal.sent.back().data(), 16, 0, true});
}

}  // namespace cuda
}  // namespace pyrobust
