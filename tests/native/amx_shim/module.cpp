// The test module pyrobust._amx_shim: packed products and interval bounds as on a processor with
// AMX, whose tiles are emulated.
#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "runtime/cpu_features.h"
#include "tiles.h"

namespace pyrobust {

Isa current_isa() { return Isa::kAmx; }
bool has_bfloat16_products() { return false; }
bool has_bfloat16_tiles() { return true; }
bool looks_words_up() { return false; }

namespace {

py::dict counters(const TileCounters& seen) {
  py::dict result;
  result["configurations"] = seen.configurations;
  result["releases"] = seen.releases;
  result["loads"] = seen.loads;
  result["stores"] = seen.stores;
  result["products"] = seen.products;
  return result;
}

void product(py::handle left_, py::handle right_, py::handle sums_) {
  const TensorView left = view(left_, "left"), right = view(right_, "right");
  const TensorView sums = view(sums_, "sums");
  left.require_dtype(DType::kInt8).require_ndim(2).require_size(0, 16).require_size(1, 64);
  right.require_dtype(DType::kUInt8).require_ndim(3).require_size(0, 16).require_size(1, 16);
  right.require_size(2, 4);
  sums.require_dtype(DType::kInt32).require_ndim(2).require_size(0, 16).require_size(1, 16);
  tile_product(left.as<const int8_t>(), right.as<const uint8_t>(), sums.as<int32_t>());
}

void products_of_bfloat16(py::handle left_, py::handle right_, py::handle sums_) {
  const TensorView left = view(left_, "left"), right = view(right_, "right");
  const TensorView sums = view(sums_, "sums");
  left.require_dtype(DType::kInt16).require_ndim(2).require_size(0, 16).require_size(1, 32);
  right.require_dtype(DType::kInt16).require_ndim(3).require_size(0, 16).require_size(1, 16);
  right.require_size(2, 2);
  sums.require_dtype(DType::kFloat32).require_ndim(2).require_size(0, 16).require_size(1, 16);
  bfloat16_product(left.as<const uint16_t>(), right.as<const uint16_t>(), sums.as<float>());
}

}  // namespace
}  // namespace pyrobust

PYBIND11_MODULE(_amx_shim, m) {
  m.doc() = "Packed products and interval bounds of pyrobust on emulated AMX tiles, for tests.";
  m.def("isa", [] { return "amx"; });
  m.def("take_counters", [] { return pyrobust::counters(pyrobust::take_tile_counters()); });
  m.def("take_interval_counters",
        [] { return pyrobust::counters(pyrobust::take_interval_counters()); });
  m.def("cut_bfloat16_sums", &pyrobust::cut_bfloat16_sums);
  m.def("bfloat16_product", &pyrobust::products_of_bfloat16);
  m.def("tile_product", &pyrobust::product);
  m.def("tile_fault", &pyrobust::tile_fault);
  pyrobust::bind_matmul(m);
  pyrobust::bind_eager_linear(m);
  pyrobust::bind_interval(m);
}
