// The test module pyrobust._amx_shim: the packed product as on a processor with AMX, whose tiles
// are emulated.
#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "runtime/cpu_features.h"
#include "tiles.h"

namespace pyrobust {

Isa current_isa() { return Isa::kAmx; }
bool has_bfloat16_products() { return false; }

namespace {

py::dict counters() {
  const TileCounters seen = take_tile_counters();
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

}  // namespace
}  // namespace pyrobust

PYBIND11_MODULE(_amx_shim, m) {
  m.doc() = "Packed products of pyrobust on emulated AMX tiles, for tests.";
  m.def("take_counters", &pyrobust::counters);
  m.def("tile_product", &pyrobust::product);
  m.def("tile_fault", &pyrobust::tile_fault);
  pyrobust::bind_matmul(m);
  pyrobust::bind_eager_linear(m);
}
