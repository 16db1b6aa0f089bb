#include "bindings/kept_ends.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "bindings/dlpack.h"
#include "bindings/families.h"
#include "bindings/plain_arguments.h"
#include "bindings/tensor_view.h"
#include "runtime/kept_memory.h"

namespace pyrobust {
namespace {

// Of smaller ends malloc has pages at hand, as a rule.
constexpr int64_t kLeastKeptEnd = int64_t{128} << 10;

// A tensor of floats that owns its memory, in the form that DLPack hands on.
struct KeptTensor {
  DLManagedTensor managed{};
  KeptBlock block;
  int64_t shape[TensorView::kMaxDims];

  KeptTensor(const int64_t* sizes, int ndim, int64_t bytes)
      : block(take_block(bytes, Use::kResult)) {
    std::copy_n(sizes, ndim, shape);
    managed.tensor = {block.memory, {kDeviceCpu, 0}, ndim, {kCodeFloat, 32, 1}, shape, nullptr, 0};
    managed.context = this;
    managed.deleter = &destroy;
  }
  ~KeptTensor() { give_back(block); }
  KeptTensor(const KeptTensor&) = delete;
  KeptTensor& operator=(const KeptTensor&) = delete;

  // Called by any thread, without the GIL, perhaps after the interpreter has ended.
  static void destroy(DLManagedTensor* managed) {
    delete static_cast<KeptTensor*>(managed->context);
  }
};

constexpr const char* kCapsule = "dltensor";  // renamed by whoever takes the tensor

void destroy_untaken(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kCapsule)) return;
  auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule));
  managed->deleter(managed);
}

py::object kept_tensor(const int64_t* sizes, int ndim, int64_t bytes) {
  static PyObject* const from_dlpack = attribute_of_module("torch.utils.dlpack", "from_dlpack");
  auto kept = std::make_unique<KeptTensor>(sizes, ndim, bytes);
  const auto capsule =
      py::reinterpret_steal<py::object>(PyCapsule_New(&kept->managed, kCapsule, &destroy_untaken));
  if (!capsule) throw py::error_already_set();
  kept.release();  // the capsule's
  PyObject* const tensor = PyObject_CallOneArg(from_dlpack, capsule.ptr());
  if (tensor == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

bool is_plain_float(py::handle like) {
  if (!is_tensor(like)) return false;
  try {
    return view(like, "like").dtype == DType::kFloat32;
  } catch (const std::exception&) {  // on another device, without storage, not dense
    return false;
  }
}

}  // namespace

py::object new_end(py::handle like, const int64_t* sizes, int ndim) {
  int64_t bytes = int64_t{sizeof(float)};
  for (int i = 0; i < ndim; ++i) bytes *= sizes[i];
  const bool large = bytes >= kLeastKeptEnd && bytes <= lent_limit();
  if (!large || !is_plain_float(like)) return new_output(like, sizes, ndim);
  return kept_tensor(sizes, ndim, bytes);
}

namespace {

py::object new_end_of(py::handle like, const py::tuple& shape) {
  if (shape.size() > TensorView::kMaxDims) return like.attr("new_empty")(shape);
  int64_t sizes[TensorView::kMaxDims];
  const auto ndim = static_cast<int>(shape.size());
  for (int i = 0; i < ndim; ++i) sizes[i] = shape[i].cast<int64_t>();
  return new_end(like, sizes, ndim);
}

}  // namespace

void bind_kept_ends(py::module_& m) {
  m.def("new_end", &new_end_of);
  m.def("lent_limit", &lent_limit);
  m.def("lent_bytes", &lent_bytes);
  m.def("set_lent_limit", &set_lent_limit);
  const char* const choice = std::getenv("PYROBUST_KEPT_MEMORY");
  if (choice != nullptr && std::strcmp(choice, "0") == 0) set_lent_limit(0);
}

}  // namespace pyrobust
