// Where the arrays of one input as integers lie in a thread's memory.
#pragma once

#include <cstdint>

#include "interval/integers.h"
#include "interval/plan.h"

namespace pyrobust {
namespace interval {

// From where kernels read the codes of a weight.
enum class CodeSource {
  kRows,    // the canonical layout
  kMade,    // panels made of kIntegerRows rows at a time, which stay in a first-level cache
  kPanels,  // panels that were made before
};

// Lays arrays out one after another, each from a cache line on.
class Places {
 public:
  explicit Places(char* base) : base_(base) {}

  template <typename T>
  void place(T** array, int64_t count) {
    *array = reinterpret_cast<T*>(base_ + size_);
    size_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
  }

  int64_t bytes() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

// What a thread needs for a layer: an input as integers, and room for the kernels.
struct IntegerMemory {
  IntegerInput input{};
  float* scratch;   // of a group
  double* sums;     // twice kIntegerRows
  uint8_t* codes;   // row_scratch() bytes for rows
  uint8_t* panels;  // those of kIntegerRows rows where they are made
  int64_t bytes;

  // `panel_bytes` are those of kIntegerRows rows. A null base serves to count bytes.
  IntegerMemory(const matmul::PackedMatrix& w, CodeSource source, int64_t panel_bytes, char* base) {
    input.columns = w.cols;
    input.group = columns_of_group(w);
    input.stride = blocks(input.group, kIntegerBlock) * kIntegerBlock;
    input.groups = blocks(w.cols, input.group);
    const int64_t all = input.groups * input.stride;
    const bool ordered = source != CodeSource::kRows;
    Places places(base);
    places.place(&input.centre, all);
    places.place(&input.radius, all);
    places.place(&scratch, input.stride);
    places.place(&input.step, input.groups);
    places.place(&input.radius_step, input.groups);
    places.place(&input.shift, input.groups);
    places.place(&input.spread, input.groups);
    places.place(&input.largest, input.groups);
    places.place(&input.total, input.groups);
    places.place(&input.quads, ordered ? 4 * all : 0);
    places.place(&input.ones, ordered ? all : 0);
    places.place(&sums, 2 * kIntegerRows);
    places.place(&codes, ordered ? 0 : row_scratch(w));
    places.place(&panels, source == CodeSource::kMade ? panel_bytes : 0);
    bytes = places.bytes();
  }
};

}  // namespace interval
}  // namespace pyrobust
