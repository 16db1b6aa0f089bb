// Working memory of whole calls, kept for those that follow: pages fresh from the system cost a
// product of 128 x 1024 x 1024 a quarter of its time (Zen 4). scratch.h keeps memory of one thread;
// these blocks have any owner.
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
KeptBlock take_block(int64_t bytes);

// So much stays for later calls; what came first goes first. With AddressSanitizer nothing does, so
// that it sees what is used too late.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kKeptBytes = 0;
#else
constexpr int64_t kKeptBytes = int64_t{32} << 20;
#endif
void give_back(const KeptBlock& block) noexcept;

}  // namespace pyrobust
