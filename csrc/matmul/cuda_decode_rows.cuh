// Rows of a packed weight as dense halves, for torch's product: what dequantize_kernel makes,
// without its choices in the loop. It takes groups along input features of whole runs of eight
// columns, codes of 1, 2, 3, 4 or 8 bits, no codebook, row scales or remainder.
#pragma once

#include "core/float_types.h"
#include "cuda/primitives.h"
#include "matmul/weights.h"

namespace pyrobust::matmul::gpu {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeRun = 8;    // columns of a thread
constexpr int kDecodeRows = 16;  // rows of a thread block, one after another

PYROBUST_HD bool plainly_decoded(const PackedMatrix& w, RowRange rows, FloatType type) {
  const bool whole_group = w.group_size >= w.cols || w.group_size % kDecodeRun == 0;
  return type != FloatType::kFloat32 && w.group_dim == 1 && whole_group &&
         w.cols % kDecodeRun == 0 && w.levels != kTernaryLevels && w.codebook == nullptr &&
         w.row_scale == nullptr && w.remainder.offsets == nullptr &&
         reinterpret_cast<uintptr_t>(w.codes) % 8 == 0 &&
         (rows.end - rows.begin) / kDecodeRows < 65535;
}

// Eight codes of kBits bits.
template <int kBits>
PYROBUST_DEVICE uint64_t run_of_codes(const uint8_t* from) {
  if (kBits == 8) return *reinterpret_cast<const uint64_t*>(from);
  if (kBits == 4) return *reinterpret_cast<const uint32_t*>(from);
  if (kBits == 3) return from[0] | static_cast<uint32_t>(from[1]) << 8 | uint32_t{from[2]} << 16;
  if (kBits == 2) return *reinterpret_cast<const uint16_t*>(from);
  return *from;
}

// Two weights: scale * (multiplier * code - zero), rounded once. Integers below 2^23 come out of a
// mantissa exactly.
template <int kBits, FloatType kType>
PYROBUST_DEVICE uint32_t pair_of_weights(uint64_t codes, int i, float scale, float zero) {
  float value[2];
  for (int k = 0; k < 2; ++k) {
    const auto code = static_cast<uint32_t>(codes >> ((i + k) * kBits)) & ((1u << kBits) - 1);
    const float whole = float_from_bits(0x4b000000u | (kBits == 1 ? 2 * code : code));
    value[k] = scale * (whole - 8388608.0f - zero);
  }
  return kType == FloatType::kFloat16 ? cuda::pack_f16x2(value[0], value[1])
                                      : cuda::pack_bf16x2(value[0], value[1]);
}

template <int kBits, FloatType kType>
PYROBUST_KERNEL(kDecodeThreads)
decode_rows_kernel(PackedMatrix w, RowRange rows, void* out) {
  const auto run = static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  const int64_t k = run * kDecodeRun;
  if (k >= w.cols) return;
  const bool one = w.group_size >= w.cols;
  const auto size = one ? 1u : static_cast<uint32_t>(w.group_size);
  const uint32_t groups = one ? 1u : (static_cast<uint32_t>(w.cols) - 1) / size + 1;
  const uint32_t group = one ? 0u : static_cast<uint32_t>(k) / size;
  const int64_t begin = rows.begin + int64_t{blockIdx.y} * kDecodeRows;
  const int64_t end = begin + kDecodeRows < rows.end ? begin + kDecodeRows : rows.end;
  const int64_t row_bytes = w.cols / 8 * kBits;
  const uint8_t* codes = w.codes + begin * row_bytes + run * kBits;
  auto* to = static_cast<uint16_t*>(out) + (begin - rows.begin) * w.cols + k;
  int64_t place = begin * groups + group;
#pragma unroll 4
  for (int64_t n = begin; n < end; ++n) {
    const uint64_t of_row = run_of_codes<kBits>(codes);
    const float scale = load_float(w.scale, place, w.scale_type);
    const auto zero = static_cast<float>(zero_at(w, place));
    cuda::Words4 words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words.word[i] = pair_of_weights<kBits, kType>(of_row, 2 * i, scale, zero);
    }
    cuda::store16(to, words);
    codes += row_bytes;
    to += w.cols;
    place += groups;
  }
}

template <int kBits>
cuda::Status decode_rows(const PackedMatrix& w, RowRange rows, FloatType type, void* out,
                         cuda::Stream stream) {
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(ceil_div(w.cols, kDecodeThreads * kDecodeRun));
  shape.blocks_y = static_cast<unsigned>(ceil_div(rows.end - rows.begin, kDecodeRows));
  shape.threads = kDecodeThreads;
  return type == FloatType::kFloat16 ? cuda::launch(decode_rows_kernel<kBits, FloatType::kFloat16>,
                                                    shape, stream, w, rows, out)
                                     : cuda::launch(decode_rows_kernel<kBits, FloatType::kBFloat16>,
                                                    shape, stream, w, rows, out);
}

}  // namespace pyrobust::matmul::gpu
