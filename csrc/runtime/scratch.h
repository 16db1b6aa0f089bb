// Working memory of one thread, kept between calls so that a call allocates nothing. Grows to the
// largest request; slots are independent, so that two buffers can be in use at once.
#pragma once

#include <cstdint>
#include <memory>

namespace pyrobust {

enum class ScratchSlot : int { kShared, kThread, kSteps, kSparse, kSums, kBias, kEnds };

// At least `bytes` bytes, 64-byte aligned, valid until the next request of this thread and slot.
inline void* thread_scratch(ScratchSlot slot, int64_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> storage;
    int64_t bytes = 0;
  };
  static thread_local Buffer buffers[7];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes || !buffer.storage) {
    buffer.storage.reset();
    buffer.storage.reset(new char[static_cast<size_t>(bytes) + 64]);
    buffer.bytes = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.storage.get());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

}  // namespace pyrobust
