// Python entry points of the interval launches.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/cuda_families.h"
#include "bindings/cuda_queue.h"
#include "interval/cuda.h"
#include "runtime/check.h"

namespace py = pybind11;

namespace pyrobust {
namespace {

using interval::gpu::LinearCall;
using interval::gpu::WeightKind;
using Where = std::pair<int, uintptr_t>;

interval::Rounding parse_rounding(const std::string& name) {
  if (name == "nearest") return interval::Rounding::kNearest;
  if (name == "real") return interval::Rounding::kReal;
  if (name == "deployed") return interval::Rounding::kDeployed;
  fail("interval: rounding must be one of real, deployed, nearest; got '", name, "'.");
}

// lower, upper, bias (0: none), out_lower, out_upper, scratch
using Pointers = std::array<uintptr_t, 6>;

LinearCall call_of(const Pointers& pointers, int64_t batch, int64_t rows, int64_t terms,
                   const std::string& rounding) {
  LinearCall call{};
  call.lower = device_pointer<const float>(pointers[0]);
  call.upper = device_pointer<const float>(pointers[1]);
  call.bias = device_pointer<const float>(pointers[2]);
  call.out_lower = device_pointer<float>(pointers[3]);
  call.out_upper = device_pointer<float>(pointers[4]);
  call.scratch = device_pointer<void>(pointers[5]);
  call.batch = batch;
  call.rows = rows;
  call.terms = terms;
  call.rounding = parse_rounding(rounding);
  return call;
}

void run(const LinearCall& call, Where where) {
  const Launching on(where.first, where.second);
  require_launched("interval_linear", interval::gpu::interval_linear(call, on.queue));
}

void interval_linear(const Pointers& pointers, uintptr_t weight, bool bfloat16, bool int8,
                     bool decoded, int64_t batch, int64_t rows, int64_t terms,
                     const std::string& rounding, Where where) {
  LinearCall call = call_of(pointers, batch, rows, terms, rounding);
  call.kind = bfloat16 ? WeightKind::kBFloat16 : WeightKind::kFloat32;
  call.dense = device_pointer<const void>(weight);
  call.int8 = int8;
  call.decoded = decoded;
  run(call, where);
}

// (levels, group_size, group_dim)
using Format = std::array<int64_t, 3>;

matmul::PackedMatrix packed_matrix(uintptr_t codes, uintptr_t scale, int scale_type, uintptr_t zero,
                                   int64_t rows, int64_t terms, const Format& format) {
  matmul::PackedMatrix weight;
  weight.codes = device_pointer<const uint8_t>(codes);
  weight.scale = device_pointer<const void>(scale);
  weight.zero = device_pointer<const uint8_t>(zero);
  weight.scale_type = static_cast<FloatType>(scale_type);
  weight.rows = rows;
  weight.cols = terms;
  weight.levels = static_cast<int>(format[0]);
  weight.group_size = format[1];
  weight.group_dim = static_cast<int>(format[2]);
  return weight;
}

void interval_packed_linear(const Pointers& pointers, uintptr_t codes, uintptr_t scale,
                            int scale_type, uintptr_t zero, const Format& format, bool int8,
                            int64_t batch, int64_t rows, int64_t terms, const std::string& rounding,
                            Where where) {
  LinearCall call = call_of(pointers, batch, rows, terms, rounding);
  call.kind = WeightKind::kPacked;
  call.packed = packed_matrix(codes, scale, scale_type, zero, rows, terms, format);
  call.int8 = int8;
  check(interval::gpu::packed_fits(call.packed),
        "interval_packed_linear: no CUDA kernel for this format.");
  run(call, where);
}

bool interval_packed_fits(uintptr_t codes, int64_t terms, const Format& format) {
  return interval::gpu::packed_fits(packed_matrix(codes, 0, 0, 0, 1, terms, format));
}

}  // namespace

void bind_cuda_interval(py::module_& m) {
  m.def("interval_linear", &interval_linear);
  m.def("interval_packed_linear", &interval_packed_linear);
  m.def("interval_packed_fits", &interval_packed_fits);
  m.def("interval_scratch_bytes", &interval::gpu::scratch_bytes);
}

}  // namespace pyrobust
