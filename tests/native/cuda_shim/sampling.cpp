// The sampling kernels and their launches, as the host compiler sees them; and their index
// arithmetic, for tests.
#include <pybind11/stl.h>

#include "sampling/cuda.cu"
#include "shim.h"

namespace pyrobust {
namespace {

using namespace sampling::gpu;

pybind11::tuple noise_place(int64_t images, int64_t samples, int64_t elements, int64_t threads,
                            int64_t index) {
  const NoiseItems items = noise_items(images, samples, elements, threads);
  const NoiseItem item = noise_item(items, index);
  return pybind11::make_tuple(count_of(items), item.image, item.first_sample, item.last_sample,
                              item.quad, block_of_quad(item.quad), element_of_quad(item.quad));
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
  m.def("row_place", &row_place);
  m.def("element_place", &element_place);
  m.def("vote_place", &vote_place);
}

}  // namespace pyrobust
