#include "runtime/kept_memory.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "runtime/pages.h"

namespace pyrobust {
namespace {

constexpr int64_t kSmallPage = 4096, kLargePage = int64_t{2} << 20;
// Smaller blocks are malloc's business, which keeps them itself.
constexpr int64_t kLeastKept = int64_t{64} << 10;
constexpr int64_t kLeastLarge = int64_t{1} << 20;

std::align_val_t alignment_of(int64_t bytes) {
  return static_cast<std::align_val_t>(bytes >= kLeastLarge ? kLargePage : 64);
}

KeptBlock fresh_block(int64_t bytes) {
  const int64_t unit = bytes >= kLeastLarge ? kLargePage : bytes >= kLeastKept ? kSmallPage : 64;
  const int64_t whole = std::max(unit, (bytes + unit - 1) / unit * unit);
  void* memory = operator new[](static_cast<size_t>(whole), alignment_of(whole));
  if (whole >= kLeastLarge) ask_large_pages(memory, whole);
  return {memory, whole};
}

void free_block(const KeptBlock& block) noexcept {
  operator delete[](block.memory, alignment_of(block.bytes));
}

// The blocks that nobody owns, in the order in which they came. Trivial to destroy, so that
// threads may give back while the process ends.
struct Shelf {
  static constexpr int kPlaces = 16;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  KeptBlock blocks[kPlaces] = {};
  int count = 0;
  int64_t bytes = 0;

  KeptBlock remove(int at) {
    const KeptBlock block = blocks[at];
    std::copy(blocks + at + 1, blocks + count, blocks + at);
    --count;
    bytes -= block.bytes;
    return block;
  }

  // The smallest that is large enough, and not so large that another call would miss it.
  int find(int64_t wanted) const {
    int best = -1;
    for (int i = 0; i < count; ++i) {
      const int64_t size = blocks[i].bytes;
      if (size < wanted || size > std::max(2 * wanted, kLargePage)) continue;
      if (best < 0 || size < blocks[best].bytes) best = i;
    }
    return best;
  }
};

Shelf shelf;

// Whoever finds the shelf in use goes to the system instead: nobody waits, and a process forked
// meanwhile does not wait for ever.
class Turn {
 public:
  Turn() : granted_(!shelf.taken.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (granted_) shelf.taken.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  bool granted() const { return granted_; }

 private:
  const bool granted_;
};

}  // namespace

KeptBlock take_block(int64_t bytes) {
  if (bytes >= kLeastKept && bytes <= kKeptBytes) {
    const Turn turn;
    const int at = turn.granted() ? shelf.find(bytes) : -1;
    if (at >= 0) return shelf.remove(at);
  }
  return fresh_block(bytes);
}

void give_back(const KeptBlock& block) noexcept {
  if (block.memory == nullptr) return;
  if (block.bytes >= kLeastKept && block.bytes <= kKeptBytes) {
    const Turn turn;
    if (turn.granted()) {
      while (shelf.count == Shelf::kPlaces || shelf.bytes + block.bytes > kKeptBytes) {
        free_block(shelf.remove(0));
      }
      shelf.blocks[shelf.count++] = block;
      shelf.bytes += block.bytes;
      return;
    }
  }
  free_block(block);
}

}  // namespace pyrobust
