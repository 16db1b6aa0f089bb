#include "bindings/panel_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <new>
#include <unordered_map>

#include "bindings/families.h"
#include "matmul/weights.h"

namespace pyrobust {
namespace {

constexpr int64_t kLineBytes = 64, kSmallPage = 4096, kLargePage = int64_t{2} << 20;

// The product of the same weight that makes its panels, counted from 1; 0: none does, and none
// are kept.
int64_t making_product = 2;
// Weights with fewer elements get none, or fewer than a caller needs.
int64_t least_elements = kElementsOfProducts;
int64_t kept_bytes = 0;

// What the panels were made from.
struct Source {
  std::array<const void*, 3> data{};
  std::array<int64_t, 3> version{};
  std::array<int64_t, 7> form{};

  bool operator==(const Source& other) const {
    return data == other.data && version == other.version && form == other.form;
  }
};

struct Entry {
  Source source;
  int64_t products = 0;
  py::object reference;  // weak, to the codes
  std::shared_ptr<const PanelMemory> panels;
};

// By the codes' Python object. Never destroyed: the interpreter may be gone by then.
std::unordered_map<PyObject*, Entry>& entries() {
  static auto* const all = new std::unordered_map<PyObject*, Entry>();
  return *all;
}

// torch's count of changes in place; false for tensors that have none.
bool read_version(py::handle tensor, int64_t* version) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  *version = 0;
  if (tensor.is_none()) return true;
  PyObject* const answer = PyObject_GetAttr(tensor.ptr(), name);
  if (answer == nullptr) {
    PyErr_Clear();
    return false;
  }
  *version = PyLong_AsLongLong(answer);
  Py_DECREF(answer);
  return true;
}

// A weak reference to `codes` that takes its entry away.
py::object watch(py::handle codes) {
  PyObject* const key = codes.ptr();
  const py::cpp_function forget([key](py::handle) { entries().erase(key); });
  return py::weakref(codes, forget);
}

std::shared_ptr<const PanelMemory> make(const matmul::PackedMatrix& weight, int num_threads) {
  const int64_t bytes = matmul::panel_bytes(weight);
  if (bytes == 0) return nullptr;
  auto memory = std::make_shared<PanelMemory>(bytes);
  matmul::make_panels(weight, memory->data(), num_threads);
  return memory;
}

uint8_t* allocate(int64_t bytes) {
  return static_cast<uint8_t*>(
      std::aligned_alloc(static_cast<size_t>(kLineBytes), static_cast<size_t>(bytes)));
}

// Memory that begins with a large page, for munmap(); null where there is none.
uint8_t* map_memory(int64_t bytes) {
  const auto room = static_cast<size_t>(bytes + kLargePage);
  void* const all = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  auto* const first = static_cast<uint8_t*>(all);
  const int64_t before = -reinterpret_cast<intptr_t>(first) & (kLargePage - 1);
  uint8_t* const data = first + before;
  const int64_t kept = matmul::ceil_div(bytes, kSmallPage) * kSmallPage;
  if (before > 0) munmap(first, static_cast<size_t>(before));
  munmap(data + kept, room - static_cast<size_t>(before + kept));
#if defined(MADV_HUGEPAGE)
  madvise(data, static_cast<size_t>(kept), MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

// Large pages come with memory that nobody has touched, and malloc hands out memory of its heap, in
// small pages, as soon as something as large was freed: hence a mapping of its own.
PanelMemory::PanelMemory(int64_t bytes)
    : bytes_(matmul::ceil_div(bytes, kLineBytes) * kLineBytes), mapped_(bytes_ >= kLargePage) {
  data_ = mapped_ ? map_memory(bytes_) : allocate(bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
  kept_bytes += bytes_;
}

PanelMemory::~PanelMemory() {
  kept_bytes -= bytes_;
  if (mapped_) {
    munmap(data_, static_cast<size_t>(bytes_));
  } else {
    std::free(data_);
  }
}

std::shared_ptr<const PanelMemory> attach_panels(py::handle codes, py::handle scale,
                                                 py::handle zero, int num_threads,
                                                 matmul::PackedMatrix* weight,
                                                 int64_t most_needed) {
  const matmul::PackedMatrix& w = *weight;
  const int64_t least = std::min(least_elements, most_needed);
  if (making_product == 0 || w.rows * w.cols < least) return nullptr;
  Source source;
  source.data = {w.codes, w.scale, w.zero};
  source.form = {w.rows,
                 w.cols,
                 w.levels,
                 w.group_size,
                 w.group_dim,
                 static_cast<int64_t>(w.scale_type),
                 w.row_scale != nullptr};
  if (!read_version(codes, &source.version[0]) || !read_version(scale, &source.version[1]) ||
      !read_version(zero, &source.version[2])) {
    return nullptr;
  }
  Entry& entry = entries()[codes.ptr()];
  if (!(entry.source == source)) {
    entry.source = source;
    entry.products = 0;
    entry.panels = nullptr;
  }
  if (!entry.reference) entry.reference = watch(codes);
  if (++entry.products == making_product) entry.panels = make(w, num_threads);
  if (entry.panels != nullptr) weight->panels = entry.panels->data();
  return entry.panels;
}

void bind_panel_cache(py::module_& m) {
  m.def("panel_memory", [] { return kept_bytes; });
  m.def("set_panels", [](int64_t product, int64_t elements) {
    const auto before = py::make_tuple(making_product, least_elements);
    making_product = product;
    least_elements = elements;
    // Products that run keep theirs until they end.
    if (product == 0) entries().clear();
    return before;
  });
  const char* const choice = std::getenv("PYROBUST_PANELS");
  if (choice != nullptr && std::strcmp(choice, "0") == 0) making_product = 0;
}

}  // namespace pyrobust
