// The index mathematics of matmul/cuda_layout.h as plain functions.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/tensor_view.h"
#include "matmul/cuda_layout.h"
#include "shim.h"

namespace pyrobust {
namespace {

namespace gpu = matmul::gpu;
using gpu::Format;

// (word, bit) of every code bit of a strip times a block, (rows, columns, bits): a flat list of
// word * 32 + bit, the word counted within the block.
std::vector<int64_t> all_places(int format_) {
  const auto format = static_cast<Format>(format_);
  std::vector<int64_t> places;
  for (int row = 0; row < gpu::kStrip; ++row) {
    for (int col = 0; col < gpu::kBlock; ++col) {
      const gpu::Owner at = gpu::owner_of(row, col);
      for (int i = 0; i < gpu::stored_bits(format); ++i) {
        const gpu::Place place = gpu::code_place(format, at.r, at.h, at.e, i);
        places.push_back(gpu::word_index(format, at.lane, at.step, place.word) * 32 + place.bit);
      }
    }
  }
  return places;
}

// (row, column) within a strip and block of pair (r, h), element e of a lane's step.
std::pair<int, int> pair_at(int lane, int step, int r, int h, int e) {
  return {gpu::pair_row(lane, r), step * gpu::kStepColumns + gpu::pair_column(lane, h) + e};
}

std::tuple<int, int, int, int, int> owner(int row, int col) {
  const gpu::Owner at = gpu::owner_of(row, col);
  return {at.lane, at.step, at.r, at.h, at.e};
}

void pack(int format_, py::handle codes_, int64_t cols, int levels, py::handle out_) {
  const TensorView codes = view(codes_, "codes"), out = view(out_, "out");
  const auto format = static_cast<Format>(format_);
  out.require_size(0, gpu::stored_words(format, codes.shape[0], cols));
  const gpu::Codes all = {codes.as<const uint8_t>(), codes.shape[0], cols, levels};
  for (int64_t i = 0; i < gpu::steps_of(codes.shape[0], cols); ++i) {
    gpu::pack_indexed_step(format, all, i, out.as<uint32_t>());
  }
}

void read(int format, py::handle stored_, py::handle codes_) {
  const TensorView stored = view(stored_, "stored"), codes = view(codes_, "codes");
  const int64_t rows = codes.shape[0], cols = codes.shape[1];
  for (int64_t i = 0; i < rows * cols; ++i) {
    codes.as<uint8_t>()[i] = static_cast<uint8_t>(gpu::read_code(
        static_cast<Format>(format), stored.as<uint32_t>(), cols, i / cols, i % cols));
  }
}

// Blocks of columns of every run of a tile, and the sizes of the schedule.
py::dict described(const gpu::Schedule& s, int teams) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (int64_t run = 0; run < int64_t{s.parts} * teams; ++run) {
    runs.emplace_back(gpu::first_of_run(s, run), gpu::last_of_run(s, run));
  }
  py::dict result;
  result["runs"] = runs;
  result["tiles"] = s.tiles;
  result["blocks"] = s.blocks;
  result["parts"] = s.parts;
  result["per"] = s.per;
  result["fills"] = s.fills;
  return result;
}

py::dict schedule(int count, int64_t rows, int64_t cols, int multiprocessors) {
  return described(gpu::make_schedule(count, rows, cols, multiprocessors), gpu::teams_of(count));
}

// Of the kernels that are not cuda_linear.cuh: "few", "wide" or "broad".
py::dict schedule_of(const std::string& kernel, int64_t count, int64_t rows, int64_t cols,
                     int multiprocessors) {
  if (kernel == "few") {
    return described(gpu::make_few_schedule(rows, cols, multiprocessors), gpu::kFewTeams);
  }
  if (kernel == "wide") {
    return described(gpu::make_wide_schedule(rows, cols, multiprocessors), gpu::kWideTeams);
  }
  return described(gpu::make_broad_schedule(count, rows, cols, multiprocessors), 1);
}

}  // namespace

void bind_matmul_layout(py::module_& m) {
  m.def("layout_places", &all_places);
  m.def("layout_pair", &pair_at);
  m.def("layout_owner", &owner);
  m.def("layout_pack", &pack);
  m.def("layout_read", &read);
  m.def("layout_bits", [](int format) { return gpu::stored_bits(static_cast<Format>(format)); });
  m.def("layout_format", [](int levels, bool codebook) {
    return static_cast<int>(gpu::format_of(levels, codebook));
  });
  m.def("layout_stored_words", [](int format, int64_t rows, int64_t cols) {
    return gpu::stored_words(static_cast<Format>(format), rows, cols);
  });
  m.def("layout_scale_place", &gpu::scale_place);
  m.def("layout_activation_offset", &gpu::activation_offset);
  m.def("layout_schedule", &schedule);
  m.def("layout_schedule_of", &schedule_of);
}

}  // namespace pyrobust
