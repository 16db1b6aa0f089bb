// Python entry points of the sampling kernels.
#include "sampling/sampling.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings/families.h"
#include "bindings/tensor_view.h"
#include "core/choice.h"
#include "core/grid_normal.h"
#include "core/keep.h"
#include "core/laplace.h"
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

sampling::Positions positions(const TensorView& x, const TensorView& out, int64_t elements,
                              uint64_t seed, int64_t first_sample, int64_t first_index) {
  return {x.shape[0], out.shape[1], elements, seed, first_sample, first_index};
}

// `out` is (images, samples, ...) beside `x`, (images, ...).
void require_samples_of(const TensorView& out, const TensorView& x) {
  out.require_ndim(x.ndim + 1).require_size(0, x.shape[0]);
  for (int axis = 1; axis < x.ndim; ++axis) out.require_size(axis + 1, x.shape[axis]);
}

void noise_samples(sampling::Noise noise, py::handle x, py::handle scale, py::handle out,
                   uint64_t seed, int64_t first_sample, int64_t first_index, int num_threads) {
  const TensorView images = view(x, "x"), scales = view(scale, "scale"), result = view(out, "out");
  images.require_dtype(DType::kFloat32).require_ndim(2);
  scales.require_dtype(DType::kFloat32).require_ndim(1).require_size(0, images.shape[0]);
  require_samples_of(result, images);
  const sampling::NoiseCall call{
      noise,
      positions(images, result, images.shape[1], seed, first_sample, first_index),
      images.as<float>(),
      scales.as<float>(),
      result.data,
      float_type(result)};
  const py::gil_scoped_release release;
  sampling::noise_samples(call, num_threads);
}

template <sampling::Noise kNoise>
void noise_of(py::handle x, py::handle scale, py::handle out, uint64_t seed, int64_t first_sample,
              int64_t first_index, int num_threads) {
  noise_samples(kNoise, x, scale, out, seed, first_sample, first_index, num_threads);
}

void split_gaussian_samples(py::handle x, py::handle mask, float sigma_left, float sigma_right,
                            py::handle left, py::handle right, uint64_t seed, int64_t first_sample,
                            int64_t first_index, int num_threads) {
  const TensorView images = view(x, "x"), where = view(mask, "mask");
  const TensorView first = view(left, "left"), second = view(right, "right");
  images.require_dtype(DType::kFloat32).require_ndim(2);
  where.require_dtype(DType::kBool).require_ndim(1).require_size(0, images.shape[1]);
  for (const TensorView* half : {&first, &second}) {
    half->require_dtype(DType::kFloat32);
    require_samples_of(*half, images);
  }
  second.require_size(1, first.shape[1]);
  const sampling::SplitCall call{
      positions(images, first, images.shape[1], seed, first_sample, first_index),
      images.as<float>(),
      where.as<uint8_t>(),
      sigma_left,
      sigma_right,
      first.as<float>(),
      second.as<float>()};
  const py::gil_scoped_release release;
  sampling::split_samples(call, num_threads);
}

void masked_samples(py::handle x, uint64_t keep, float fill, py::handle out, uint64_t seed,
                    int64_t first_sample, int64_t first_index, int num_threads) {
  const TensorView images = view(x, "x"), result = view(out, "out");
  images.require_dtype(DType::kFloat32).require_ndim(3);
  require_samples_of(result, images);
  const sampling::KeepCall call{
      positions(images, result, images.shape[2], seed, first_sample, first_index),
      images.shape[1],
      images.as<float>(),
      keep,
      fill,
      result.data,
      float_type(result)};
  const py::gil_scoped_release release;
  sampling::keep_samples(call, num_threads);
}

// (4, K) words of 32 bits, held as int32.
GridTable grid_table(const TensorView& thresholds) {
  thresholds.require_dtype(DType::kInt32).require_ndim(2).require_size(0, kGridWords);
  GridTable table{};
  table.count = static_cast<int32_t>(std::min<int64_t>(thresholds.shape[1], INT32_MAX));
  for (int word = 0; word < kGridWords; ++word) {
    table.word[word] = thresholds.as<uint32_t>() + word * thresholds.shape[1];
  }
  return table;
}

void grid_samples(py::handle x, py::handle thresholds, double scale, float levels, py::handle out,
                  uint64_t seed, int64_t first_sample, int64_t first_index, int num_threads) {
  const TensorView images = view(x, "x"), result = view(out, "out");
  const GridTable table = grid_table(view(thresholds, "thresholds"));
  images.require_dtype(DType::kUInt8).require_ndim(2);
  require_samples_of(result, images);
  const bool integers = result.dtype == DType::kInt16;
  const sampling::GridCall call{
      positions(images, result, images.shape[1], seed, first_sample, first_index),
      images.as<uint8_t>(),
      table,
      scale,
      levels,
      result.data,
      integers,
      integers ? FloatType::kFloat32 : float_type(result)};
  const py::gil_scoped_release release;
  sampling::grid_samples(call, num_threads);
}

void substituted_tokens(py::handle tokens, py::handle offsets, py::handle candidates,
                        py::handle out, uint64_t seed, int64_t first_sample, int64_t first_index,
                        int num_threads) {
  const TensorView texts = view(tokens, "tokens"), starts = view(offsets, "offsets");
  const TensorView lists = view(candidates, "candidates"), result = view(out, "out");
  texts.require_dtype(DType::kInt64).require_ndim(2);
  starts.require_dtype(DType::kInt64).require_ndim(1);
  if (starts.shape[0] < 1) throw py::value_error("offsets must have at least one entry.");
  lists.require_dtype(DType::kInt64).require_ndim(1);
  lists.require_size(0, starts.as<int64_t>()[starts.shape[0] - 1]);
  result.require_dtype(DType::kInt64);
  require_samples_of(result, texts);
  const sampling::ChoiceCall call{
      positions(texts, result, texts.shape[1], seed, first_sample, first_index),
      texts.as<int64_t>(),
      starts.as<int64_t>(),
      lists.as<int64_t>(),
      starts.shape[0] - 1,
      result.as<int64_t>()};
  const py::gil_scoped_release release;
  sampling::choice_samples(call, num_threads);
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

// The building blocks, for tests: words of one counter, variates of consecutive bits, decisions.
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

void laplace_values(uint32_t first, py::handle out) {
  const TensorView result = view(out, "out").require_dtype(DType::kFloat32).require_ndim(1);
  for (int64_t i = 0; i < result.shape[0]; ++i) {
    result.as<float>()[i] = laplace_from_bits(kLaplaceTable, first + static_cast<uint32_t>(i));
  }
}

float laplace_value_refined(uint32_t bits, uint32_t extra) {
  return laplace_refined(kLaplaceTable, bits, extra);
}

void fused_values(py::handle a, py::handle b, py::handle c, py::handle out) {
  const TensorView x = view(a, "a"), y = view(b, "b"), z = view(c, "c"), to = view(out, "out");
  for (const TensorView* operand : {&x, &y, &z, &to}) {
    operand->require_dtype(DType::kFloat32).require_ndim(1).require_size(0, to.shape[0]);
  }
  for (int64_t i = 0; i < to.shape[0]; ++i) {
    to.as<float>()[i] = fused_emulated(x.as<float>()[i], y.as<float>()[i], z.as<float>()[i]);
  }
}

// |k| from all four words, searched from `guess` and from as few words as decide it; and how many
// that were.
py::tuple grid_value(const std::array<uint32_t, kGridWords>& u, py::handle thresholds,
                     int32_t guess) {
  const GridTable table = grid_table(view(thresholds, "thresholds"));
  for (int words = 1; words <= kGridWords; ++words) {
    const int32_t k = grid_magnitude(table, u.data(), words, guess);
    if (k >= 0) return py::make_tuple(k, words);
  }
  return py::make_tuple(-1, kGridWords);
}

py::tuple choice_value(uint32_t count, uint32_t bits, uint32_t extra) {
  if (choice_needs_more(count, bits)) return py::make_tuple(choice_refined(count, bits, extra), 2);
  return py::make_tuple(choice_from_bits(count, bits), 1);
}

py::tuple keep_value(uint64_t threshold, uint32_t bits, uint32_t extra) {
  if (keep_needs_more(threshold, bits)) {
    return py::make_tuple(keep_refined(threshold, bits, extra), 2);
  }
  return py::make_tuple(keep_from_bits(threshold, bits), 1);
}

}  // namespace

void bind_sampling(py::module_& m) {
  const auto noise = [&m](const char* name, auto* function) {
    m.def(name, function, py::arg("x"), py::arg("scale"), py::arg("out"), py::arg("seed"),
          py::arg("first_sample"), py::arg("first_index"), py::arg("num_threads"));
  };
  noise("gaussian_samples", &noise_of<sampling::Noise::kGaussian>);
  noise("uniform_samples", &noise_of<sampling::Noise::kUniform>);
  noise("laplace_samples", &noise_of<sampling::Noise::kLaplace>);
  m.def("split_gaussian_samples", &split_gaussian_samples, py::arg("x"), py::arg("mask"),
        py::arg("sigma_left"), py::arg("sigma_right"), py::arg("left"), py::arg("right"),
        py::arg("seed"), py::arg("first_sample"), py::arg("first_index"), py::arg("num_threads"));
  m.def("masked_samples", &masked_samples, py::arg("x"), py::arg("keep"), py::arg("fill"),
        py::arg("out"), py::arg("seed"), py::arg("first_sample"), py::arg("first_index"),
        py::arg("num_threads"));
  m.def("grid_samples", &grid_samples, py::arg("x"), py::arg("thresholds"), py::arg("scale"),
        py::arg("levels"), py::arg("out"), py::arg("seed"), py::arg("first_sample"),
        py::arg("first_index"), py::arg("num_threads"));
  m.def("substituted_tokens", &substituted_tokens, py::arg("tokens"), py::arg("offsets"),
        py::arg("candidates"), py::arg("out"), py::arg("seed"), py::arg("first_sample"),
        py::arg("first_index"), py::arg("num_threads"));
  m.def("find_votes", &find_votes, py::arg("logits"), py::arg("votes"), py::arg("num_threads"));
  m.def("philox_words", &philox_words, py::arg("counter"), py::arg("key"));
  m.def("normal_values", &normal_values, py::arg("first"), py::arg("out"));
  m.def("normal_value_refined", &normal_value_refined, py::arg("bits"), py::arg("extra"));
  m.def("laplace_values", &laplace_values, py::arg("first"), py::arg("out"));
  m.def("laplace_value_refined", &laplace_value_refined, py::arg("bits"), py::arg("extra"));
  m.def("fused_values", &fused_values, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("out"));
  m.def("grid_value", &grid_value, py::arg("u"), py::arg("thresholds"), py::arg("guess"));
  m.def("choice_value", &choice_value, py::arg("count"), py::arg("bits"), py::arg("extra"));
  m.def("keep_value", &keep_value, py::arg("threshold"), py::arg("bits"), py::arg("extra"));
}

}  // namespace pyrobust
