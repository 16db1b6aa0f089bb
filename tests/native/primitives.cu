// Compiles every primitive of csrc/cuda as device code, by way of the probes that the tests run on
// the CPU.
#include "core/float_types.h"
#include "cuda_shim/probes.cuh"

namespace pyrobust {
namespace probes {

struct Buffers {
  uint32_t* words;
  int32_t* numbers;
  int64_t* counts;
  uint16_t* halves;
  uint8_t* bytes;
  float* floats;
};

cuda::Status start_all(const Buffers& on, cuda::Stream stream) {
  const cuda::LaunchShape shape;
  auto* signed_bytes = reinterpret_cast<int8_t*>(on.bytes);
  using cuda::launch;
  return launch(ring_sum<1>, shape, stream, on.numbers, 3, on.numbers) |
         launch(reversed<true>, shape, stream, on.numbers, on.numbers) |
         launch(diverged, shape, stream, on.numbers) |
         launch(read_rows, shape, stream, 16, on.words) |
         launch(multiply<true>, shape, stream, on.halves, on.halves, on.floats) |
         launch(multiply<false>, shape, stream, on.halves, on.halves, on.floats) |
         launch(multiply_s8, shape, stream, signed_bytes, signed_bytes, on.numbers) |
         launch(transposed, shape, stream, on.halves, on.halves) |
         launch(in_turn, shape, stream, on.numbers, on.numbers, on.numbers) |
         launch(words, shape, stream, on.words, on.words, on.words, on.floats, on.floats,
                on.words) |
         launch(reduced, shape, stream, on.floats, on.floats, on.counts, on.counts) |
         launch(copied, shape, stream, on.bytes, 0, on.bytes);
}

}  // namespace probes
}  // namespace pyrobust
