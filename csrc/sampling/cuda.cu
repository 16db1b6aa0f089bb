// Launches of the sampling kernels.
#include "cuda/launch.h"
#include "sampling/cuda.h"
#include "sampling/cuda_noise.cuh"
#include "sampling/cuda_rows.cuh"
#include "sampling/cuda_votes.cuh"

namespace pyrobust {
namespace sampling {
namespace gpu {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;  // of 256 threads: what a multiprocessor can hold
constexpr int64_t kVoteRowsTogether = 16;    // two for each warp
constexpr int64_t kVoteRowsAtLeast = 256;  // of ten classes, so that a histogram is worth its flush

// A grid over `items`, one a thread, that loops where they are more than fit at once.
cuda::LaunchShape shape_for(int64_t items, int threads, size_t shared, const cuda::Queue& queue) {
  const int64_t most = static_cast<int64_t>(queue.multiprocessors) * kBlocksPerMultiprocessor;
  const int64_t blocks = (items + threads - 1) / threads;
  return {static_cast<unsigned>(blocks < most ? blocks : most), 1, static_cast<unsigned>(threads),
          shared};
}

template <class Distribution>
cuda::Status launch_rows(const Distribution& distribution, int64_t channels,
                         const cuda::Queue& queue) {
  const Positions& at = distribution.call.at;
  const int64_t items = at.images * at.samples * channels * tiles_of(at.elements) * kLanes;
  if (items == 0) return 0;
  const size_t shared = Distribution::kNormals ? kNormalShared : 0;
  return cuda::launch(rows_kernel<Distribution>, shape_for(items, kRowThreads, shared, queue),
                      queue.stream, distribution, channels, Tables{kNormalTable, kLaplaceTable});
}

// Samples `begin` .. `begin + count - 1` of the call.
template <Noise kNoise>
cuda::Status launch_part(const NoiseCall& call, int64_t begin, int64_t count,
                         const cuda::Queue& queue) {
  Positions at = call.at;
  at.samples = count;
  at.first_sample += begin;
  constexpr unsigned kThreads = noise_threads(kNoise);
  const int64_t threads = int64_t{queue.multiprocessors} * kThreads;
  const NoiseItems items = noise_items(at.images, at.samples, at.elements, threads);
  const int64_t row_bytes = at.elements * (call.out_type == FloatType::kFloat32 ? 4 : 2);
  const NoiseWork work = {items,
                          at,
                          call.at.samples,
                          items.runs * row_bytes,
                          call.x,
                          call.scale,
                          static_cast<uint8_t*>(call.out) + begin * row_bytes,
                          philox_keys(at.seed),
                          bits_of_float(1.0f)};
  const Tables tables = {kNormalTable, kLaplaceTable};
  const int64_t turns = (count_of(items) + 31) / 32;
  const int64_t blocks = turns < queue.multiprocessors ? turns : queue.multiprocessors;
  const cuda::LaunchShape shape = {static_cast<unsigned>(blocks), 1, kThreads,
                                   kNoise == Noise::kGaussian ? kNormalShared : kNoiseShared};
  const auto kernel =
      call.out_type == FloatType::kFloat32   ? noise_kernel<kNoise, FloatType::kFloat32>
      : call.out_type == FloatType::kFloat16 ? noise_kernel<kNoise, FloatType::kFloat16>
                                             : noise_kernel<kNoise, FloatType::kBFloat16>;
  return cuda::launch(kernel, shape, queue.stream, work, tables);
}

template <Noise kNoise>
cuda::Status launch_noise(const NoiseCall& call, const cuda::Queue& queue) {
  // Vectors of x begin where its rows do, if x itself does: a tensor may be a view.
  const bool vectors = call.at.elements % 4 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
  if (!vectors) return launch_rows(OddNoise{call}, 1, queue);
  if (call.at.images * call.at.elements == 0) return 0;
  for (int64_t begin = 0; begin < call.at.samples;) {
    const int64_t count = samples_together(call.at.first_sample + begin, call.at.samples - begin);
    const cuda::Status status = launch_part<kNoise>(call, begin, count, queue);
    if (status != 0) return status;
    begin += count;
  }
  return 0;
}

template <FloatType kType>
void (*vote_kernel_of(const CountCall& call))(VoteWork) {
  constexpr int64_t kVector = Logits<kType, true>::kValues;
  const bool vectors =
      call.classes % kVector == 0 && reinterpret_cast<uintptr_t>(call.logits) % 16 == 0;
  return vectors ? vote_kernel<kType, true> : vote_kernel<kType, false>;
}

void (*vote_kernel_for(const CountCall& call))(VoteWork) {
  if (call.type == FloatType::kFloat32) return vote_kernel_of<FloatType::kFloat32>(call);
  if (call.type == FloatType::kFloat16) return vote_kernel_of<FloatType::kFloat16>(call);
  return vote_kernel_of<FloatType::kBFloat16>(call);
}

}  // namespace

cuda::Status noise_samples(const NoiseCall& call, const cuda::Queue& queue) {
  switch (call.noise) {
    case Noise::kGaussian:
      return launch_noise<Noise::kGaussian>(call, queue);
    case Noise::kUniform:
      return launch_noise<Noise::kUniform>(call, queue);
    default:
      return launch_noise<Noise::kLaplace>(call, queue);
  }
}

cuda::Status split_samples(const SplitCall& call, const cuda::Queue& queue) {
  return launch_rows(Split{call}, 1, queue);
}

cuda::Status keep_samples(const KeepCall& call, const cuda::Queue& queue) {
  return launch_rows(Keep{call}, call.channels, queue);
}

cuda::Status grid_samples(const GridCall& call, const cuda::Queue& queue) {
  GridCall own = call;
  own.table.scale = static_cast<float>(call.scale);
  return launch_rows(Grid{own}, 1, queue);
}

cuda::Status choice_samples(const ChoiceCall& call, int64_t candidates, const cuda::Queue& queue) {
  return launch_rows(Choice{call, candidates}, 1, queue);
}

cuda::Status count_votes(const CountCall& call, const cuda::Queue& queue) {
  const int64_t wanted = static_cast<int64_t>(queue.multiprocessors) * kBlocksPerMultiprocessor;
  const int64_t per_class = 10 * kVoteRowsAtLeast / (call.classes < 10 ? 10 : call.classes);
  const int64_t least = per_class > kVoteRowsTogether ? per_class : kVoteRowsTogether;
  const VoteStretches stretches = vote_stretches(call.rows, call.samples, least, wanted);
  const int64_t blocks = stretches.histograms * stretches.stretches;
  if (blocks == 0) return 0;
  const size_t shared =
      call.classes <= kSharedClasses ? static_cast<size_t>(call.classes) * sizeof(int32_t) : 0;
  return cuda::launch(vote_kernel_for(call),
                      {static_cast<unsigned>(blocks), 1, kVoteThreads, shared}, queue.stream,
                      VoteWork{call, stretches});
}

}  // namespace gpu
}  // namespace sampling
}  // namespace pyrobust
