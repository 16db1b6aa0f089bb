// Threads that run one body together and meet on the way, from the OpenMP team of parallel.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(PYROBUST_X86)
#include <immintrin.h>
#endif

namespace pyrobust {

// Where threads wait for each other. A barrier of libgomp wakes sleepers by a call of the system
// whether there are any or not: 0.5 us, some 7% of what lies between two meetings here. Threads
// that wait for more than a few microseconds leave their processor to others.
class Meeting {
 public:
  // One of `size` threads has come; what each wrote before, all see after.
  void wait(int64_t size) {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
      constexpr int kSpins = 1000;
      if (i >= kSpins) {
        std::this_thread::yield();
        continue;
      }
#if defined(PYROBUST_X86)
      _mm_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// One thread of several that run the same body.
struct Team {
  int64_t rank, size;
  Meeting* meeting;

  // Waits for all of them; every thread must meet equally often.
  void meet() const {
    if (size > 1) meeting->wait(size);
  }
};

// Calls body(team) on up to num_threads threads, at least one.
template <typename Body>
void run_together(int num_threads, const Body& body) {
  Meeting meeting;
#if defined(_OPENMP)
  if (num_threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(num_threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
    return;
  }
#endif
  (void)num_threads;
  body(Team{0, 1, &meeting});
}

}  // namespace pyrobust
