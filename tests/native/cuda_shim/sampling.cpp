// The sampling kernels and their launches, as the host compiler sees them; and their index
// arithmetic, for tests.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "runtime/check.h"
#include "sampling/cuda.cu"
#include "shim.h"

namespace pyrobust {
namespace {

using namespace sampling::gpu;
using sampling::Noise;

// (count, image, first sample, samples, samples between two, quad, block, element)
pybind11::tuple noise_place(int64_t images, int64_t samples, int64_t elements, int64_t threads,
                            int64_t index) {
  const NoiseItems items = noise_items(images, samples, elements, threads);
  const NoiseItem item = noise_item(items, index);
  return pybind11::make_tuple(count_of(items), item.image, item.first_sample,
                              samples_of(items, item.first_sample), items.runs, item.quad,
                              block_of_quad(item.quad), element_of_quad(item.quad));
}

pybind11::tuple philox_both_ways(uint32_t block, uint32_t sample, uint32_t image, uint32_t last,
                                 uint64_t seed) {
  const PhiloxKeys keys = philox_keys(seed);
  const PhiloxWords whole = philox4x32({{block, sample, image, last}}, seed);
  const PhiloxWords parts =
      philox4x32(philox_block(block, image, last, keys), philox_sample(sample, image, keys), keys);
  const auto list = [](const PhiloxWords& words) {
    return pybind11::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
  };
  return pybind11::make_tuple(list(whole), list(parts));
}

// A warp's worth of blocks: the kernels' transforms of `bits` and whether one was redrawn.
struct VariateWork {
  const uint32_t* bits;
  int64_t count;
  float* normal;
  float* laplace;
  bool* redrawn;
};

PYROBUST_KERNEL(64) variate_kernel(VariateWork work) {
  const Tables tables = {kNormalTable, kLaplaceTable};
  const cuda::SharedPlace rows = fill_normal(tables.normal, cuda::shared_memory());
  for (int64_t i = threadIdx.x; i < work.count; i += 64) {
    Variator<Noise::kGaussian> normal = {rows, tables, bits_of_float(1.0f), 0};
    Variator<Noise::kLaplace> laplace = {rows, tables, bits_of_float(1.0f), 0};
    normal.begin();
    laplace.begin();
    const uint32_t bits[1] = {work.bits[i]};
    float value[1];
    normal.draw(bits, value);
    work.normal[i] = value[0] * kLiftDown;
    laplace.draw(bits, value);
    work.laplace[i] = value[0];
    work.redrawn[i] = normal.pending(normal.note(0), 1) != 0;
    if (work.redrawn[i] != (laplace.pending(laplace.note(0), 1) != 0)) {
      fail("two answers whether to redraw");
    }
  }
}

// Float bits of the normal and the Laplace variate, redrawn, and the first two by core/.
using Words = pybind11::array_t<uint32_t>;
pybind11::tuple variates_both_ways(const Words& bits) {
  const int64_t count = bits.size();
  Words results[4] = {Words(count), Words(count), Words(count), Words(count)};
  pybind11::array_t<bool> redrawn(count);
  float* out[4];
  for (int i = 0; i < 4; ++i) out[i] = reinterpret_cast<float*>(results[i].mutable_data());
  const VariateWork work = {bits.data(), count, out[0], out[1], redrawn.mutable_data()};
  cuda::launch(variate_kernel, {1, 1, 64, kNormalShared}, {}, work);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = bits.data()[i];
    const bool plain = !normal_needs_refinement(word);
    out[2][i] = plain ? normal_from_bits(kNormalTable, word) : 0.0f;
    out[3][i] = plain ? laplace_from_bits(kLaplaceTable, word) : 0.0f;
  }
  return pybind11::make_tuple(results[0], results[1], redrawn, results[2], results[3]);
}

pybind11::tuple row_place(int64_t index, int64_t samples, int64_t channels, int64_t blocks,
                          int word) {
  const RowItem item = row_item(index, samples, channels, blocks);
  return pybind11::make_tuple(item.image, item.sample, item.channel, item.block, item.row,
                              element_of_block(item.block, word));
}

pybind11::tuple element_place(int64_t element) {
  const sampling::Place place = sampling::place_of(element);
  return pybind11::make_tuple(place.block, place.word);
}

pybind11::tuple vote_place(int64_t rows, int64_t samples, int64_t least, int64_t wanted,
                           int64_t index) {
  const VoteStretches work = vote_stretches(rows, samples, least, wanted);
  const VoteStretch stretch = vote_stretch(work, index);
  return pybind11::make_tuple(work.histograms * work.stretches, stretch.histogram, stretch.begin,
                              stretch.end);
}

}  // namespace

void bind_sampling_places(pybind11::module_& m) {
  m.def("noise_place", &noise_place);
  m.def("samples_together", &samples_together);
  m.def("philox_both_ways", &philox_both_ways);
  m.def("variates_both_ways", &variates_both_ways);
  m.def("row_place", &row_place);
  m.def("element_place", &element_place);
  m.def("vote_place", &vote_place);
}

}  // namespace pyrobust
