// Python entry points of the interval kernels.
#include "interval/interval.h"

#include <pybind11/stl.h>

#include <array>
#include <atomic>

#include "bindings/families.h"
#include "bindings/interval_call.h"
#include "bindings/packed_matrix.h"
#include "bindings/tensor_view.h"
#include "interval/elementwise.h"
#include "interval/gradients.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"

namespace pyrobust {
namespace {

// The owner is pyrobust/ops/_interval_precision.py.
std::atomic<bool> coarse_radius{false};

// The arguments that every entry point shares, in the order of its Python call.
struct Ends {
  TensorView lower, upper, out_lower, out_upper;

  Ends(py::handle lower, py::handle upper, py::handle out_lower, py::handle out_upper, int ndim)
      : lower(view(lower, "lower")),
        upper(view(upper, "upper")),
        out_lower(view(out_lower, "out_lower")),
        out_upper(view(out_upper, "out_upper")) {
    for (const TensorView* end : {&this->lower, &this->upper, &this->out_lower, &this->out_upper}) {
      end->require_dtype(DType::kFloat32).require_ndim(ndim);
    }
    for (int axis = 0; axis < ndim; ++axis) {
      this->upper.require_size(axis, this->lower.shape[axis]);
      this->out_upper.require_size(axis, this->out_lower.shape[axis]);
    }
  }

  interval::Call call(const interval::Weight& weight, const TensorView& bias,
                      const std::string& rounding, bool int8, bool rectified,
                      std::atomic<bool>* unbounded) const {
    out_lower.require_size(0, lower.shape[0]).require_size(1, weight.rows);
    const float* shift = nullptr;
    if (bias.ndim != 0) {
      bias.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, weight.rows);
      shift = bias.as<float>();
    }
    const Promise promise = parse_rounding(rounding);
    return {lower.as<float>(),
            upper.as<float>(),
            weight,
            shift,
            promise.rounding,
            int8,
            promise.operand_error,
            rectified,
            coarse_radius,
            out_lower.as<float>(),
            out_upper.as<float>(),
            unbounded};
  }
};

// Both products tell whether all ends are finite, and so do the functions for Python.
bool linear(const Ends& ends, const interval::Weight& weight, const TensorView& bias,
            const std::string& rounding, bool int8, bool rectified, int num_threads) {
  ends.lower.require_size(1, weight.terms);
  std::atomic<bool> unbounded{false};
  const interval::Call call = ends.call(weight, bias, rounding, int8, rectified, &unbounded);
  const py::gil_scoped_release release;
  interval::interval_linear(call, ends.lower.shape[0], num_threads);
  return !unbounded;
}

using Pair = std::array<int64_t, 2>;

// (4, channels): mean, scale, shift and gain, one row after another.
const double* channel_map(py::handle tensor, int64_t channels) {
  const TensorView value = view(tensor, "map");
  value.require_dtype(DType::kFloat64).require_ndim(2).require_size(0, 4);
  return value.require_size(1, channels).as<double>();
}

const float* like_outputs(py::handle tensor, const char* name, const TensorView& out) {
  const TensorView value = view(tensor, name);
  value.require_dtype(DType::kFloat32).require_ndim(out.ndim);
  for (int axis = 0; axis < out.ndim; ++axis) value.require_size(axis, out.shape[axis]);
  return value.as<float>();
}

// What follows a convolution: None, or (norm, sum) with a None for what is absent,
// norm = (map, rectified), sum = (lower, upper, rectified, other_rectified).
struct Following {
  interval::Epilogue epilogue;
  bool any = false;

  Following(py::handle given, const TensorView& out) {
    if (given.is_none()) return;
    any = true;
    const auto [norm, sum] = py::cast<std::array<py::object, 2>>(given);
    if (!norm.is_none()) {
      const auto parts = py::cast<std::array<py::object, 2>>(norm);
      const int64_t channels = out.shape[1];
      epilogue.mean = channel_map(parts[0], channels);
      epilogue.scale = epilogue.mean + channels;
      epilogue.shift = epilogue.scale + channels;
      epilogue.gain = epilogue.shift + channels;
      epilogue.rectified_norm = py::cast<bool>(parts[1]);
    }
    if (!sum.is_none()) {
      const auto parts = py::cast<std::array<py::object, 4>>(sum);
      epilogue.lower = like_outputs(parts[0], "lower of the sum", out);
      epilogue.upper = like_outputs(parts[1], "upper of the sum", out);
      epilogue.rectified_sum = py::cast<bool>(parts[2]);
      epilogue.rectified_other = py::cast<bool>(parts[3]);
    }
  }
};

bool conv2d(const Ends& ends, const interval::Weight& weight, const TensorView& bias, Pair kernel,
            Pair stride, Pair pad, Pair dilation, int64_t groups, const std::string& rounding,
            bool int8, bool rectified, int num_threads, py::handle following) {
  const int64_t* size = ends.lower.shape;
  const interval::Images images{size[0], size[1], size[2], size[3]};
  const interval::Window window{kernel[0],
                                kernel[1],
                                stride[0],
                                stride[1],
                                pad[0],
                                pad[1],
                                dilation[0],
                                dilation[1],
                                groups,
                                ends.out_lower.shape[2],
                                ends.out_lower.shape[3]};
  std::atomic<bool> unbounded{false};
  interval::Call call = ends.call(weight, bias, rounding, int8, rectified, &unbounded);
  const Following late(following, ends.out_lower);
  if (late.any) call.epilogue = &late.epilogue;
  const py::gil_scoped_release release;
  interval::interval_conv2d(call, images, window, num_threads);
  return !unbounded;
}

bool interval_linear(py::handle lower, py::handle upper, py::handle weight_, py::handle bias,
                     const std::string& rounding, bool rectified, py::handle out_lower,
                     py::handle out_upper, int num_threads) {
  const TensorView weight = view(weight_, "weight");
  weight.require_dtype(DType::kFloat32).require_ndim(2);
  return linear(Ends(lower, upper, out_lower, out_upper, 2),
                {weight.as<float>(), nullptr, weight.shape[0], weight.shape[1]},
                view_optional(bias, "bias"), rounding, false, rectified, num_threads);
}

bool interval_conv2d(py::handle lower, py::handle upper, py::handle weight_, py::handle bias,
                     Pair stride, Pair pad, Pair dilation, int64_t groups,
                     const std::string& rounding, bool rectified, py::handle out_lower,
                     py::handle out_upper, int num_threads, py::handle epilogue) {
  const TensorView weight = view(weight_, "weight");
  weight.require_dtype(DType::kFloat32).require_ndim(4);
  const int64_t* shape = weight.shape;
  return conv2d(Ends(lower, upper, out_lower, out_upper, 4),
                {weight.as<float>(), nullptr, shape[0], shape[1] * shape[2] * shape[3]},
                view_optional(bias, "bias"), {shape[2], shape[3]}, stride, pad, dilation, groups,
                rounding, false, rectified, num_threads, epilogue);
}

// (in_features, levels, group_size, group_dim)
using Format = std::array<int64_t, 4>;

matmul::PackedMatrix packed_weight(py::handle codes, py::handle scale, py::handle zero,
                                   const Format& format, py::handle extras) {
  return packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                       format[0], static_cast<int>(format[1]), format[2],
                       static_cast<int>(format[3]), extras);
}

bool interval_packed_linear(py::handle lower, py::handle upper, py::handle codes, py::handle scale,
                            py::handle zero, py::handle bias, const Format& format,
                            py::handle extras, bool int8, const std::string& rounding,
                            bool rectified, py::handle out_lower, py::handle out_upper,
                            int num_threads) {
  const matmul::PackedMatrix weight = packed_weight(codes, scale, zero, format, extras);
  return linear(Ends(lower, upper, out_lower, out_upper, 2),
                {nullptr, &weight, weight.rows, weight.cols}, view_optional(bias, "bias"), rounding,
                int8, rectified, num_threads);
}

bool interval_packed_conv2d(py::handle lower, py::handle upper, py::handle codes, py::handle scale,
                            py::handle zero, py::handle bias, const Format& format,
                            py::handle extras, bool int8, Pair kernel, Pair stride, Pair pad,
                            Pair dilation, int64_t groups, const std::string& rounding,
                            bool rectified, py::handle out_lower, py::handle out_upper,
                            int num_threads, py::handle epilogue) {
  const matmul::PackedMatrix weight = packed_weight(codes, scale, zero, format, extras);
  return conv2d(Ends(lower, upper, out_lower, out_upper, 4),
                {nullptr, &weight, weight.rows, weight.cols}, view_optional(bias, "bias"), kernel,
                stride, pad, dilation, groups, rounding, int8, rectified, num_threads, epilogue);
}

// Radii beside `count` float32 numbers, in float32 or bfloat16.
interval::Radii radii(py::handle tensor, int64_t count) {
  const TensorView value = view(tensor, "radius");
  if (value.dtype != DType::kBFloat16) value.require_dtype(DType::kFloat32);
  check(value.numel() == count, "interval: radii must have ", count, " elements; got ",
        value.numel(), ".");
  return {value.data, value.dtype == DType::kBFloat16};
}

void interval_split_ends(py::handle lower, py::handle upper, bool rectified, py::handle centre,
                         py::handle radius, int num_threads) {
  int64_t count;
  const auto t = alike<3>({lower, upper, centre}, &count);
  const interval::Radii r = radii(radius, count);
  const py::gil_scoped_release release;
  interval::split_ends({t[0], t[1], count, rectified, t[2], r}, num_threads);
}

void interval_split_gradients(py::handle to_lower, py::handle to_upper, py::handle to_centre,
                              py::handle to_radius, int num_threads) {
  int64_t count;
  const auto t = alike<3>({to_lower, to_upper, to_centre}, &count);
  const interval::Radii r = radii(to_radius, count);
  const py::gil_scoped_release release;
  interval::split_gradients({t[0], t[1], count, t[2], r}, num_threads);
}

void interval_join_gradients(py::handle to_centre, py::handle to_radius, py::handle lower,
                             py::handle upper, py::handle to_lower, py::handle to_upper,
                             int num_threads) {
  int64_t count;
  const auto t = alike<5>({to_centre, lower, upper, to_lower, to_upper}, &count);
  const interval::Radii r = radii(to_radius, count);
  const py::gil_scoped_release release;
  interval::join_gradients({t[0], r, t[1], t[2], count, t[3], t[4]}, num_threads);
}

void interval_size_of_weight(py::handle weight, py::handle size, int num_threads) {
  int64_t count;
  const auto t = alike<1>({weight}, &count);
  const interval::Radii r = radii(size, count);
  const py::gil_scoped_release release;
  interval::size_of_weight({t[0], count, r}, num_threads);
}

void interval_add_weight_gradient(py::handle from_centre, py::handle from_radius, py::handle weight,
                                  int num_threads) {
  int64_t count;
  const auto t = alike<2>({from_centre, weight}, &count);
  const interval::Radii r = radii(from_radius, count);
  const py::gil_scoped_release release;
  interval::add_weight_gradient({t[0], r, t[1], count}, num_threads);
}

struct ChannelShape {
  int64_t images, channels, pixels;

  ChannelShape(py::handle lower, int64_t count) {
    const TensorView box = view(lower, "lower");
    check(box.ndim >= 2, "interval_channel_affine: lower must have channels; got ", box.ndim,
          " dimensions.");
    images = box.shape[0];
    channels = box.shape[1];
    pixels = count / std::max<int64_t>(1, images * channels);
  }
};

bool interval_channel_affine(py::handle lower, py::handle upper, bool rectified, py::handle map,
                             const std::string& rounding, py::handle out_lower,
                             py::handle out_upper, int num_threads) {
  int64_t count;
  const auto t = alike<4>({lower, upper, out_lower, out_upper}, &count);
  const ChannelShape shape(lower, count);
  const double* const mean = channel_map(map, shape.channels);
  if (count == 0) return true;
  const interval::ChannelAffine work{{t[0], t[1], rectified},
                                     shape.images,
                                     shape.channels,
                                     shape.pixels,
                                     mean,
                                     mean + shape.channels,
                                     mean + 2 * shape.channels,
                                     mean + 3 * shape.channels,
                                     parse_rounding(rounding).rounding,
                                     t[2],
                                     t[3]};
  const py::gil_scoped_release release;
  return interval::channel_affine(work, num_threads);
}

// Gradients of the box's ends, unless None, and of scale and shift, (2, channels), unless None.
void interval_channel_affine_backward(py::handle of_lower, py::handle of_upper, py::handle lower,
                                      py::handle upper, bool rectified, py::handle map,
                                      py::handle to_lower, py::handle to_upper, py::handle to_map,
                                      int num_threads) {
  int64_t count;
  const auto t = alike<6>({lower, upper, of_lower, of_upper, to_lower, to_upper}, &count);
  const ChannelShape shape(lower, count);
  const double* const mean = channel_map(map, shape.channels);
  double* sums = nullptr;
  if (!to_map.is_none()) {
    const TensorView value = view(to_map, "to_map");
    value.require_dtype(DType::kFloat64).require_ndim(2).require_size(0, 2);
    sums = value.require_size(1, shape.channels).as<double>();
    std::fill(sums, sums + 2 * shape.channels, 0.0);
  }
  if (count == 0) return;
  const interval::ChannelAffineBackward work{t[2],
                                             t[3],
                                             {t[0], t[1], rectified},
                                             shape.images,
                                             shape.channels,
                                             shape.pixels,
                                             mean,
                                             mean + shape.channels,
                                             t[4],
                                             t[5],
                                             sums,
                                             sums != nullptr ? sums + shape.channels : nullptr};
  const py::gil_scoped_release release;
  interval::channel_affine_backward(work, num_threads);
}

template <typename T>
void write_map(const std::array<TensorView, 4>& parts, double eps, const TensorView& map) {
  const auto at = [&](size_t i) {
    return parts[i].ndim != 0 ? parts[i].template as<const T>() : nullptr;
  };
  interval::normalizing_map(at(0), at(1), at(2), at(3), eps, map.shape[1], map.as<double>());
}

// Batch norm with running statistics as a map of channels; `weight` and `bias` may be None.
void interval_batch_norm_map(py::handle mean, py::handle variance, py::handle weight,
                             py::handle bias, double eps, py::handle map_) {
  const TensorView map = view(map_, "map");
  map.require_dtype(DType::kFloat64).require_ndim(2).require_size(0, 4);
  const std::array<TensorView, 4> parts{view(mean, "mean"), view(variance, "variance"),
                                        view_optional(weight, "weight"),
                                        view_optional(bias, "bias")};
  for (const TensorView& part : parts) {
    if (part.ndim == 0) continue;
    part.require_dtype(parts[0].dtype).require_ndim(1).require_size(0, map.shape[1]);
  }
  if (parts[0].dtype == DType::kFloat64) return write_map<double>(parts, eps, map);
  parts[0].require_dtype(DType::kFloat32);
  write_map<float>(parts, eps, map);
}

bool interval_add(py::handle low_x, py::handle high_x, bool rectified_x, py::handle low_y,
                  py::handle high_y, bool rectified_y, const std::string& rounding,
                  py::handle out_lower, py::handle out_upper, int num_threads) {
  int64_t count;
  const auto t = alike<6>({low_x, high_x, low_y, high_y, out_lower, out_upper}, &count);
  const interval::BoxSum work{{t[0], t[1], rectified_x},
                              {t[2], t[3], rectified_y},
                              count,
                              parse_rounding(rounding).rounding,
                              t[4],
                              t[5]};
  const py::gil_scoped_release release;
  return interval::add_boxes(work, num_threads);
}

}  // namespace

bool coarse_radius_allowed() { return coarse_radius; }

Promise parse_rounding(const std::string& name) {
  if (name == "nearest") return {interval::Rounding::kNearest, 0.0f};
  if (name == "real") return {interval::Rounding::kReal, 0.0f};
  if (name == "deployed") return {interval::Rounding::kDeployed, 0.0f};
  if (name == "deployed-tf32") return {interval::Rounding::kDeployed, 1.0f / 1024};
  if (name == "deployed-bfloat16") return {interval::Rounding::kDeployed, 1.0f / 256};
  fail(
      "interval: rounding must be one of real, deployed, nearest, deployed-tf32, "
      "deployed-bfloat16; got '",
      name, "'.");
}

void bind_interval(py::module_& m) {
  m.def("set_interval_coarse_radius", [](bool allowed) { return coarse_radius.exchange(allowed); });
  m.def("has_bfloat16_products", &has_bfloat16_products);
  m.def("has_bfloat16_tiles", &has_bfloat16_tiles);
  m.def("interval_split_ends", &interval_split_ends);
  m.def("interval_split_gradients", &interval_split_gradients);
  m.def("interval_join_gradients", &interval_join_gradients);
  m.def("interval_size_of_weight", &interval_size_of_weight);
  m.def("interval_add_weight_gradient", &interval_add_weight_gradient);
  m.def("interval_channel_affine", &interval_channel_affine);
  m.def("interval_channel_affine_backward", &interval_channel_affine_backward);
  m.def("interval_batch_norm_map", &interval_batch_norm_map);
  m.def("interval_add", &interval_add);
  m.def("interval_linear", &interval_linear);
  m.def("interval_conv2d", &interval_conv2d);
  m.def("interval_packed_linear", &interval_packed_linear);
  m.def("interval_packed_conv2d", &interval_packed_conv2d);
}

}  // namespace pyrobust
