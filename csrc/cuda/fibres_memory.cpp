// Shared memory of fibres: whose it is, copies into it, and what the asynchronous proxy sees of it.
#include <cstring>
#include <string>

#include "cuda/fibres_state.h"

namespace pyrobust {
namespace cuda {
namespace fibres {

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<uint8_t*>(copy.to) + copy.bytes, 0, copy.zero_bytes);
    if (!copy.bulk) note_write(copy.to, copy.bytes + copy.zero_bytes);
  }
}

uint8_t* shared_memory() { return scheduler.current->block->shared; }

uint8_t* shared_memory_of(int rank) {
  const Cluster& cluster = *scheduler.current->block->cluster;
  if (rank < 0 || static_cast<size_t>(rank) >= cluster.blocks.size()) {
    fault("a load from a block that the cluster does not have");
  }
  const Block& block = *cluster.blocks[static_cast<size_t>(rank)];
  if (block.ended == blockDim.x) fault("a load from a block of the cluster that has ended");
  return block.shared;
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  const auto* at = static_cast<const uint8_t*>(address);
  const uint8_t* shared = shared_memory();
  if (at < shared || at + bytes > shared + scheduler.shared_bytes) {
    fault((std::string(operation) + " outside of shared memory").c_str());
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fault((std::string(operation) + " at a misaligned address").c_str());
  }
}

// --- the asynchronous proxy ---------------------------------------------------------------------

namespace {

// Of units of 16 bytes: the first and what follows the last.
std::pair<size_t, size_t> units_of(const Block& block, const void* at, size_t bytes) {
  const auto first = static_cast<size_t>(static_cast<const uint8_t*>(at) - block.shared);
  return {first / kUnit, (first + bytes + kUnit - 1) / kUnit};
}

bool is_shared(const Block& block, const void* at) {
  const auto* address = static_cast<const uint8_t*>(at);
  return address >= block.shared && address < block.shared + scheduler.shared_bytes;
}

}  // namespace

void note_write(const void* at, size_t bytes) {
  Fibre& fibre = *scheduler.current;
  Block& block = *fibre.block;
  if (!is_shared(block, at)) return;
  const auto own = static_cast<uint16_t>(1 + fibre.thread);
  const auto units = units_of(block, at, bytes);
  for (size_t unit = units.first; unit < units.second; ++unit) {
    if (block.hidden_by[unit] == own) continue;
    block.hidden_by[unit] = own;
    fibre.hidden.push_back(unit);
  }
}

void show_writes() {
  Fibre& fibre = *scheduler.current;
  for (const size_t unit : fibre.hidden) {
    uint16_t& mark = fibre.block->hidden_by[unit];
    if (mark == 1 + fibre.thread) mark = 0;
  }
  fibre.hidden.clear();
}

void check_shown(const void* at, size_t bytes, const char* what) {
  const Block& block = *scheduler.current->block;
  const auto units = units_of(block, at, bytes);
  for (size_t unit = units.first; unit < units.second; ++unit) {
    if (block.hidden_by[unit] == 0) continue;
    fault((std::string(what) + " meets a write of thread " +
           std::to_string(block.hidden_by[unit] - 1) + " that no fence has shown to it")
              .c_str());
  }
}

// --- copies -------------------------------------------------------------------------------------

void start_copy(void* shared, const void* global, size_t bytes, size_t zero_bytes) {
  ++counted.async_copies;
  check_shared(shared, bytes + zero_bytes, "an asynchronous copy");
  if (reinterpret_cast<uintptr_t>(global) % (bytes + zero_bytes) != 0) {
    fault("an asynchronous copy from a misaligned address");
  }
  const Copy copy = {shared, global, bytes, zero_bytes, false};
  if (chosen.copies_land_at_once) {
    land({copy});
  } else {
    scheduler.current->open.push_back(copy);
  }
}

void commit_copies() {
  Fibre& fibre = *scheduler.current;
  fibre.committed.push_back(std::move(fibre.open));
  fibre.open.clear();
}

std::vector<Copy> take_copies() {
  Fibre& fibre = *scheduler.current;
  std::vector<Copy> taken;
  for (const auto& group : fibre.committed) taken.insert(taken.end(), group.begin(), group.end());
  taken.insert(taken.end(), fibre.open.begin(), fibre.open.end());
  fibre.committed.clear();
  fibre.open.clear();
  return taken;
}

void wait_copies(int groups_left) {
  auto& committed = scheduler.current->committed;
  while (static_cast<int>(committed.size()) > groups_left) {
    land(committed.front());
    committed.pop_front();
  }
}

}  // namespace fibres
}  // namespace cuda
}  // namespace pyrobust
