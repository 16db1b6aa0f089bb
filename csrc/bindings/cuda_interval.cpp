// Python entry points of the interval launches.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "bindings/cuda_families.h"
#include "bindings/cuda_queue.h"
#include "interval/cuda.h"
#include "interval/cuda_library.h"
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

// batch, rows, terms
using Sizes = std::array<int64_t, 3>;

LinearCall call_of(const Pointers& pointers, const Sizes& sizes, const std::string& rounding) {
  LinearCall call{};
  call.lower = device_pointer<const float>(pointers[0]);
  call.upper = device_pointer<const float>(pointers[1]);
  call.bias = device_pointer<const float>(pointers[2]);
  call.out_lower = device_pointer<float>(pointers[3]);
  call.out_upper = device_pointer<float>(pointers[4]);
  call.scratch = device_pointer<void>(pointers[5]);
  call.batch = sizes[0], call.rows = sizes[1], call.terms = sizes[2];
  call.rounding = parse_rounding(rounding);
  return call;
}

void run(LinearCall call, Where where) {
  const Launching on(where.first, where.second);
  call.clusters = has_clusters(where.first);
  call.warpgroups = has_warpgroups(where.first);
  require_launched("interval_linear", interval::gpu::interval_linear(call, on.queue));
}

// kind: WeightKind
int64_t interval_scratch_bytes(int kind, const Sizes& sizes, Where where) {
  LinearCall call{};
  call.kind = static_cast<WeightKind>(kind);
  call.batch = sizes[0], call.rows = sizes[1], call.terms = sizes[2];
  call.warpgroups = has_warpgroups(where.first);
  return interval::gpu::scratch_bytes(call, usable_device(where.first).multiprocessors);
}

void interval_linear(const Pointers& pointers, uintptr_t weight, bool bfloat16, bool int8,
                     bool decoded, const Sizes& sizes, const std::string& rounding, Where where) {
  LinearCall call = call_of(pointers, sizes, rounding);
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
                            const Sizes& sizes, const std::string& rounding, Where where) {
  LinearCall call = call_of(pointers, sizes, rounding);
  call.kind = WeightKind::kPacked;
  call.packed = packed_matrix(codes, scale, scale_type, zero, call.rows, call.terms, format);
  call.int8 = int8;
  check(interval::gpu::packed_fits(call.packed),
        "interval_packed_linear: no CUDA kernel for this format.");
  run(call, where);
}

bool interval_packed_fits(uintptr_t codes, int64_t terms, const Format& format) {
  return interval::gpu::packed_fits(packed_matrix(codes, 0, 0, 0, 1, terms, format));
}

// --- around a library's products ----------------------------------------------------------------

// (terms, padded, chunks, whether W = W1 + W2, rounding, whether the weight was packed)
using SumOptions = std::tuple<int64_t, int64_t, int64_t, bool, std::string, bool>;

interval::gpu::LibrarySum library_sum(const SumOptions& options) {
  interval::gpu::LibrarySum sum{};
  std::string rounding;
  std::tie(sum.terms, sum.padded, sum.chunks, sum.two_parts, rounding, sum.packed) = options;
  sum.rounding = parse_rounding(rounding);
  check(sum.chunks > 0 && sum.padded >= sum.terms && sum.padded % (8 * sum.chunks) == 0 &&
            sum.padded <= interval::gpu::kMostTerms,
        "interval: ", sum.terms, " terms in ", sum.padded, " places of ", sum.chunks, " chunks.");
  return sum;
}

// first, second, magnitude: 0 where not wanted
void interval_split_weight(uintptr_t weight, bool bfloat16, int64_t rows, int64_t terms,
                           int64_t padded, const std::array<uintptr_t, 3>& to, Where where) {
  interval::gpu::SplitWeight work{};
  work.weight = device_pointer<const void>(weight);
  work.bfloat16 = bfloat16;
  work.rows = rows;
  work.terms = terms;
  work.padded = padded;
  work.first = device_pointer<uint16_t>(to[0]);
  work.second = device_pointer<uint16_t>(to[1]);
  work.magnitude = device_pointer<uint16_t>(to[2]);
  const Launching on(where.first, where.second);
  require_launched("interval_linear", interval::gpu::split_weight(work, on.queue));
}

// lower, upper, planes, extra (0: none)
void interval_split_rows(const std::array<uintptr_t, 4>& pointers, int64_t batch,
                         const SumOptions& sum, Where where) {
  interval::gpu::SplitRows work{};
  work.lower = device_pointer<const float>(pointers[0]);
  work.upper = device_pointer<const float>(pointers[1]);
  work.planes = device_pointer<uint16_t>(pointers[2]);
  work.extra = device_pointer<float>(pointers[3]);
  work.batch = batch;
  work.sum = library_sum(sum);
  const Launching on(where.first, where.second);
  require_launched("interval_linear", interval::gpu::split_rows(work, on.queue));
}

// kernel, stride, dilation and size of the result, vertical first, and groups
using WindowSizes = std::array<int64_t, 9>;

interval::Window window_of(const WindowSizes& size) {
  interval::Window window{};
  window.kernel_height = size[0], window.kernel_width = size[1];
  window.stride_height = size[2], window.stride_width = size[3];
  window.dilation_height = size[4], window.dilation_width = size[5];
  window.out_height = size[6], window.out_width = size[7];
  window.groups = size[8];
  return window;
}

// lower, upper, planes, extra (0: none), pixels
void interval_split_patches(const std::array<uintptr_t, 5>& pointers,
                            const std::array<int64_t, 4>& images, const WindowSizes& window,
                            int64_t columns, const SumOptions& sum, Where where) {
  interval::gpu::SplitPatches work{};
  work.lower = device_pointer<const float>(pointers[0]);
  work.upper = device_pointer<const float>(pointers[1]);
  work.planes = device_pointer<uint16_t>(pointers[2]);
  work.extra = device_pointer<float>(pointers[3]);
  work.pixels = device_pointer<uint32_t>(pointers[4]);
  work.images = {images[0], images[1], images[2], images[3]};
  work.window = window_of(window);
  work.sum = library_sum(sum);
  work.columns = columns;
  const Launching on(where.first, where.second);
  require_launched("interval_conv2d", interval::gpu::split_patches(work, on.queue));
}

// first, low, second (0: none), radius, bias (0: none), out_lower, out_upper;
// groups, outer, inner, pixels, patches, stride
void interval_finish(const std::array<uintptr_t, 7>& pointers, const std::array<int64_t, 6>& sizes,
                     bool in_chunks, const SumOptions& sum, Where where) {
  interval::gpu::Finish work{};
  work.in_chunks = in_chunks;
  work.first = device_pointer<const float>(pointers[0]);
  work.low = device_pointer<const float>(pointers[1]);
  work.second = device_pointer<const float>(pointers[2]);
  work.radius = device_pointer<const float>(pointers[3]);
  work.bias = device_pointer<const float>(pointers[4]);
  work.out_lower = device_pointer<float>(pointers[5]);
  work.out_upper = device_pointer<float>(pointers[6]);
  work.sum = library_sum(sum);
  work.groups = sizes[0], work.outer = sizes[1], work.inner = sizes[2];
  work.pixels = sizes[3], work.patches = sizes[4], work.stride = sizes[5];
  const Launching on(where.first, where.second);
  require_launched("interval", interval::gpu::finish(work, on.queue));
}

}  // namespace

void bind_cuda_interval(py::module_& m) {
  m.def("interval_linear", &interval_linear);
  m.def("interval_packed_linear", &interval_packed_linear);
  m.def("interval_packed_fits", &interval_packed_fits);
  m.def("interval_scratch_bytes", &interval_scratch_bytes);
  m.def("interval_split_weight", &interval_split_weight);
  m.def("interval_split_rows", &interval_split_rows);
  m.def("interval_split_patches", &interval_split_patches);
  m.def("interval_split_patches_fits", &interval::gpu::split_patches_fits);
  m.def("interval_finish", &interval_finish);
  m.attr("INTERVAL_MOST_TERMS") = interval::gpu::kMostTerms;
}

}  // namespace pyrobust
