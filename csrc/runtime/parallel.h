// Splits a range over the OpenMP team that torch has loaded. The caller passes the number of
// threads (torch.get_num_threads()): a new Python thread does not inherit OpenMP's own setting.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyrobust {

// Calls body(begin, end) on disjoint chunks that cover [0, count); chunk borders are multiples of
// `align`. Runs serially when the work is below `grain` items a thread: on a busy machine a
// needless second thread turned a 3 us call into 70 us.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t align, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int64_t useful = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, num_threads), useful));
#if defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
    const int64_t blocks = (count + align - 1) / align;
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      const int64_t begin = std::min(count, blocks * rank / team * align);
      const int64_t end = std::min(count, blocks * (rank + 1) / team * align);
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  (void)threads;
  (void)align;
  body(int64_t{0}, count);
}

}  // namespace pyrobust
