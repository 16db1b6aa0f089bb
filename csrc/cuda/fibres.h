// A CUDA grid on one CPU thread: what the kernels' source sees when a host compiler builds it.
//
// Every thread of every resident block is a fibre with a stack of its own. A barrier is a yield
// until the whole block has arrived; a warp-wide operation is a rendezvous of 32 fibres, whose last
// computes the result for all; an asynchronous copy lands only when its thread waits for it; shared
// memory begins as 0xff bytes, NaN in every float format. So a missing wait, barrier or write shows
// in the result, in one of the two orders of fibres, instead of passing by luck.
//
// Products of warpgroups are made when they are waited for, from the registers and the shared
// memory that they find then. They and bulk copies belong to the asynchronous proxy: writes by
// copy16_async, store8, store16 and store16_shared are hidden from it until their thread fences.
// Stores through plain pointers are not tracked.
//
// Faults of a kernel (a barrier that some threads never reach, lanes of a warp in different
// operations, addresses outside of shared memory, misaligned vectors) throw std::logic_error from
// run_grid. What this cannot show: memory order between barriers, and speed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

namespace pyrobust {
namespace cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace fibres {

constexpr int kWarp = 32;
constexpr size_t kUnit = 16;  // bytes that are hidden from the asynchronous proxy together
constexpr size_t kSlot = 64;  // bytes that a lane hands to a warp-wide operation, and gets back

struct Grid {
  Dim3 blocks;
  Dim3 threads;  // of a block; x a multiple of 32, y = z = 1
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // consecutive blocks along x; y = 1 where it is more
};

// In which order runnable fibres run; a correct kernel gives one result for all.
enum class Order : int { kAscending, kDescending };

// How emulated tensor cores add the products of one mma to the accumulator.
//   kExact       in float64, rounded once: as good as it gets
//   kTruncating  in blocks of four products, aligned to the largest exponent and cut: V100's way,
//                the coarsest that the literature documents
enum class TensorSum : int { kExact, kTruncating };

struct Options {
  Order order = Order::kAscending;
  TensorSum tensor_sum = TensorSum::kExact;
  bool copies_land_at_once = false;  // products too; hides missing waits; only to compare with
  // Of two launches the first is held until the second has come, which must overlap it
  // (LaunchShape) and runs before it up to await_grid.
  bool hold_launches = false;
};
void set_options(const Options& options);
const Options& options();

// What a grid did, since the last reset.
struct Counters {
  int64_t switches = 0;          // of fibres
  int64_t matrix_conflicts = 0;  // ldmatrix phases whose eight rows share banks, extra cycles
  int64_t async_copies = 0;
  int64_t matrix_products = 0;  // mma instructions, one a warp
};
Counters& counters();

// Runs `thread` once per thread of the grid. All blocks are resident together where that is at most
// 8192 threads, so that blocks may wait for one another; else they run in waves of that size.
// `ahead` runs once all fibres wait in await_grid.
void run_grid(const Grid& grid, const std::function<void()>& thread,
              const std::function<void()>* ahead = nullptr);

// The same as a launch: later, with Options::hold_launches.
void launch(const Grid& grid, bool overlaps, const std::function<void()>& thread);

// --- for the emulated primitives; called from within a fibre ------------------------------------

uint8_t* shared_memory();
// Of block `rank` of this block's cluster. Throws where that block's threads have all ended.
uint8_t* shared_memory_of(int rank);
// Throws unless [address, address + bytes) is in this block's shared memory and aligned to `bytes`.
void check_shared(const void* address, size_t bytes, const char* operation);
[[noreturn]] void fault(const char* what);
int lane_index();
void block_barrier();
void group_barrier(int group, unsigned threads);  // consecutive threads, `group`-th such run
void cluster_barrier();
void begin_cluster_barrier();  // every thread once, and not again before it has ended
void end_cluster_barrier();
void yield_while_spinning();
void await_grid();

// All 32 lanes hand in `input`; the last to arrive runs `operation` over the 32 inputs and outputs;
// every lane gets its output. `name` must be the same string in all lanes.
using WarpOperation = void (*)(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]);
void rendezvous(const char* name, const void* input, size_t input_bytes, void* output,
                size_t output_bytes, WarpOperation operation);

void start_copy(void* shared, const void* global, size_t bytes, size_t zero_bytes);
void commit_copies();
void wait_copies(int groups_left);

// Copies under way, for signals (cuda/signals_emulated.cpp).
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zero_bytes;
  bool bulk;  // by the asynchronous proxy
};
std::vector<Copy> take_copies();  // of this thread: whoever takes them lets them land
void land(const std::vector<Copy>& copies);
uint64_t grid_number();     // another one for every grid
uint64_t outermost_grid();  // the number of the one that others run ahead of

// The asynchronous proxy: what this thread writes is hidden from it until show_writes().
void note_write(const void* at, size_t bytes);
void show_writes();
void check_shown(const void* at, size_t bytes, const char* what);

// Products of a warpgroup that a thread has begun (cuda/products_emulated.h).
using Registers = std::array<uint32_t, 4>;
using Multiply = void (*)(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
struct Product {
  float* sums;  // eights of four
  const uint32_t* a;
  Registers issued;  // what a was
  uint64_t b;
  int eights;
  bool onto;
  Multiply multiply;
};
struct Products {
  bool fenced = false;
  std::vector<std::pair<const uint32_t*, Registers>> since_fence;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};
Products& products();

}  // namespace fibres
}  // namespace cuda
}  // namespace pyrobust

// CUDA's own names, valid within a fibre. One grid at a time in a process.
extern pyrobust::cuda::Dim3 threadIdx, blockIdx, blockDim, gridDim;
