// Small kernels that use every primitive once, right or with a planted fault.
#pragma once

#include "cuda/launch.h"
#include "cuda/primitives.h"

namespace pyrobust {
namespace probes {

constexpr int kThreads = 64;

// out[i] = sum over tiles of in[tile][i], 4 int32 a thread, through a ring of three shared tiles.
// Right with Left = 1: two tiles are under way, the older must have landed.
template <int Left>
PYROBUST_KERNEL(kThreads)
ring_sum(const int32_t* in, int tiles, int32_t* out) {
  constexpr int kStages = 3, kTile = 4 * kThreads;
  auto* ring = reinterpret_cast<int32_t*>(cuda::shared_memory());
  const int at = static_cast<int>(threadIdx.x) * 4;
  const auto start = [&](int tile) {
    if (tile < tiles) {
      cuda::copy16_async(ring + tile % kStages * kTile + at, in + tile * kTile + at);
    }
    cuda::commit_copies();
  };
  start(0);
  start(1);
  int32_t sum[4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cuda::wait_copies<Left>();
    cuda::sync_threads();
    start(tile + 2);
    // The neighbour's quarter, so that a missing barrier shows as well.
    const int from = (at + 4) % kTile;
    for (int i = 0; i < 4; ++i) sum[i] += ring[tile % kStages * kTile + from + i];
  }
  cuda::wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[(at + 4) % kTile + i] = sum[i];
}

// out[i] = sum over tiles of in[tile][i], 4 int32 a thread of one warp, through a ring of two
// shared tiles: the first half of each comes by one bulk copy, the second by copies of all lanes,
// and a signal tells when both have landed. kFault 1: nobody waits for it; 2: tiles are filled
// before all lanes have read them; 3: signals are not shown; 4: the phase that is waited for is the
// one before; 5: zeros are stored where a bulk copy goes, and not shown to it.
template <int kFault>
PYROBUST_KERNEL(32)
signalled_sum(const int32_t* in, int tiles, int32_t* out) {
  constexpr int kStages = 2, kTile = 4 * 32;
  auto* ring = reinterpret_cast<int32_t*>(cuda::shared_memory());
  const cuda::SharedPlace first = cuda::shared_place(ring), signals = first + kStages * kTile * 4;
  const int lane = static_cast<int>(threadIdx.x), at = lane * 4;
  if (lane < kStages) cuda::make_signal(signals + lane * 8, 1 + 32);
  if (kFault != 3) cuda::show_signals();
  if (kFault == 5) cuda::store16_shared(first + at * 4, {{0, 0, 0, 0}});
  cuda::sync_warp();
  const auto start = [&](int tile) {
    if (tile >= tiles) return;
    const int slot = tile % kStages;
    const int32_t* from = in + tile * kTile;
    if (lane == 0) {
      cuda::arrive_expecting(signals + slot * 8, kTile * 2);
      cuda::copy_bulk(first + slot * kTile * 4, from, kTile * 2, signals + slot * 8);
    }
    if (at >= kTile / 2) cuda::copy16_async(ring + slot * kTile + at, from + at);
    cuda::arrive_with_copies(signals + slot * 8);
  };
  start(0);
  int32_t sum[4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    if (kFault != 2) cuda::sync_warp();
    start(tile + 1);
    if (kFault != 1) {
      const int phase = tile / kStages + (kFault == 4 ? 1 : 0);
      cuda::await_signal(signals + tile % kStages * 8, static_cast<uint32_t>(phase));
    }
    const int from = (at + 4) % kTile;  // the next lane's
    for (int i = 0; i < 4; ++i) sum[i] += ring[tile % kStages * kTile + from + i];
  }
  for (int i = 0; i < 4; ++i) out[(at + 4) % kTile + i] = sum[i];
}

// d (64, 8) = a (64, 64) b^T of bfloat16, b (8, 64), by one warpgroup. kFault 1: b is not shown to
// the products; 2: nor are registers; 3: registers are overwritten while products are under way;
// 4: sums are read while they are; 5: b is overwritten; 6: nobody waits for the products.
template <int kFault>
PYROBUST_KERNEL(128)
warpgroup_product(const uint16_t* a, const uint16_t* b, float* d) {
  uint8_t* shared = cuda::shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, t = lane % 4;
  const int row = thread / 32 * 16 + lane / 4;
  if (thread < 64) {
    cuda::copy16_async(shared + thread / 8 * 128 + ((thread % 8 ^ thread / 8) << 4),
                       b + thread / 8 * 64 + thread % 8 * 8);
  }
  cuda::commit_copies();
  cuda::wait_copies<0>();
  if (kFault != 1) cuda::show_to_products();
  cuda::sync_threads();
  uint32_t fragments[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* from = a + (row + i % 2 * 8) * 64 + 16 * k + 8 * (i / 2) + 2 * t;
      fragments[k][i] = from[0] | static_cast<uint32_t>(from[1]) << 16;
    }
  }
  float sums[1][4];
  const uint64_t operand = cuda::operand_of(shared);
  if (kFault != 2) cuda::begin_products();
  for (int k = 0; k < 4; ++k) {
    cuda::multiply_m64k16_bf16(sums, fragments[k], operand + static_cast<uint64_t>(2 * k), k != 0);
  }
  cuda::commit_products();
  if (kFault == 3) fragments[3][0] ^= 0x80008000u;
  if (kFault == 5) {
    cuda::sync_threads();
    if (thread < 64) cuda::store16(shared + 16 * thread, {{0, 0, 0, 0}});
    cuda::show_to_products();
    cuda::sync_threads();
  }
  if (kFault == 4) {
    cuda::finish_products<1>(sums);
  } else if (kFault != 6) {
    cuda::finish_products<0>(sums);
  }
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[0][i];
  if (kFault == 4) cuda::finish_products<0>(sums);
}

// out = 2 in of 32 values, as a launch that may begin before the one ahead has ended. kFault 1: it
// never waits for that; 2: it reads before it does.
template <int kFault>
PYROBUST_KERNEL(32)
doubled(const float* in, float* out) {
  cuda::begin_next_grid();
  if (kFault == 0) cuda::await_grid();
  const float value = in[threadIdx.x];
  if (kFault == 2) cuda::await_grid();
  out[threadIdx.x] = 2.0f * value;
}

// Two blocks give each other four floats a thread: out[block] = in[1 - block]. kFault 1: nobody
// waits until they have come.
template <int kFault>
PYROBUST_KERNEL(32)
exchanged(const float* in, float* out) {
  auto* received = reinterpret_cast<float*>(cuda::shared_memory());
  const cuda::SharedPlace first = cuda::shared_place(received), signal = first + 512;
  const int at = static_cast<int>(threadIdx.x) * 4;
  if (threadIdx.x == 0) {
    cuda::make_signal(signal, 1);
    cuda::arrive_expecting(signal, 512);
  }
  cuda::show_signals();
  cuda::begin_cluster_barrier();
  float own[4];
  for (int i = 0; i < 4; ++i) own[i] = in[blockIdx.x * 128 + at + i];
  cuda::end_cluster_barrier();
  cuda::send16(first + static_cast<uint32_t>(at) * 4, own, 1 - blockIdx.x, signal);
  if (kFault != 1) cuda::await_signal(signal, 0);
  for (int i = 0; i < 4; ++i) out[blockIdx.x * 128 + at + i] = received[at + i];
  if (kFault == 1) cuda::await_signal(signal, 0);
}

// A signal that expects more bytes than are copied.
PYROBUST_KERNEL(32) never_signalled(const int32_t* in) {
  const cuda::SharedPlace first = cuda::shared_place(cuda::shared_memory());
  if (threadIdx.x == 0) {
    cuda::make_signal(first + 64, 1);
    cuda::show_signals();
    cuda::arrive_expecting(first + 64, 64);
    cuda::copy_bulk(first, in, 32, first + 64);
  }
  cuda::sync_warp();
  cuda::await_signal(first + 64, 0);
}

// out = in reversed within a block of kThreads, by way of shared memory.
template <bool Barrier>
PYROBUST_KERNEL(kThreads)
reversed(const int32_t* in, int32_t* out) {
  auto* tile = reinterpret_cast<int32_t*>(cuda::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads;
  tile[thread] = in[base + thread];
  if (Barrier) cuda::sync_threads();
  out[base + thread] = tile[kThreads - 1 - thread];
}

// A barrier that the second warp never reaches.
PYROBUST_KERNEL(kThreads) diverged(int32_t* out) {
  if (threadIdx.x < 32) cuda::sync_threads();
  out[threadIdx.x] = 1;
}

// ldmatrix past the end of shared memory, unless `rows` is at most 16.
PYROBUST_KERNEL(32) read_rows(int rows, uint32_t* out) {
  uint32_t r[4];
  cuda::ldmatrix_x4(r, cuda::shared_memory() + 16 * (static_cast<int>(threadIdx.x) % rows));
  out[threadIdx.x] = r[0];
}

// d (16, 8) = a (16, 16) b^T + d, a and b (8, 16) of half floats; one warp.
template <bool IsF16>
PYROBUST_KERNEL(32)
multiply(const uint16_t* a, const uint16_t* b, float* d) {
  uint8_t* shared = cuda::shared_memory();
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  uint8_t *tile_a = shared, *tile_b = shared + 512;  // rows of 32 bytes
  cuda::copy16_async(tile_a + lane * 16, a + lane * 8);
  cuda::copy16_async_or_zero(tile_b + lane % 16 * 16, b + lane % 16 * 8, true);
  cuda::commit_copies();
  cuda::wait_copies<0>();
  cuda::sync_warp();
  uint32_t of_a[4], of_b[2];
  cuda::ldmatrix_x4(of_a, tile_a + lane % 16 * 32 + lane / 16 * 16);
  cuda::ldmatrix_x2(of_b, tile_b + lane % 8 * 32 + lane / 8 % 2 * 16);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if (IsF16) {
    cuda::mma_m16n8k16_f16(sums, of_a, of_b);
  } else {
    cuda::mma_m16n8k16_bf16(sums, of_a, of_b);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// The same for bytes: a (16, 32), b (8, 32).
PYROBUST_KERNEL(32) multiply_s8(const int8_t* a, const int8_t* b, int32_t* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto word = [&](const int8_t* from, int row, int k) {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      value |= static_cast<uint32_t>(static_cast<uint8_t>(from[row * 32 + k + i])) << (8 * i);
    }
    return value;
  };
  const uint32_t of_a[4] = {word(a, g, 4 * t), word(a, g + 8, 4 * t), word(a, g, 4 * t + 16),
                            word(a, g + 8, 4 * t + 16)};
  const uint32_t of_b[2] = {word(b, g, 4 * t), word(b, g, 4 * t + 16)};
  int32_t sums[4] = {};
  cuda::mma_m16n8k32_s8(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// out (16, 16) = in transposed, of 16-bit values.
PYROBUST_KERNEL(32) transposed(const uint16_t* in, uint16_t* out) {
  auto* tile = reinterpret_cast<uint16_t*>(cuda::shared_memory());
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) tile[i] = in[i];
  cuda::sync_warp();
  uint32_t r[4];
  cuda::ldmatrix_x4_transposed(r, tile + lane % 8 * 16 + lane / 8 % 2 * 128 + lane / 16 * 8);
  for (int m = 0; m < 4; ++m) {  // matrix m: rows 8 (m % 2), columns 8 (m / 2) of `in`
    const int row = m / 2 * 8 + g, column = m % 2 * 8 + 2 * t;
    out[row * 16 + column] = static_cast<uint16_t>(r[m]);
    out[row * 16 + column + 1] = static_cast<uint16_t>(r[m] >> 16);
  }
}

// Blocks add one after the other, the last first: order[i] is the block that was i-th.
PYROBUST_KERNEL(32) in_turn(int32_t* lock, int32_t* place, int32_t* order) {
  const int32_t turn = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  cuda::lock_acquire(lock, turn);
  if (threadIdx.x == 0) {
    order[*place] = static_cast<int32_t>(blockIdx.x);
    *place += 1;
  }
  cuda::lock_release(lock, turn + 1);
}

// Word operations on a[i], b[i], c[i]; kResults values each.
constexpr int kResults = 16;
PYROBUST_KERNEL(32)
words(const uint32_t* a, const uint32_t* b, const uint32_t* c, const float* x, const float* y,
      uint32_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  uint32_t* to = out + i * kResults;
  to[0] = cuda::lop3<(cuda::kLopA & cuda::kLopB) | cuda::kLopC>(a[i], b[i], c[i]);
  to[1] = cuda::lop3<(~cuda::kLopA & 0xff) ^ (cuda::kLopB & cuda::kLopC)>(a[i], b[i], c[i]);
  to[2] = cuda::prmt(a[i], b[i], c[i] & 0x7777u);
  to[3] = cuda::fma_f16x2(a[i], b[i], c[i]);
  to[4] = cuda::mul_f16x2(a[i], b[i]);
  to[5] = cuda::sub_f16x2(a[i], b[i]);
  to[6] = cuda::fma_bf16x2(a[i], b[i], c[i]);
  to[7] = cuda::pack_f16x2(x[i], y[i]);
  to[8] = cuda::pack_bf16x2(x[i], y[i]);
  to[9] = cuda::shuffle(a[i], 7);
  to[10] = cuda::shuffle_xor(a[i], 5);
  to[11] = cuda::shuffle_down(a[i], 3);
  to[12] = cuda::ballot((a[i] & 1u) != 0);
  const float ends[3] = {cuda::add_up(x[i], y[i]), cuda::add_down(x[i], y[i]),
                         cuda::mul_up(x[i], y[i])};
  for (int k = 0; k < 3; ++k) to[13 + k] = bits_of_float(ends[k]);
}

// sums[0] += sum of x, sums[1] = max of x over each warp; a histogram of bytes.
PYROBUST_KERNEL(32) reduced(const float* x, float* sums, int64_t* histogram, int64_t* least) {
  const float value = x[threadIdx.x];
  const float sum = cuda::warp_sum(value), most = cuda::warp_max(value);
  if (threadIdx.x == 0) {
    cuda::atomic_add(sums, sum);
    cuda::atomic_max_magnitude(sums + 1, most);
    sums[2] = cuda::fma_up(sum, most, 1e-30f);
    sums[3] = cuda::fma_down(sum, most, -1e-30f);
  }
  cuda::atomic_add(histogram + static_cast<int>(value) % 4, int64_t{1});
  cuda::atomic_min(least, static_cast<int64_t>(value));
}

// out = in by vectors of 16 and 8 bytes; `in` off by `shift` bytes must fault.
PYROBUST_KERNEL(32) copied(const uint8_t* in, int shift, uint8_t* out) {
  const cuda::Words4 value = cuda::load16(in + shift + 16 * threadIdx.x);
  const cuda::Words4 again = cuda::load16_once(in + 16 * threadIdx.x);
  if (threadIdx.x % 2 == 0) {
    cuda::store16(out + 16 * threadIdx.x, value);
  } else {
    cuda::store8(out + 16 * threadIdx.x, {{again.word[0], again.word[1]}});
    cuda::store8(out + 16 * threadIdx.x + 8, {{again.word[2], again.word[3]}});
  }
}

}  // namespace probes
}  // namespace pyrobust
