// The parts of the GPU family that need no tensor cores: choice of the instance, repacking,
// dequantizing, and the int8 mode as a plain loop.
#include "core/activation_int8.h"
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "matmul/cuda.h"
#include "matmul/cuda_decode_rows.cuh"
#include "matmul/weights.h"

namespace pyrobust::matmul::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;                        // columns a thread decodes at a time
constexpr int64_t kSegment = kThreads * kRun;  // columns of a thread block

PYROBUST_KERNEL_OF(kThreads, 4) repack_kernel(Format format, Codes codes, uint32_t* out) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < steps_of(codes.rows, codes.cols)) pack_indexed_step(format, codes, index, out);
}

// --- dequantizing -------------------------------------------------------------------------------

// Eight codes of `bits` bits that begin at `from`, of which `bytes` lie within the row. Rows of a
// power of two begin where a load of their eight codes may.
PYROBUST_DEVICE uint64_t code_bits_at(const uint8_t* from, int bits, int64_t bytes) {
  if (bytes >= bits && reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(bits) == 0) {
    if (bits == 8) return *reinterpret_cast<const uint64_t*>(from);
    if (bits == 4) return *reinterpret_cast<const uint32_t*>(from);
    if (bits == 2) return *reinterpret_cast<const uint16_t*>(from);
  }
  uint64_t word = 0;
  for (int i = 0; i < bits && i < bytes; ++i) word |= uint64_t{from[i]} << (8 * i);
  return word;
}

// Codes of columns [k, k + 8), k a multiple of 8; zeros past the end.
PYROBUST_DEVICE void decode_run(const PackedMatrix& w, const uint8_t* row, int64_t k,
                                uint32_t (&codes)[kRun]) {
  if (w.levels == kTernaryLevels) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      codes[i] = k + i < w.cols ? static_cast<uint32_t>(get_code(row, k + i, w.levels)) : 0u;
    }
    return;
  }
  const int bits = code_bits(w.levels);
  const int64_t first = k / 8 * bits;
  const uint64_t word = code_bits_at(row + first, bits, packed_row_bytes(w.cols, w.levels) - first);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    codes[i] = static_cast<uint32_t>(word >> (i * bits)) & static_cast<uint32_t>(w.levels - 1);
  }
}

// Place of the scale of row n, column k. In 32 bits: a division of 64 costs about 100 instructions.
PYROBUST_DEVICE int64_t scale_place_of(const PackedMatrix& w, int64_t n, int64_t k) {
  const auto cols = static_cast<uint32_t>(w.cols);
  const bool whole = w.group_size >= (w.group_dim == 1 ? w.cols : w.rows);
  const auto size = static_cast<uint32_t>(w.group_size);
  if (w.group_dim == 1) {
    if (whole) return n;
    return n * ((cols - 1) / size + 1) + static_cast<uint32_t>(k) / size;
  }
  return (whole ? 0 : static_cast<uint32_t>(n) / size) * int64_t{cols} + k;
}

// The exact dense weights of the run, as float_row() and complete_row() make them.
PYROBUST_DEVICE void weight_run(const PackedMatrix& w, int64_t n, int64_t k, float (&out)[kRun]) {
  uint32_t codes[kRun];
  decode_run(w, code_row(w, n), k, codes);
  const uint32_t multiplier = static_cast<uint32_t>(code_multiplier(w));
  const float row_scale = w.row_scale != nullptr ? w.row_scale[n] : 1.0f;
  const bool one_group = w.group_dim == 1 && (w.group_size % kRun == 0 || w.group_size >= w.cols);
  float scale = 0.0f;
  int zero = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (k + i >= w.cols) break;
    if (i == 0 || !one_group) {
      const int64_t at = scale_place_of(w, n, k + i);
      scale = scale_at(w, at);
      zero = zero_at(w, at);
    }
    const int value =
        w.codebook != nullptr ? w.codebook[codes[i]] : static_cast<int>(multiplier * codes[i]);
    out[i] = scale * static_cast<float>(value - zero);
    if (w.row_scale != nullptr) out[i] *= row_scale;
  }
}

PYROBUST_DEVICE void store_run(const float (&run)[kRun], FloatType type, int64_t count, void* out,
                               int64_t at) {
  const bool whole = count >= kRun && at % 8 == 0;
  if (whole && type != FloatType::kFloat32) {
    cuda::Words4 words;
    for (int i = 0; i < 4; ++i) {
      words.word[i] = type == FloatType::kFloat16 ? cuda::pack_f16x2(run[2 * i], run[2 * i + 1])
                                                  : cuda::pack_bf16x2(run[2 * i], run[2 * i + 1]);
    }
    cuda::store16(static_cast<uint16_t*>(out) + at, words);
    return;
  }
  for (int i = 0; i < kRun && i < count; ++i) store_float(out, at + i, type, run[i]);
}

// Entries of the remainder's row n that lie in columns [begin, end), onto the dense weight.
PYROBUST_DEVICE void complete_segment(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end,
                                      FloatType type, void* out, int64_t row_at) {
  int64_t from, to;
  remainder_range(w, n, &from, &to);
  for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
    const int64_t k = w.remainder.columns[i];
    if (k < begin || k >= end) continue;
    float run[kRun];
    weight_run(w, n, k / kRun * kRun, run);
    const float whole = run[k % kRun] + load_float(w.remainder.values, i, w.remainder.type);
    store_float(out, row_at + k, type, whole);
  }
}

PYROBUST_KERNEL(kThreads)
dequantize_kernel(PackedMatrix w, int64_t first, const int64_t* indices, FloatType type,
                  void* out) {
  const auto segments = static_cast<uint32_t>((w.cols + kSegment - 1) / kSegment);
  const int64_t row = blockIdx.x / segments;
  const int64_t begin = int64_t{blockIdx.x % segments} * kSegment;
  const int64_t end = begin + kSegment < w.cols ? begin + kSegment : w.cols;
  const int64_t n = indices != nullptr ? indices[row] : first + row;
  if (n < 0 || n >= w.rows) return;
  const int64_t k = begin + threadIdx.x * kRun;
  if (k < end) {
    float run[kRun] = {};
    weight_run(w, n, k, run);
    store_run(run, type, end - k, out, row * w.cols + k);
  }
  if (w.remainder.offsets == nullptr) return;
  cuda::sync_threads();
  complete_segment(w, n, begin, end, type, out, row * w.cols);
}

// --- activations="int8" -------------------------------------------------------------------------

// One warp a row of x.
PYROBUST_KERNEL(32)
round_activations_kernel(Activations x, int64_t cols, int8_t* q, double* steps) {
  const int64_t row = blockIdx.x, first = row * cols;
  float largest = 0.0f, infinite = 0.0f;
  for (int64_t k = threadIdx.x; k < cols; k += 32) {
    const float value = load_float(x.data, first + k, x.type);
    const float magnitude = value < 0.0f ? -value : value;
    if (!(magnitude <= 3.4028234663852886e38f)) infinite = 1.0f;
    largest = magnitude > largest ? magnitude : largest;
  }
  largest = cuda::warp_max(largest);
  const bool finite = cuda::warp_max(infinite) == 0.0f;
  const double step = finite ? static_cast<double>(largest) / 127.0 : static_cast<double>(NAN);
  if (threadIdx.x == 0) steps[row] = step;
  for (int64_t k = threadIdx.x; k < cols; k += 32) {
    q[first + k] = quantized_activation(load_float(x.data, first + k, x.type), step);
  }
}

PYROBUST_DEVICE double grouped_total(const PackedMatrix& w, int64_t n, const int8_t* q) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w);
  double total = 0.0;
  for (int64_t begin = 0, group = 0; begin < w.cols; begin += w.group_size, ++group) {
    const int64_t end = w.cols - begin > w.group_size ? begin + w.group_size : w.cols;
    const double scale = scale_at(w, first + group);
    const int zero = zero_at(w, first + group);
    for (int64_t from = begin; from < end; from += kMaxIntegerRun) {
      const int64_t to = end - from > kMaxIntegerRun ? from + kMaxIntegerRun : end;
      int32_t sum = 0;
      for (int64_t k = from; k < to; ++k) sum += q[k] * (value_at(w, row, k, multiplier) - zero);
      total += static_cast<double>(sum) * scale;
    }
  }
  return total;
}

PYROBUST_DEVICE double columnwise_total(const PackedMatrix& w, int64_t n, const int8_t* q) {
  const uint8_t* row = code_row(w, n);
  const int64_t first = scale_row(w, n);
  const int multiplier = code_multiplier(w);
  double lane[8] = {};
  for (int64_t k = 0; k < w.cols; ++k) {
    const int value = value_at(w, row, k, multiplier) - zero_at(w, first + k);
    const float weight = scale_at(w, first + k) * static_cast<float>(value);
    lane[k / 8 % 8] += static_cast<double>(q[k]) * weight;
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

PYROBUST_DEVICE double remainder_total(const PackedMatrix& w, int64_t n, const int8_t* q) {
  double sum = 0.0;
  int64_t from, to;
  remainder_range(w, n, &from, &to);
  for (int64_t i = from; i < to; ++i) {
    const int64_t k = w.remainder.columns[i];
    if (k < 0 || k >= w.cols) continue;
    sum += static_cast<double>(load_float(w.remainder.values, i, w.remainder.type)) * q[k];
  }
  return sum;
}

// One thread a result.
PYROBUST_KERNEL(kThreads)
int8_kernel(PackedMatrix w, const int8_t* q, const double* steps, int64_t count, Output out) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= count * w.rows) return;
  const int64_t m = index / w.rows, n = index % w.rows;
  const int8_t* x = q + m * w.cols;
  const double total = w.group_dim == 1 ? grouped_total(w, n, x) : columnwise_total(w, n, x);
  double sum = 0.0;
  if (w.remainder.offsets != nullptr) {
    sum = remainder_total(w, n, x);
    out.remainder = &sum;
    out.remainder_row = n;
  }
  out.row = m;
  store_result(out, 0, n, total, steps[m]);
}

// Groups along input features of codes without a codebook, on a device with clusters.
bool for_clusters(Format format, const LinearArguments& p) {
  const bool coded = format == Format::kCodebook || format == Format::kComplex;
  return p.clusters && p.group_dim == 1 && !coded;
}

bool for_warpgroups(Format format, const LinearArguments& p) {
  return for_clusters(format, p) && p.warpgroups;
}

// Products of warpgroups scale every 128 columns. They take 64 rows whatever the count: on an H200
// 32 rows and 4 bits took 28.6 us by them and 24.8 by warps, 64 rows 30 and 45 (in one launch).
Path path_of(Format format, const LinearArguments& p) {
  if (p.count > kMaxFusedRows && p.rounds && takes_many_rows(format, p, p.x_type)) {
    return Path::kBroad;
  }
  const bool pairs = p.groups == 1 || p.group_span % 2 == 0;
  if (pairs && p.count > 32 && for_warpgroups(format, p)) return Path::kWide;
  const bool few = pairs && p.count <= kFewRows && for_clusters(format, p);
  return few ? Path::kFew : Path::kWarps;
}

unsigned blocks_for(int64_t work, int64_t of_each) {
  return static_cast<unsigned>(divide_up(work, of_each));
}

}  // namespace

void plan_linear(int64_t group_size, LinearArguments* p) {
  const int64_t extent = p->group_dim == 1 ? p->cols : p->rows;
  p->strips = strips_of(p->rows);
  p->two_groups = group_size == 32 && group_size < extent ? 1 : 0;
  const int64_t whole = p->group_dim == 1 ? blocks_of(p->cols) : p->strips;
  p->groups = group_size >= extent ? 1 : p->two_groups ? 2 * whole : divide_up(extent, group_size);
  p->group_span = static_cast<int>(p->groups == 1 ? whole : p->two_groups ? 1 : group_size / 64);
}

// A scale is rounded to float16 where x is: others may lie out of its range.
bool takes_many_rows(Format format, const LinearArguments& p, FloatType x_type) {
  const bool scaled = x_type == FloatType::kBFloat16 ||
                      (x_type == FloatType::kFloat16 && p.scale_type == FloatType::kFloat16);
  return for_warpgroups(format, p) && scaled && p.two_groups == 0;
}

void plan_rows(Format format, int64_t count, int multiprocessors, LinearArguments* p) {
  p->count = count;
  p->path = path_of(format, *p);
  if (p->path == Path::kBroad) {
    p->schedule = make_broad_schedule(count, p->rows, p->cols, multiprocessors);
    return;
  }
  if (p->path == Path::kFew) {
    p->schedule = make_few_schedule(p->rows, p->cols, multiprocessors);
    return;
  }
  if (p->path == Path::kWide) {
    p->schedule = make_wide_schedule(p->rows, p->cols, multiprocessors);
    return;
  }
  const int rows = instance_rows(format, p->group_dim, count);
  p->schedule = make_schedule(rows, p->rows, p->cols, multiprocessors);
}

int64_t partial_floats(Format format, const LinearArguments& p) {
  if (p.clusters || p.schedule.parts == 1) return 0;
  const int rows = instance_rows(format, p.group_dim, p.count);
  const int64_t sums = format == Format::kComplex ? 2 : 1;
  return thread_blocks_of(p.schedule) * teams_of(rows) * tile_strips(rows) * sums * kStrip * rows;
}

int64_t arrival_words(const LinearArguments& p) {
  return p.schedule.tiles * divide_up(p.count, kMostWarpRows);
}

cuda::Status linear(Format format, const LinearArguments& p, cuda::Stream stream) {
  constexpr cuda::Status kInvalidValue = 1;
  const int64_t most = p.path == Path::kBroad ? kMostBroadRows
                       : p.group_dim == 1     ? kMaxFusedRows
                                              : kMostColumnwiseRows;
  if (p.count > most) return kInvalidValue;
  if (p.path == Path::kBroad) return linear_broad(format, p, stream);
  if (p.path == Path::kFew) return linear_few(format, p, stream);
  if (p.path == Path::kWide) return linear_wide(format, p, stream);
  switch (format) {
    case Format::k1:
      return linear_1(p, stream);
    case Format::k2:
      return linear_2(p, stream);
    case Format::k3:
      return linear_3(p, stream);
    case Format::k4:
      return linear_4(p, stream);
    case Format::k8:
      return linear_8(p, stream);
    case Format::kCodebook:
      return linear_codebook(p, stream);
    default:
      return linear_complex(p, stream);
  }
}

cuda::Status repack(Format format, const Codes& codes, uint32_t* out, cuda::Stream stream) {
  const int64_t steps = steps_of(codes.rows, codes.cols);
  if (steps == 0) return 0;
  const cuda::LaunchShape shape = {blocks_for(steps, kThreads), 1, kThreads, 0};
  return cuda::launch(repack_kernel, shape, stream, format, codes, out);
}

cuda::Status dequantize(const PackedMatrix& weight, RowRange rows, const int64_t* indices,
                        FloatType type, void* out, cuda::Stream stream) {
  const int64_t blocks = (rows.end - rows.begin) * ceil_div(weight.cols, kSegment);
  if (blocks == 0) return 0;
  if (indices == nullptr && plainly_decoded(weight, rows)) {
    switch (weight.levels) {
      case 2:
        return decode_rows<1>(weight, rows, type, out, stream);
      case 4:
        return decode_rows<2>(weight, rows, type, out, stream);
      case 8:
        return decode_rows<3>(weight, rows, type, out, stream);
      case 16:
        return decode_rows<4>(weight, rows, type, out, stream);
      case 256:
        return decode_rows<8>(weight, rows, type, out, stream);
    }
  }
  const cuda::LaunchShape shape = {static_cast<unsigned>(blocks), 1, kThreads, 0};
  return cuda::launch(dequantize_kernel, shape, stream, weight, rows.begin, indices, type, out);
}

cuda::Status linear_int8(const PackedMatrix& weight, const Activations& x, const float* bias,
                         int8_t* rounded, double* steps, void* out, cuda::Stream stream) {
  if (x.rows == 0 || weight.rows == 0) return 0;
  const cuda::Status status =
      cuda::launch(round_activations_kernel, {static_cast<unsigned>(x.rows), 1, 32, 0}, stream, x,
                   weight.cols, rounded, steps);
  if (status != 0) return status;
  const Output output{out, bias, x.type, 0, weight.rows, 0, weight.row_scale};
  return cuda::launch(int8_kernel, {blocks_for(x.rows * weight.rows, kThreads), 1, kThreads, 0},
                      stream, weight, rounded, steps, x.rows, output);
}

}  // namespace pyrobust::matmul::gpu
