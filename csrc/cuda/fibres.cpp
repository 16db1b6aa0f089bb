#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/fibres_state.h"

pyrobust::cuda::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pyrobust {
namespace cuda {
namespace fibres {

Scheduler scheduler;
Options chosen;
Counters counted;

namespace {

constexpr size_t kStackBytes = 192 * 1024;
constexpr uintptr_t kAlignment = 1024;  // of shared memory
constexpr int64_t kResidentThreads = 8192;
constexpr int64_t kIdlePasses = 64;  // over fibres that only spin, before that counts as a deadlock

uint64_t grids = 0, outermost = 0;
int nested = 0;  // grids that wait for one ahead of them

// A launch that waits for the next one.
struct Held {
  Grid grid;
  std::function<void()> thread;
};
std::unique_ptr<Held> held;

std::vector<std::unique_ptr<uint8_t[]>> spare_stacks;

// --- switching stacks ---------------------------------------------------------------------------
// swapcontext makes two system calls a switch, which is most of its time; on x86-64 the eight
// registers that a function must keep are moved by hand instead.
#if defined(__x86_64__)
extern "C" void pyrobust_switch_stack(void** from, void* to);
asm(R"(
.text
.local pyrobust_switch_stack
.type pyrobust_switch_stack, @function
pyrobust_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyrobust_switch_stack, .-pyrobust_switch_stack
)");
#endif

void leave_fibre() {
#if defined(__x86_64__)
  pyrobust_switch_stack(&scheduler.current->stack_pointer, scheduler.main_stack_pointer);
#else
  swapcontext(&scheduler.current->context, &scheduler.main);
#endif
}

void run_thread() {
  Fibre& fibre = *scheduler.current;
  try {
    (*scheduler.body)();
    if (!fibre.open.empty() || !fibre.committed.empty()) {
      fault("a thread ended before its asynchronous copies were waited for");
    }
    if (!fibre.products.open.empty() || !fibre.products.committed.empty()) {
      fault("a thread ended before its products were finished");
    }
    if (scheduler.overlaps && !fibre.awaited) {
      fault("a thread ended that never waited for the grid ahead, which it overlaps");
    }
  } catch (...) {
    if (!scheduler.error) scheduler.error = std::current_exception();
  }
  fibre.done = true;
  ++fibre.block->ended;
  scheduler.progress = true;
  leave_fibre();
}

void prepare_stack(Fibre& fibre) {
  if (spare_stacks.empty()) {
    fibre.stack.reset(new uint8_t[kStackBytes]);
  } else {
    fibre.stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
  }
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fibre.stack.get() + kStackBytes) & ~uintptr_t{15};
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where run_thread's return address would be; keeps the stack aligned
  *--slot = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
  fibre.stack_pointer = slot;
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, &run_thread, 0);
#endif
}

void resume(Fibre& fibre) {
  scheduler.current = &fibre;
  threadIdx = {fibre.thread, 0, 0};
  blockIdx = fibre.block->index;
  ++counted.switches;
#if defined(__x86_64__)
  pyrobust_switch_stack(&scheduler.main_stack_pointer, fibre.stack_pointer);
#else
  swapcontext(&scheduler.main, &fibre.context);
#endif
  scheduler.current = nullptr;
}

void arrive_and_wait(Barrier* barrier, unsigned threads, const char* what) {
  scheduler.progress = true;
  if (++barrier->arrived == threads) {
    barrier->arrived = 0;
    ++barrier->generation;
    return;
  }
  wait_for(&barrier->generation, what);
}

bool runnable(Fibre& fibre) {
  if (fibre.done) return false;
  if (fibre.waits_on == nullptr) return true;
  if (*fibre.waits_on == fibre.seen) return false;
  fibre.waits_on = nullptr;
  return true;
}

[[noreturn]] void report_deadlock(const std::vector<Fibre>& fibres) {
  std::string text = "cuda fibres: deadlock;";
  int named = 0;
  for (const Fibre& fibre : fibres) {
    if (fibre.done || ++named > 4) continue;
    text += " block " + std::to_string(fibre.block->index.x) + " thread " +
            std::to_string(fibre.thread) + " waits for " +
            (fibre.spinning ? "another block" : fibre.waits_for) + ";";
  }
  const auto ended =
      std::count_if(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.done; });
  throw std::logic_error(text + " " + std::to_string(ended) + " of " +
                         std::to_string(fibres.size()) + " threads have ended");
}

// The grid ahead, while all of this one waits.
void run_ahead() {
  const Scheduler own = scheduler;
  const Dim3 block = blockDim, grid = gridDim;
  ++nested;
  try {
    (*own.ahead)();
  } catch (...) {
    --nested;
    throw;
  }
  --nested;
  scheduler = own;
  scheduler.ahead = nullptr;
  ++scheduler.ahead_done;
  blockDim = block;
  gridDim = grid;
}

void run_until_done(std::vector<Fibre>& fibres) {
  const auto count = static_cast<int64_t>(fibres.size());
  const bool ascending = chosen.order == Order::kAscending;
  int64_t idle = 0;
  for (int64_t done = 0; done < count;) {
    scheduler.progress = false;
    bool any = false;
    done = 0;
    for (int64_t i = 0; i < count; ++i) {
      Fibre& fibre = fibres[static_cast<size_t>(ascending ? i : count - 1 - i)];
      if (runnable(fibre)) {
        any = true;
        const bool spun = fibre.spinning;
        fibre.spinning = false;
        resume(fibre);
        if (!(spun && fibre.spinning)) scheduler.progress = true;
      }
      if (scheduler.error) std::rethrow_exception(scheduler.error);
      done += fibre.done;
    }
    idle = scheduler.progress ? 0 : idle + 1;
    if (done == count || (any && idle <= kIdlePasses)) continue;
    if (scheduler.ahead == nullptr) report_deadlock(fibres);
    run_ahead();
    idle = 0;
  }
}

void run_blocks(const Grid& grid, int64_t first, int64_t last) {
  std::vector<Block> blocks(static_cast<size_t>(last - first));
  std::vector<Fibre> fibres(blocks.size() * grid.threads.x);
  std::vector<Cluster> clusters(blocks.size() / grid.cluster);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const auto index = static_cast<unsigned>(first + static_cast<int64_t>(b));
    Block& block = blocks[b];
    block.index = {index % grid.blocks.x, index / grid.blocks.x, 0};
    block.cluster = &clusters[b / grid.cluster];
    block.cluster->blocks.push_back(&block);
    block.storage.reset(new uint8_t[grid.shared_bytes + kAlignment]);
    const auto address =
        (reinterpret_cast<uintptr_t>(block.storage.get()) + kAlignment - 1) & ~(kAlignment - 1);
    block.shared = reinterpret_cast<uint8_t*>(address);
    std::memset(block.shared, 0xff, grid.shared_bytes);
    block.hidden_by.assign(grid.shared_bytes / kUnit + 1, 0);
    block.warps = std::vector<Warp>(grid.threads.x / kWarp);
    for (unsigned t = 0; t < grid.threads.x; ++t) {
      Fibre& fibre = fibres[b * grid.threads.x + t];
      fibre.block = &block;
      fibre.thread = t;
      prepare_stack(fibre);
    }
  }
  run_until_done(fibres);
  for (Fibre& fibre : fibres) spare_stacks.push_back(std::move(fibre.stack));
}

}  // namespace

void wait_for(const uint64_t* generation, const char* what) {
  Fibre& fibre = *scheduler.current;
  fibre.waits_on = generation;
  fibre.seen = *generation;
  fibre.waits_for = what;
  leave_fibre();
}

void set_options(const Options& options) {
  chosen = options;
  held.reset();
}
const Options& options() { return chosen; }
Counters& counters() { return counted; }
uint64_t grid_number() { return scheduler.number; }
uint64_t outermost_grid() { return outermost; }
Products& products() { return scheduler.current->products; }

void fault(const char* what) {
  throw std::logic_error("cuda fibres: block " + std::to_string(blockIdx.x) + " thread " +
                         std::to_string(threadIdx.x) + ": " + what);
}

void run_grid(const Grid& grid, const std::function<void()>& thread,
              const std::function<void()>* ahead) {
  if (grid.threads.x == 0 || grid.threads.x % kWarp != 0 || grid.threads.x > 1024 ||
      grid.threads.y != 1 || grid.threads.z != 1 || grid.blocks.z != 1) {
    throw std::logic_error("cuda fibres: a block must be 32 to 1024 threads, whole warps, along x");
  }
  if (grid.cluster == 0 || grid.cluster > 8 || grid.blocks.x % grid.cluster != 0) {
    throw std::logic_error("cuda fibres: a cluster must be 1 to 8 blocks that divide the grid");
  }
  scheduler = Scheduler();
  scheduler.number = ++grids;
  scheduler.ahead = ahead;
  scheduler.overlaps = ahead != nullptr;
  if (nested == 0) outermost = scheduler.number;
  scheduler.body = &thread;
  scheduler.shared_bytes = grid.shared_bytes;
  scheduler.cluster = grid.cluster;
  blockDim = grid.threads;
  gridDim = grid.blocks;
  const int64_t blocks = static_cast<int64_t>(grid.blocks.x) * grid.blocks.y;
  const int64_t resident = kResidentThreads / grid.threads.x / grid.cluster * grid.cluster;
  const int64_t wave = std::max<int64_t>(grid.cluster, resident);
  for (int64_t first = 0; first < blocks; first += wave) {
    run_blocks(grid, first, std::min(blocks, first + wave));
  }
}

void launch(const Grid& grid, bool overlaps, const std::function<void()>& thread) {
  if (!chosen.hold_launches) return run_grid(grid, thread);
  if (held == nullptr) {
    held.reset(new Held{grid, thread});
    return;
  }
  const std::unique_ptr<Held> first = std::move(held);
  if (!overlaps) {
    throw std::logic_error("cuda fibres: a launch was held for one that does not overlap it");
  }
  const std::function<void()> ahead = [&] { run_grid(first->grid, first->thread); };
  run_grid(grid, thread, &ahead);
}

int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

void block_barrier() { arrive_and_wait(&scheduler.current->block->whole, blockDim.x, "a barrier"); }

void group_barrier(int group, unsigned threads) {
  if (group < 0 || group >= 15 || threadIdx.x / threads != static_cast<unsigned>(group)) {
    fault("a thread at the barrier of another group");
  }
  arrive_and_wait(&scheduler.current->block->groups[group], threads, "a group's barrier");
}

void cluster_barrier() {
  arrive_and_wait(&scheduler.current->block->cluster->barrier, blockDim.x * scheduler.cluster,
                  "a cluster's barrier");
}

void begin_cluster_barrier() {
  Barrier& barrier = scheduler.current->block->cluster->halves;
  Fibre& fibre = *scheduler.current;
  fibre.half_seen = barrier.generation;
  scheduler.progress = true;
  if (++barrier.arrived < blockDim.x * scheduler.cluster) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

void end_cluster_barrier() {
  const Barrier& barrier = scheduler.current->block->cluster->halves;
  if (barrier.generation == scheduler.current->half_seen) {
    wait_for(&barrier.generation, "a cluster's barrier");
  }
}

void await_grid() {
  scheduler.current->awaited = true;
  if (scheduler.ahead != nullptr) wait_for(&scheduler.ahead_done, "the grid ahead");
}

void yield_while_spinning() {
  scheduler.current->spinning = true;
  leave_fibre();
}

void rendezvous(const char* name, const void* input, size_t input_bytes, void* output,
                size_t output_bytes, WarpOperation operation) {
  Fibre& fibre = *scheduler.current;
  Warp& warp = fibre.block->warps[fibre.thread / kWarp];
  const size_t lane = fibre.thread % kWarp;
  scheduler.progress = true;
  if (warp.arrived == 0) warp.name = name;
  if (std::strcmp(warp.name, name) != 0) {
    fault((std::string("lanes of one warp are in ") + warp.name + " and in " + name).c_str());
  }
  std::memcpy(warp.input[lane], input, input_bytes);
  if (++warp.arrived < kWarp) {
    wait_for(&warp.generation, name);
  } else {
    operation(warp.input, warp.output);
    warp.arrived = 0;
    ++warp.generation;
  }
  std::memcpy(output, warp.output[lane], output_bytes);
}

}  // namespace fibres
}  // namespace cuda
}  // namespace pyrobust
