// Python entry points of sums with packed and plain vectors. What is added is read and checked
// once, as a `Summand`; add_all() then adds many to their targets, all checked before the first is
// changed. A step into the interpreter between two tensors of a million weights finds its data
// pushed out of the caches, which took a quarter of the time of all sums.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/families.h"
#include "bindings/packed_matrix.h"
#include "bindings/tensor_view.h"
#include "core/bit_layout.h"
#include "matmul/matmul.h"
#include "runtime/check.h"
#include "runtime/pages.h"

namespace pyrobust {
namespace {

// Refers to the memory of `kept`, whose tensors must not be given another.
struct Summand {
  int64_t rows = 0, cols = 0;
  std::function<void(float alpha, const matmul::AddTarget& target, int num_threads)> add;
  std::vector<py::object> kept;
};

std::vector<py::object> keep(std::initializer_list<py::handle> objects) {
  std::vector<py::object> kept;
  for (const py::handle object : objects) {
    kept.push_back(py::reinterpret_borrow<py::object>(object));
  }
  return kept;
}

Summand weight_summand(py::handle codes, py::handle scale, py::handle zero, int64_t in_features,
                       int levels, int64_t group_size, int group_dim, py::handle extras) {
  const matmul::PackedMatrix weight =
      packed_matrix(view(codes, "codes"), view(scale, "scale"), view_optional(zero, "zero"),
                    in_features, levels, group_size, group_dim, extras);
  const auto add = [weight](float alpha, const matmul::AddTarget& target, int threads) {
    matmul::add_dequantized(weight, alpha, target, threads);
  };
  return {weight.rows, weight.cols, add, keep({codes, scale, zero, extras})};
}

Summand levels_summand(py::handle codes_, py::handle table_, int64_t cols) {
  const TensorView codes = view(codes_, "codes"), table = view(table_, "levels");
  table.require_dtype(DType::kFloat32).require_ndim(1);
  const auto levels = static_cast<int>(table.shape[0]);
  check(code_bits(levels) >= 0, "levels must hold 2, 3, 4, 8, 16 or 256 values; got ", levels, ".");
  check(cols >= 0, "cols must be at least 0; got ", cols, ".");
  codes.require_dtype(DType::kUInt8).require_ndim(2);
  codes.require_size(1, packed_row_bytes(cols, levels));
  const matmul::LevelCodes packed{codes.as<const uint8_t>(), codes.shape[0], cols, levels};
  const auto* entries = table.as<const float>();
  const auto add = [=](float alpha, const matmul::AddTarget& target, int threads) {
    matmul::add_levels(packed, entries, alpha, target, threads);
  };
  return {packed.rows, cols, add, keep({codes_, table_})};
}

Summand values_summand(py::handle values_, int64_t rows, int64_t cols) {
  const TensorView values = view(values_, "values");
  check(values.numel() == rows * cols, "values must hold ", rows * cols, " elements; got ",
        values.numel(), ".");
  const FloatType type = float_type(values);
  const void* from = values.data;
  const auto add = [=](float alpha, const matmul::AddTarget& target, int threads) {
    matmul::add_values(from, type, rows, cols, alpha, target, threads);
  };
  return {rows, cols, add, keep({values_})};
}

// A summand, its target, its factor, and None or what has `values`, for what the target holds
// before, and `filled`.
using Addition = std::tuple<std::shared_ptr<Summand>, py::object, float, py::object>;

matmul::AddTarget add_target(const Addition& addition, std::vector<py::object>* kept) {
  const Summand& summand = *std::get<0>(addition);
  const py::object& saved = std::get<3>(addition);
  const TensorView target =
      view_matrix(std::get<1>(addition), "target", summand.rows, summand.cols);
  matmul::AddTarget out{target.data, float_type(target), target.stride[0]};
  if (saved.is_none()) return out;
  const TensorView values = view(kept->emplace_back(saved.attr("values")), "saved");
  values.require_dtype(target.dtype);
  check(values.numel() == target.numel(), "saved must hold ", target.numel(), " values; got ",
        values.numel(), ".");
  out.saved = values.data;
  return out;
}

// Sets `filled` of every copy that was made, also where a sum throws, and without a step into the
// interpreter after values have changed, where a signal may raise.
void add_all(const std::vector<Addition>& additions, int num_threads) {
  std::vector<py::object> kept;
  std::vector<matmul::AddTarget> targets;
  for (const Addition& addition : additions) targets.push_back(add_target(addition, &kept));
  size_t made = 0;
  std::exception_ptr error;
  {
    py::gil_scoped_release release;
    try {
      for (; made < additions.size(); ++made) {
        std::get<0>(additions[made])->add(std::get<2>(additions[made]), targets[made], num_threads);
      }
    } catch (...) {
      error = std::current_exception();
    }
  }
  for (size_t i = 0; i < made; ++i) {
    const py::object& saved = std::get<3>(additions[i]);
    if (!saved.is_none()) saved.attr("filled") = true;
  }
  if (error) std::rethrow_exception(error);
}

// For memory that was not yet written.
void use_large_pages(py::handle tensor) {
  const TensorView bytes = view(tensor, "tensor");
  bytes.require_dtype(DType::kUInt8);
  prefer_large_pages(bytes.data, bytes.numel());
}

}  // namespace

void bind_additions(py::module_& m) {
  py::class_<Summand, std::shared_ptr<Summand>>(m, "Summand");
  m.def("weight_summand", &weight_summand);
  m.def("levels_summand", &levels_summand);
  m.def("values_summand", &values_summand);
  m.def("add_all", &add_all);
  m.def("use_large_pages", &use_large_pages);
}

}  // namespace pyrobust
