// Python entry points of the machine's limits.
#include "runtime/limits.h"

#include "bindings/families.h"
#include "bindings/tensor_view.h"

namespace pyrobust {

void bind_limits(py::module_& m) {
  m.def("read_words", [](py::handle data_, int num_threads) {
    const TensorView data = view(data_, "data");
    data.require_dtype(DType::kInt64).require_ndim(1);
    const py::gil_scoped_release release;
    return read_words(data.data, 8 * data.numel(), num_threads);
  });
  m.def("multiply_bytes", [](int64_t rounds) {
    const py::gil_scoped_release release;
    return multiply_bytes(rounds);
  });
  m.def("look_words_up", [](int64_t rounds) {
    const py::gil_scoped_release release;
    return look_words_up(rounds);
  });
}

}  // namespace pyrobust
