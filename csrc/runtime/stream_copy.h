// Copies bytes that are not wanted again soon: on x86 past the caches, which spares reading the
// destination first (a copy then moves two parts in three of the memory) and keeps what it would
// have pushed out. Compiled with the flags of each file that includes it.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyrobust {
namespace {

#if defined(__SSE2__)
// 64 bytes; `to` is a multiple of that.
inline void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#else
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#endif
}
#endif

// `to` and `from` do not overlap. Call stream_fence() on the same thread before another reads `to`.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
#if defined(__SSE2__)
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64);
  int64_t k = past_line == 0 ? 0 : 64 - past_line;
  if (k > bytes) k = bytes;
  __builtin_memcpy(out, in, static_cast<size_t>(k));
  for (; k + 64 <= bytes; k += 64) stream_line(out + k, in + k);
  out += k;
  in += k;
  bytes -= k;
#endif
  __builtin_memcpy(out, in, static_cast<size_t>(bytes));
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace pyrobust
