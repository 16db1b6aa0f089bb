#include "runtime/kept_memory.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "runtime/pages.h"

namespace pyrobust {
namespace {

constexpr int64_t kSmallPage = 4096, kLargePage = int64_t{2} << 20;
constexpr int64_t kAnySmallPage = int64_t{64} << 10;  // of every processor
// Smaller blocks are malloc's business, which keeps them itself.
constexpr int64_t kLeastKept = int64_t{64} << 10;
constexpr int64_t kLeastLarge = int64_t{1} << 20;

std::align_val_t alignment_of(int64_t bytes) {
  return static_cast<std::align_val_t>(bytes >= kLeastLarge ? kLargePage : 64);
}

// Of whole pages. The last large page of results that somebody holds for long would be half empty
// on average: theirs ends in small ones.
int64_t whole_size(int64_t bytes, Use use) {
  int64_t unit = 64;
  if (use == Use::kResult || bytes >= kLeastLent) {
    unit = kAnySmallPage;
  } else if (bytes >= kLeastKept) {
    unit = bytes >= kLeastLarge ? kLargePage : kSmallPage;
  }
  return std::max(unit, (bytes + unit - 1) / unit * unit);
}

KeptBlock fresh_block(int64_t whole) {
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
  static constexpr int kPlaces = 32;
  // A block makes room for others once so many came after it. Were it at once, passes that need
  // more than the limit, each block at its time, would find none of theirs.
  static constexpr int64_t kPatience = 64;
  std::atomic<int64_t> limit;
  const bool lends;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  KeptBlock blocks[kPlaces] = {};
  int64_t times[kPlaces] = {};  // when they came, in blocks given back
  int64_t now = 0;
  int count = 0;
  std::atomic<int64_t> bytes{0};

  constexpr Shelf(int64_t limit, bool lends) : limit(limit), lends(lends) {}

  KeptBlock remove(int at) {
    const KeptBlock block = blocks[at];
    std::copy(blocks + at + 1, blocks + count, blocks + at);
    std::copy(times + at + 1, times + count, times + at);
    --count;
    bytes -= block.bytes;
    return block;
  }

  void free_beyond(int64_t most) {
    while (count > 0 && bytes > most) free_block(remove(0));
  }

  void add(const KeptBlock& block) {
    const int64_t room = limit - block.bytes;
    ++now;
    while (count > 0 && (count == kPlaces || bytes > room) && now - times[0] > kPatience) {
      free_block(remove(0));
    }
    if (count == kPlaces || bytes > room) return free_block(block);
    blocks[count] = block;
    times[count++] = now;
    bytes += block.bytes;
  }

  // The smallest that is large enough, and not so large that another call would miss it, or that
  // results which somebody holds for long would hold much more than they need.
  int find(int64_t wanted, Use use) const {
    const bool close = lends || use == Use::kResult;
    const int64_t most = close ? wanted + wanted / 4 : std::max(2 * wanted, kLargePage);
    int best = -1;
    for (int i = 0; i < count; ++i) {
      const int64_t size = blocks[i].bytes;
      if (size < wanted || size > most) continue;
      if (best < 0 || size < blocks[best].bytes) best = i;
    }
    return best;
  }
};

Shelf small_shelf(kKeptBytes, false), large_shelf(kLentBytes, true);

Shelf* shelf_of(int64_t bytes) {
  if (bytes < kLeastKept) return nullptr;
  Shelf* const shelf = bytes >= kLeastLent ? &large_shelf : &small_shelf;
  return bytes <= shelf->limit ? shelf : nullptr;
}

// Whoever finds the shelf in use goes to the system instead: nobody waits, and a process forked
// meanwhile does not wait for ever.
class Turn {
 public:
  explicit Turn(Shelf& shelf)
      : shelf_(shelf), granted_(!shelf.taken.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (granted_) shelf_.taken.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  bool granted() const { return granted_; }

 private:
  Shelf& shelf_;
  const bool granted_;
};

}  // namespace

KeptBlock take_block(int64_t bytes, Use use) {
  const int64_t whole = whole_size(bytes, use);
  if (Shelf* const shelf = shelf_of(whole)) {
    const Turn turn(*shelf);
    const int at = turn.granted() ? shelf->find(whole, use) : -1;
    if (at >= 0) return shelf->remove(at);
  }
  return fresh_block(whole);
}

void give_back(const KeptBlock& block) noexcept {
  if (block.memory == nullptr) return;
  Shelf* const shelf = shelf_of(block.bytes);
  if (shelf != nullptr && (!shelf->lends || lend_pages(block.memory, block.bytes))) {
    const Turn turn(*shelf);
    if (turn.granted()) return shelf->add(block);
  }
  free_block(block);
}

int64_t lent_limit() { return large_shelf.limit; }

int64_t lent_bytes() { return large_shelf.bytes; }

void set_lent_limit(int64_t bytes) {
  large_shelf.limit = bytes;
  const Turn turn(large_shelf);
  if (turn.granted()) large_shelf.free_beyond(bytes);
}

}  // namespace pyrobust
