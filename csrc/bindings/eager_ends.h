// The ends of boxes as plain eager layers hand them on: two tensors or, where they are few and
// nobody has asked for tensors, kept ends: a bytearray of all lower and then all upper ends, and
// their shape. Two tensors take longer to make, look at and give back than a small product.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>

#include "bindings/kept_ends.h"
#include "bindings/plain_arguments.h"
#include "bindings/tensor_view.h"

namespace pyrobust {

// Kept ends are at most so many bytes: a page or two of memory that malloc has at hand.
constexpr int64_t kMostKeptBytes = int64_t{1} << 16;

struct Box {
  const float *low = nullptr, *high = nullptr;
  int ndim = 0;
  int64_t shape[TensorView::kMaxDims] = {};
  py::handle tensor;  // to allocate like, null for kept ends

  Box(py::handle first, py::handle second) {
    if (PyByteArray_CheckExact(first.ptr())) {
      read_kept(first, second);
    } else {
      read_tensors(first, second);
    }
  }

  void require_terms(int64_t terms) const {
    if (ndim == 0 || shape[ndim - 1] != terms) throw NotPlain();
  }

  int64_t numel() const {
    return std::accumulate(shape, shape + ndim, int64_t{1}, std::multiplies<>());
  }

  int64_t batch() const {
    int64_t count = 1;
    for (int i = 0; i + 1 < ndim; ++i) count *= shape[i];
    return count;
  }

 private:
  void read_tensors(py::handle lower, py::handle upper) {
    for (py::handle end : {lower, upper}) require_unnegated(end);
    const TensorView first = view(lower, "lower"), second = view(upper, "upper");
    if (first.dtype != DType::kFloat32 || second.dtype != DType::kFloat32) throw NotPlain();
    if (first.ndim != second.ndim) throw NotPlain();
    for (int i = 0; i < first.ndim; ++i) {
      if (first.shape[i] != second.shape[i]) throw NotPlain();
      shape[i] = first.shape[i];
    }
    ndim = first.ndim;
    low = first.as<const float>();
    high = second.as<const float>();
    tensor = lower;
  }

  void read_kept(py::handle memory, py::handle sizes) {
    if (!PyTuple_CheckExact(sizes.ptr())) throw NotPlain();
    const Py_ssize_t count = PyTuple_GET_SIZE(sizes.ptr());
    if (count > TensorView::kMaxDims) throw NotPlain();
    ndim = static_cast<int>(count);
    int64_t total = 1;
    for (int i = 0; i < ndim; ++i) {
      shape[i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
      if (shape[i] <= 0 || shape[i] > kMostKeptBytes) throw NotPlain();
      total *= shape[i];
      if (total > kMostKeptBytes) throw NotPlain();
    }
    const auto bytes = static_cast<Py_ssize_t>(2 * total * int64_t{sizeof(float)});
    if (PyByteArray_GET_SIZE(memory.ptr()) != bytes) throw NotPlain();
    low = reinterpret_cast<const float*>(PyByteArray_AS_STRING(memory.ptr()));
    high = low + total;
  }
};

// Where the ends of a result go: what Python gets of them, and their memory.
struct Result {
  py::object first, second;
  float *low, *high;

  // Of a layer with so many rows, kept if they may be.
  Result(const Box& box, int64_t rows, bool keeps) {
    int64_t sizes[TensorView::kMaxDims];
    std::copy_n(box.shape, box.ndim, sizes);
    sizes[box.ndim - 1] = rows;
    make(box.tensor, sizes, box.ndim, box.batch() * rows, keeps);
  }

  // Of the shape of a tensor, kept where they are few.
  Result(py::handle tensor, const TensorView& shape) {
    make(tensor, shape.shape, shape.ndim, shape.numel(), true);
  }

 private:
  void make(py::handle like, const int64_t* sizes, int ndim, int64_t count, bool keeps) {
    const int64_t bytes = 2 * count * int64_t{sizeof(float)};
    if (keeps && count > 0 && bytes <= kMostKeptBytes) {
      keep(sizes, ndim, bytes);
      high = low + count;
      return;
    }
    if (!like) throw NotPlain();
    first = new_end(like, sizes, ndim);
    second = new_end(like, sizes, ndim);
    low = view(first, "lower").as<float>();
    high = view(second, "upper").as<float>();
  }

  void keep(const int64_t* sizes, int ndim, int64_t bytes) {
    first = py::reinterpret_steal<py::object>(
        PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
    second = py::reinterpret_steal<py::object>(PyTuple_New(ndim));
    if (!first || !second) throw py::error_already_set();
    for (int i = 0; i < ndim; ++i) {
      PyTuple_SET_ITEM(second.ptr(), i, py::int_(sizes[i]).release().ptr());
    }
    low = reinterpret_cast<float*>(PyByteArray_AS_STRING(first.ptr()));
  }
};

}  // namespace pyrobust
