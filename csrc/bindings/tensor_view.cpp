#include "bindings/tensor_view.h"

#include "bindings/dlpack.h"

namespace pyrobust {
namespace {

struct ExchangeTable {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_work_stream;
};
static_assert(sizeof(ExchangeTable) == 56, "DLPack ABI");

DType from_dlpack(DLDataType type) {
  if (type.lanes != 1) return DType::kOther;
  switch (type.code * 256 + type.bits) {
    case kCodeFloat * 256 + 32:
      return DType::kFloat32;
    case kCodeFloat * 256 + 64:
      return DType::kFloat64;
    case kCodeFloat * 256 + 16:
      return DType::kFloat16;
    case kCodeBFloat * 256 + 16:
      return DType::kBFloat16;
    case kCodeUInt * 256 + 8:
      return DType::kUInt8;
    case kCodeInt * 256 + 8:
      return DType::kInt8;
    case kCodeInt * 256 + 16:
      return DType::kInt16;
    case kCodeInt * 256 + 32:
      return DType::kInt32;
    case kCodeInt * 256 + 64:
      return DType::kInt64;
    case kCodeBool * 256 + 8:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16", "uint8", "int8",
                                       "int16",   "int32",   "int64",   "bool",     "other"};

DType from_torch_name(const std::string& text) {  // "torch.float32"
  for (int i = 0; i < static_cast<int>(DType::kOther); ++i) {
    if (text == std::string("torch.") + kDTypeNames[i]) return static_cast<DType>(i);
  }
  return DType::kOther;
}

const ExchangeTable* table_of_type(py::handle tensor) {
  py::object capsule =
      py::getattr(py::type::handle_of(tensor), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none() || !PyCapsule_CheckExact(capsule.ptr())) return nullptr;
  const auto* table = static_cast<const ExchangeTable*>(
      PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
  if (table == nullptr) PyErr_Clear();
  return table != nullptr && table->major == 1 ? table : nullptr;
}

// A subclass could carry another table, so the protocol asks for a lookup by type. The answers for
// the first types seen, torch.Tensor and Parameter as a rule, are kept: a lookup costs 0.1 us. Kept
// types hold a reference, as the address of a type that is gone may be that of another one.
const ExchangeTable* exchange_table(py::handle tensor) {
  static struct {
    PyTypeObject* type;
    const ExchangeTable* table;
  } kept[2] = {};
  PyTypeObject* const type = Py_TYPE(tensor.ptr());
  for (const auto& entry : kept) {
    if (entry.type == type) return entry.table;
  }
  const ExchangeTable* table = table_of_type(tensor);
  for (auto& entry : kept) {
    if (entry.type != nullptr) continue;
    Py_INCREF(type);
    entry = {type, table};
    break;
  }
  return table;
}

void check_dims(int64_t ndim, const char* name) {
  if (ndim > TensorView::kMaxDims) {
    throw py::value_error(std::string(name) + " has " + std::to_string(ndim) +
                          " dimensions; at most 8 are accepted.");
  }
}

void read_by_table(const ExchangeTable& table, py::handle tensor, TensorView& out) {
  DLTensor raw{};
  if (table.tensor_from_object(tensor.ptr(), &raw) != 0) throw py::error_already_set();
  check_dims(raw.ndim, out.name);
  out.data = static_cast<char*>(raw.data) + raw.byte_offset;
  if (raw.data == nullptr) out.data = nullptr;
  out.dtype = from_dlpack(raw.dtype);
  out.on_cpu = raw.device.type == kDeviceCpu;
  out.ndim = raw.ndim;
  int64_t dense = 1;
  for (int i = raw.ndim - 1; i >= 0; --i) {
    out.shape[i] = raw.shape[i];
    out.stride[i] = raw.strides != nullptr ? raw.strides[i] : dense;
    dense *= raw.shape[i];
  }
}

void read_by_attributes(py::handle tensor, TensorView& out) {
  if (!py::hasattr(tensor, "data_ptr") || !py::hasattr(tensor, "stride")) {
    throw py::type_error(std::string(out.name) + " must be a torch.Tensor; got " +
                         std::string(py::str(py::type::handle_of(tensor).attr("__name__"))) + ".");
  }
  const py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  check_dims(static_cast<int64_t>(shape.size()), out.name);
  out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  out.dtype = from_torch_name(py::str(tensor.attr("dtype")));
  out.on_cpu = std::string(py::str(tensor.attr("device").attr("type"))) == "cpu";
  out.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < out.ndim; ++i) {
    out.shape[i] = shape[i].cast<int64_t>();
    out.stride[i] = stride[i].cast<int64_t>();
  }
}

// A tensor of any layout that has its elements on the CPU.
TensorView view_stored(py::handle tensor, const char* name) {
  TensorView out;
  out.name = name;
  const ExchangeTable* table = exchange_table(tensor);
  if (table != nullptr) {
    read_by_table(*table, tensor, out);
  } else {
    read_by_attributes(tensor, out);
  }
  if (!out.on_cpu) throw py::value_error(std::string(name) + " must be on the CPU.");
  if (out.data == nullptr && out.numel() > 0) {
    throw py::value_error(std::string(name) + " has no storage (a fake or meta tensor?).");
  }
  return out;
}

}  // namespace

const char* dtype_name(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

int64_t TensorView::numel() const {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count *= shape[i];
  return count;
}

bool TensorView::is_contiguous() const {
  if (numel() == 0) return true;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && stride[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string TensorView::shape_text() const {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

const TensorView& TensorView::require_dtype(DType expected) const {
  if (dtype != expected) {
    throw py::type_error(std::string(name) + " must have dtype " + dtype_name(expected) + "; got " +
                         dtype_name(dtype) + ".");
  }
  return *this;
}

const TensorView& TensorView::require_ndim(int expected) const {
  if (ndim != expected) {
    throw py::value_error(std::string(name) + " must have " + std::to_string(expected) +
                          " dimensions; got shape " + shape_text() + ".");
  }
  return *this;
}

const TensorView& TensorView::require_size(int axis, int64_t expected) const {
  if (axis >= ndim || shape[axis] != expected) {
    throw py::value_error(std::string(name) + " must have size " + std::to_string(expected) +
                          " on axis " + std::to_string(axis) + "; got shape " + shape_text() + ".");
  }
  return *this;
}

TensorView view(py::handle tensor, const char* name) {
  const TensorView out = view_stored(tensor, name);
  if (!out.is_contiguous()) throw py::value_error(std::string(name) + " must be contiguous.");
  return out;
}

TensorView view_matrix(py::handle tensor, const char* name, int64_t rows, int64_t cols) {
  TensorView out = view_stored(tensor, name);
  if (!out.is_contiguous()) {
    out.require_ndim(2).require_size(0, rows).require_size(1, cols);
    const bool dense = cols == 1 || out.stride[1] == 1, apart = rows == 1 || out.stride[0] >= cols;
    if (dense && apart) return out;
    throw py::value_error(std::string(name) + " must have contiguous rows that do not overlap.");
  }
  if (out.numel() != rows * cols) {
    throw py::value_error(std::string(name) + " must hold " + std::to_string(rows * cols) +
                          " elements; got shape " + out.shape_text() + ".");
  }
  out.ndim = 2;
  out.shape[0] = rows;
  out.shape[1] = out.stride[0] = cols;
  out.stride[1] = 1;
  return out;
}

TensorView view_optional(py::handle tensor, const char* name) {
  if (tensor.is_none()) {
    TensorView out;
    out.name = name;
    return out;
  }
  return view(tensor, name);
}

}  // namespace pyrobust
