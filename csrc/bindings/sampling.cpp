// Python entry points of the sampling kernels.
#include "sampling/sampling.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "core/normal.h"
#include "core/philox.h"

namespace pyrobust {
namespace {

FloatType float_type(const TensorView& tensor) {
  if (tensor.dtype == DType::kFloat32) return FloatType::kFloat32;
  if (tensor.dtype == DType::kFloat16) return FloatType::kFloat16;
  if (tensor.dtype == DType::kBFloat16) return FloatType::kBFloat16;
  throw py::type_error(std::string(tensor.name) +
                       " must have dtype float32, bfloat16 or float16; got " +
                       dtype_name(tensor.dtype) + ".");
}

void gaussian_samples(py::handle x, py::handle sigma, py::handle out, uint64_t seed,
                      int64_t first_sample, int64_t first_index, int num_threads) {
  const TensorView images = view(x, "x"), scale = view(sigma, "sigma"), result = view(out, "out");
  images.require_dtype(DType::kFloat32).require_ndim(2);
  scale.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, images.shape[0]);
  result.require_ndim(3).require_size(0, images.shape[0]).require_size(2, images.shape[1]);
  const sampling::GaussianCall call{images.as<float>(), scale.as<float>(), images.shape[0],
                                    result.shape[1],    images.shape[1],   seed,
                                    first_sample,       first_index,       result.data,
                                    float_type(result)};
  const py::gil_scoped_release release;
  sampling::gaussian_samples(call, num_threads);
}

int64_t find_votes(py::handle logits, py::handle votes, int num_threads) {
  const TensorView rows = view(logits, "logits"), found = view(votes, "votes");
  rows.require_ndim(2);
  found.require_dtype(DType::kInt64).require_ndim(1).require_size(0, rows.shape[0]);
  const sampling::VoteCall call{rows.data, float_type(rows), rows.shape[0], rows.shape[1],
                                found.as<int64_t>()};
  const py::gil_scoped_release release;
  return sampling::find_votes(call, num_threads);
}

// The two building blocks, for tests: words of one counter, and the variates of consecutive bits.
py::tuple philox_words(const std::array<uint32_t, 4>& counter, uint64_t key) {
  const PhiloxWords out = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key);
  return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

void normal_values(uint32_t first, py::handle out) {
  const TensorView result = view(out, "out").require_dtype(DType::kFloat32).require_ndim(1);
  for (int64_t i = 0; i < result.shape[0]; ++i) {
    result.as<float>()[i] = normal_from_bits(kNormalTable, first + static_cast<uint32_t>(i));
  }
}

float normal_value_refined(uint32_t bits, uint32_t extra) {
  return normal_refined(kNormalTable, bits, extra);
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.def("gaussian_samples", &gaussian_samples, py::arg("x"), py::arg("sigma"), py::arg("out"),
        py::arg("seed"), py::arg("first_sample"), py::arg("first_index"), py::arg("num_threads"));
  m.def("find_votes", &find_votes, py::arg("logits"), py::arg("votes"), py::arg("num_threads"));
  m.def("philox_words", &philox_words, py::arg("counter"), py::arg("key"));
  m.def("normal_values", &normal_values, py::arg("first"), py::arg("out"));
  m.def("normal_value_refined", &normal_value_refined, py::arg("bits"), py::arg("extra"));
}

}  // namespace pyrobust
