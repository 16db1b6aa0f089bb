// What fibres.cpp and fibres_memory.cpp share: the state of a grid on fibres.
#pragma once

#include <ucontext.h>

#include <array>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/fibres.h"

namespace pyrobust {
namespace cuda {
namespace fibres {

struct Block;

// One warp-wide operation in progress.
struct Warp {
  const char* name = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  alignas(16) uint8_t input[kWarp][kSlot];
  alignas(16) uint8_t output[kWarp][kSlot];
};

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};

// Blocks that run together and see each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
  Barrier halves;  // of which threads arrive and wait apart
};

struct Block {
  Dim3 index;
  Cluster* cluster = nullptr;
  unsigned ended = 0;  // threads
  std::unique_ptr<uint8_t[]> storage;
  uint8_t* shared = nullptr;
  std::vector<Warp> warps;
  Barrier whole;
  Barrier groups[15];
  // Of every 16 bytes of shared memory: 1 + the thread whose ordinary write, a landed copy too, no
  // fence has shown to the asynchronous proxy yet; 0 where there is none.
  std::vector<uint16_t> hidden_by;
};

struct Fibre {
  ucontext_t context;
  void* stack_pointer = nullptr;
  std::unique_ptr<uint8_t[]> stack;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;
  bool spinning = false;
  bool awaited = false;                // the grid ahead
  const uint64_t* waits_on = nullptr;  // runnable once *waits_on differs from `seen`
  uint64_t seen = 0;
  uint64_t half_seen = 0;  // generation of the cluster's barrier in halves
  const char* waits_for = "";
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
  std::vector<size_t> hidden;  // marks of this thread, see Block::hidden_by
  Products products;
};

struct Scheduler {
  const std::function<void()>* body = nullptr;
  Fibre* current = nullptr;
  ucontext_t main;
  void* main_stack_pointer = nullptr;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool progress = false;
  std::exception_ptr error;
  uint64_t number = 0;  // of the grid
  // The grid ahead, which has not begun, and whether it is done (a generation to wait for).
  const std::function<void()>* ahead = nullptr;
  bool overlaps = false;
  uint64_t ahead_done = 0;
};

extern Scheduler scheduler;
extern Options chosen;
extern Counters counted;

void wait_for(const uint64_t* generation, const char* what);

}  // namespace fibres
}  // namespace cuda
}  // namespace pyrobust
