// Rows of a packed weight as dense numbers, for torch's product: what dequantize_kernel makes,
// without its choices in the loop but for the type. It takes groups along input features of whole
// runs of eight columns, codes of 1, 2, 3, 4 or 8 bits, no codebook, row scales or remainder.
#pragma once

#include "core/float_types.h"
#include "cuda/primitives.h"
#include "matmul/weights.h"

namespace pyrobust::matmul::gpu {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeRun = 8;   // columns of a thread
constexpr int kDecodeRows = 4;  // rows of a thread, whose loads are under way together

PYROBUST_HD bool plainly_decoded(const PackedMatrix& w, RowRange rows) {
  const bool whole_group = w.group_size >= w.cols || w.group_size % kDecodeRun == 0;
  return w.group_dim == 1 && whole_group && w.cols % kDecodeRun == 0 &&
         w.levels != kTernaryLevels && w.codebook == nullptr && w.row_scale == nullptr &&
         w.remainder.offsets == nullptr && reinterpret_cast<uintptr_t>(w.codes) % 8 == 0 &&
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

// A weight: scale * (multiplier * code - zero), which float32 holds exactly. Integers below 2^23
// come out of a mantissa exactly.
template <int kBits>
PYROBUST_DEVICE float weight_of(uint64_t codes, int i, float scale, float zero) {
  const auto code = static_cast<uint32_t>(codes >> (i * kBits)) & ((1u << kBits) - 1);
  const float whole = float_from_bits(0x4b000000u | (kBits == 1 ? 2 * code : code));
  return scale * (whole - 8388608.0f - zero);
}

PYROBUST_DEVICE void store_run(const float (&value)[kDecodeRun], FloatType type, uint8_t* to) {
  if (type == FloatType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kDecodeRun; i += 4) {
      cuda::store16(to + 4 * i, {{bits_of_float(value[i]), bits_of_float(value[i + 1]),
                                  bits_of_float(value[i + 2]), bits_of_float(value[i + 3])}});
    }
    return;
  }
  cuda::Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words.word[i] = type == FloatType::kFloat16 ? cuda::pack_f16x2(value[2 * i], value[2 * i + 1])
                                                : cuda::pack_bf16x2(value[2 * i], value[2 * i + 1]);
  }
  cuda::store16(to, words);
}

// The bits of a scale, to be read as a number later: no choice stands between loads.
PYROBUST_DEVICE uint32_t scale_bits(const PackedMatrix& w, int64_t place) {
  if (w.scale_type == FloatType::kFloat32) return static_cast<const uint32_t*>(w.scale)[place];
  return static_cast<const uint16_t*>(w.scale)[place];
}

PYROBUST_DEVICE float scale_of(uint32_t bits, FloatType type) {
  if (type == FloatType::kFloat32) return float_from_bits(bits);
  const auto half = static_cast<uint16_t>(bits);
  return type == FloatType::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

template <int kBits>
PYROBUST_KERNEL(kDecodeThreads)
decode_rows_kernel(PackedMatrix w, RowRange rows, FloatType type, void* out) {
  const auto run = static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  const int64_t k = run * kDecodeRun;
  if (k >= w.cols) return;
  const bool one = w.group_size >= w.cols;
  const auto size = one ? 1u : static_cast<uint32_t>(w.group_size);
  const uint32_t groups = one ? 1u : (static_cast<uint32_t>(w.cols) - 1) / size + 1;
  const uint32_t group = one ? 0u : static_cast<uint32_t>(k) / size;
  const int64_t begin = rows.begin + int64_t{blockIdx.y} * kDecodeRows;
  const int64_t left = rows.end - begin;
  const int64_t row_bytes = w.cols / 8 * kBits, bytes = type == FloatType::kFloat32 ? 4 : 2;
  const uint8_t* codes = w.codes + begin * row_bytes + run * kBits;
  auto* to = static_cast<uint8_t*>(out) + ((begin - rows.begin) * w.cols + k) * bytes;
  const int64_t place = begin * groups + group;
  uint64_t of_row[kDecodeRows];
  uint32_t scale[kDecodeRows], zero[kDecodeRows];
#pragma unroll
  for (int j = 0; j < kDecodeRows; ++j) {
    if (j >= left) break;
    of_row[j] = run_of_codes<kBits>(codes + j * row_bytes);
    scale[j] = scale_bits(w, place + j * groups);
    zero[j] = static_cast<uint32_t>(zero_at(w, place + j * groups));
  }
#pragma unroll
  for (int j = 0; j < kDecodeRows; ++j) {
    if (j >= left) break;
    float value[kDecodeRun];
#pragma unroll
    for (int i = 0; i < kDecodeRun; ++i) {
      value[i] = weight_of<kBits>(of_row[j], i, scale_of(scale[j], w.scale_type),
                                  static_cast<float>(zero[j]));
    }
    store_run(value, type, to + j * w.cols * bytes);
  }
}

template <int kBits>
cuda::Status decode_rows(const PackedMatrix& w, RowRange rows, FloatType type, void* out,
                         cuda::Stream stream) {
  cuda::LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>(ceil_div(w.cols, kDecodeThreads * kDecodeRun));
  shape.blocks_y = static_cast<unsigned>(ceil_div(rows.end - rows.begin, kDecodeRows));
  shape.threads = kDecodeThreads;
  return cuda::launch(decode_rows_kernel<kBits>, shape, stream, w, rows, type, out);
}

}  // namespace pyrobust::matmul::gpu
