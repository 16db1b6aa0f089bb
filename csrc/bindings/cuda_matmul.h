// What pyrobust._cuda holds of a packed weight, as Python objects over addresses of tensors that
// Python keeps alive.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "bindings/cuda_queue.h"
#include "matmul/cuda.h"
#include "matmul/weights.h"

namespace pyrobust::cuda_matmul {

namespace py = pybind11;
namespace gpu = matmul::gpu;

// Device index and stream.
using Where = std::pair<int, uintptr_t>;

inline void require(cuda::Status status) { require_launched("packed_linear", status); }

// The canonical weight: what dequantizing and the int8 mode read.
struct Matrix {
  matmul::PackedMatrix weight;

  Matrix(uintptr_t codes, uintptr_t scale, int scale_type, uintptr_t zero, int64_t rows,
         int64_t cols, int levels, int64_t group_size, int group_dim) {
    weight.codes = device_pointer<const uint8_t>(codes);
    weight.scale = device_pointer<const void>(scale);
    weight.scale_type = static_cast<FloatType>(scale_type);
    weight.zero = device_pointer<const uint8_t>(zero);
    weight.rows = rows;
    weight.cols = cols;
    weight.levels = levels;
    weight.group_size = group_size;
    weight.group_dim = group_dim;
  }

  void set_parts(uintptr_t row_scale, uintptr_t codebook) {
    weight.row_scale = device_pointer<const float>(row_scale);
    weight.codebook = device_pointer<const uint8_t>(codebook);
  }

  void set_remainder(uintptr_t values, int type, uintptr_t columns, uintptr_t offsets,
                     int64_t count) {
    weight.remainder = {device_pointer<const void>(values), device_pointer<const int32_t>(columns),
                        device_pointer<const int64_t>(offsets), static_cast<FloatType>(type),
                        count};
  }

  void dequantize(int64_t begin, int64_t end, uintptr_t indices, int type, uintptr_t out,
                  const Where& where) const {
    const Launching on(where.first, where.second);
    require(gpu::dequantize(weight, {begin, end}, device_pointer<const int64_t>(indices),
                            static_cast<FloatType>(type), device_pointer<void>(out),
                            on.queue.stream));
  }

  void int8(uintptr_t x, int x_type, int64_t count, uintptr_t bias, uintptr_t rounded,
            uintptr_t steps, uintptr_t out, const Where& where) const {
    const Launching on(where.first, where.second);
    const matmul::Activations rows{device_pointer<const void>(x), static_cast<FloatType>(x_type),
                                   count};
    require(gpu::linear_int8(weight, rows, device_pointer<const float>(bias),
                             device_pointer<int8_t>(rounded), device_pointer<double>(steps),
                             device_pointer<void>(out), on.queue.stream));
  }
};

// The repacked weight, ready to multiply.
struct Linear {
  gpu::Format format;
  gpu::LinearArguments arguments;
  int multiprocessors;
  mutable bool settled = false;  // a product has waited for the weight, and later ones for that

  Linear(const Matrix& matrix, uintptr_t codes, uintptr_t scale, int scale_type, uintptr_t zero,
         uintptr_t alpha, int processors, bool clusters, bool warpgroups)
      : multiprocessors(processors) {
    const matmul::PackedMatrix& w = matrix.weight;
    format = gpu::format_of(w.levels, w.codebook != nullptr);
    gpu::LinearArguments& p = arguments;
    p.codes = device_pointer<const uint32_t>(codes);
    p.scale = device_pointer<const void>(scale);
    p.scale_type = static_cast<FloatType>(scale_type);
    p.zero = device_pointer<const uint8_t>(zero);
    p.alpha = device_pointer<const float>(alpha);
    p.row_scale = w.row_scale;
    p.codebook = w.codebook;
    p.remainder = w.remainder;
    p.rows = w.rows;
    p.cols = gpu::divide_up(w.cols, 8) * 8;  // x comes with whole 16-byte chunks
    p.group_dim = w.group_dim;
    p.levels = w.levels;
    p.symmetric_zero = static_cast<float>(matmul::symmetric_zero(w));
    const bool one_group = w.group_size >= (w.group_dim == 1 ? w.cols : w.rows);
    p.clusters = clusters;
    p.warpgroups = warpgroups;
    gpu::plan_linear(one_group ? INT64_MAX : w.group_size, &p);
  }

  // Whether run() takes more than 64 rows of this type where weights may be rounded to it.
  bool takes_many_rows(int x_type) const {
    return gpu::takes_many_rows(format, arguments, static_cast<FloatType>(x_type));
  }

  gpu::LinearArguments for_rows(int64_t count, int x_type, bool rounds) const {
    gpu::LinearArguments p = arguments;
    p.x_type = static_cast<FloatType>(x_type);
    p.rounds = rounds;
    gpu::plan_rows(format, count, multiprocessors, &p);
    return p;
  }

  py::tuple workspace(int64_t count, int x_type, bool rounds) const {
    const gpu::LinearArguments p = for_rows(count, x_type, rounds);
    return py::make_tuple(gpu::partial_floats(format, p), gpu::arrival_words(p));
  }

  void run(uintptr_t x, int x_type, int64_t count, uintptr_t bias, uintptr_t out, int out_type,
           bool rounds, uintptr_t partials, uintptr_t arrivals, const Where& where) const {
    const Launching on(where.first, where.second);
    gpu::LinearArguments p = for_rows(count, x_type, rounds);
    p.x = device_pointer<const void>(x);
    p.bias = device_pointer<const float>(bias);
    p.out = device_pointer<void>(out);
    p.out_type = static_cast<FloatType>(out_type);
    p.partials = device_pointer<float>(partials);
    p.arrivals = device_pointer<int32_t>(arrivals);
    p.settled = settled;
    settled = true;
    require(gpu::linear(format, p, on.queue.stream));
  }
};

}  // namespace pyrobust::cuda_matmul
