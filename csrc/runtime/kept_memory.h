// Working memory of whole calls and large results, kept for those that follow: pages fresh from the
// system cost a product of 128 x 1024 x 1024 a quarter of its time (Zen 4). scratch.h keeps memory
// of one thread; these blocks have any owner, and any thread may give them back.
#pragma once

#include <cstdint>

namespace pyrobust {

struct KeptBlock {
  void* memory;
  int64_t bytes;  // at least what was asked for
};

// 64-byte aligned, with whatever its last owner wrote. Blocks of a megabyte and more are whole
// large pages where the system has them: pages of 4 KiB lie anywhere and share sets of a
// second-level cache at random. Throws std::bad_alloc.
enum class Use { kWork, kResult };  // of one call, or perhaps held for long
KeptBlock take_block(int64_t bytes, Use use = Use::kWork);

void give_back(const KeptBlock& block) noexcept;

// Blocks of so many bytes and more are lent to the system while nobody has them (lend_pages), up to
// a limit; up to kKeptBytes of smaller ones stay. What nobody took for long makes room.
constexpr int64_t kLeastLent = int64_t{4} << 20;

// With AddressSanitizer nothing stays unless it is asked for, so that it sees what is used too
// late.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kKeptBytes = 0, kLentBytes = 0;
#else
constexpr int64_t kKeptBytes = int64_t{32} << 20, kLentBytes = int64_t{256} << 20;
#endif

// How many bytes of large blocks may be kept, and how many are.
int64_t lent_limit();
int64_t lent_bytes();
// Frees what is beyond; where another thread uses the shelf just then, that is left to it.
void set_lent_limit(int64_t bytes);

}  // namespace pyrobust
