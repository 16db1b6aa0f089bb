// Reads a torch tensor without linking libtorch: through DLPack's C exchange table where torch has
// it (2.10 and newer), else through data_ptr(), shape and stride(). Every entry point asks the view
// for what it needs (dtype, layout, device), so that a fake or foreign tensor ends in a sentence.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace pyrobust {

namespace py = pybind11;

enum class DType : int {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
  kOther
};

const char* dtype_name(DType dtype);

struct TensorView {
  static constexpr int kMaxDims = 8;
  const char* name = "";
  void* data = nullptr;
  DType dtype = DType::kOther;
  bool on_cpu = false;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  int64_t numel() const;
  bool is_contiguous() const;
  std::string shape_text() const;

  // Each returns *this so that requirements chain; each throws TypeError or ValueError by name.
  const TensorView& require_dtype(DType expected) const;
  const TensorView& require_ndim(int expected) const;
  const TensorView& require_size(int axis, int64_t expected) const;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// A dense, contiguous CPU tensor; anything else throws. `tensor` must outlive the view.
TensorView view(py::handle tensor, const char* name);

// A dense CPU tensor as a matrix of that shape: any contiguous one with as many elements, or a
// matrix whose rows are contiguous and do not overlap; the row stride may be larger than a row.
TensorView view_matrix(py::handle tensor, const char* name, int64_t rows, int64_t cols);

// `view` for an optional argument: None gives a view with a null pointer and ndim 0.
TensorView view_optional(py::handle tensor, const char* name);

}  // namespace pyrobust
