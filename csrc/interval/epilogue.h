// What follows a convolution, while its ends are in a first-level cache: a few rows of them go to a
// block of scratch, and the loops of elementwise.h write the outputs from there. The ends are those
// of separate passes, bit by bit. Included by convolution.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "interval/elementwise.h"
#include "runtime/scratch.h"

namespace pyrobust {
namespace interval {
namespace {

// Where kernels write ends: row n of them at n * row_stride.
struct EndsBlock {
  float* lower;
  float* upper;
  int64_t row_stride;
  bool past_cache;
};

// Rows [n, n + rows) of W for some neighbouring pixels of an image.
struct OutputBlock {
  int64_t n, rows;
  int64_t pixels;      // at most kPixelsOfBlock
  int64_t at;          // of the first end in the outputs
  int64_t row_stride;  // from a row to the next
  bool past_cache;
};

constexpr int64_t kPixelsOfBlock = 256;

class LateSteps {
 public:
  LateSteps(const Call& call, const IntervalKernels& table) : call_(call), loops_(table.elements) {
    const Epilogue* late = call.epilogue;
    if (late == nullptr) return;
    sum_ = sum_loop(late->rectified_sum, late->rectified_other, call.rounding);
    for (int64_t n = 0; late->mean != nullptr && n < call.weight.rows; ++n) {
      norms_.push_back(channel_loop(late->mean[n], late->scale[n], late->shift[n], late->gain[n],
                                    late->rectified_norm, call.rounding));
    }
  }

  // `finish(from, count, ends)` writes the convolution's own ends of rows [from, from + count) of
  // the block and tells whether all are finite.
  template <typename Finish>
  void write(const OutputBlock& block, const Finish& finish) const {
    if (call_.epilogue == nullptr) {
      call_.report(finish(0, block.rows,
                          EndsBlock{call_.out_lower + block.at, call_.out_upper + block.at,
                                    block.row_stride, block.past_cache}));
      return;
    }
    constexpr int64_t kSize = kRowsAtOnceHere * kPixelsOfBlock;
    auto* const memory = static_cast<float*>(thread_scratch(
        ScratchSlot::kEnds, (2 * kSize + 2 * kPixelsOfBlock) * int64_t{sizeof(float)}));
    const EndsBlock ends{memory, memory + kSize, kPixelsOfBlock, false};
    float* const between = memory + 2 * kSize;
    for (int64_t from = 0; from < block.rows; from += kRowsAtOnceHere) {
      const int64_t count = std::min(kRowsAtOnceHere, block.rows - from);
      call_.report(finish(from, count, ends));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t in = i * kPixelsOfBlock, out = block.at + (from + i) * block.row_stride;
        call_.report(row(block.n + from + i, block.pixels, ends.lower + in, ends.upper + in,
                         between, out, block.past_cache));
      }
    }
  }

  bool none() const { return call_.epilogue == nullptr; }

  // The outputs of `pixels` neighbouring ones of row n of W, from the convolution's own ends.
  void follow(int64_t n, int64_t pixels, const float* lower, const float* upper, int64_t at,
              bool past_cache) const {
    auto* const between = static_cast<float*>(
        thread_scratch(ScratchSlot::kEnds, 2 * kPixelsOfBlock * int64_t{sizeof(float)}));
    for (int64_t i = 0; i < pixels; i += kPixelsOfBlock) {
      const int64_t count = std::min(kPixelsOfBlock, pixels - i);
      call_.report(row(n, count, lower + i, upper + i, between, at + i, past_cache));
    }
  }

 private:
  static constexpr int64_t kRowsAtOnceHere = 8;  // 16 KB

  bool row(int64_t n, int64_t pixels, const float* lower, const float* upper, float* between,
           int64_t at, bool past_cache) const {
    const Epilogue& late = *call_.epilogue;
    const bool sums = late.lower != nullptr;
    bool finite = true;
    if (!norms_.empty()) {
      float* const low = sums ? between : call_.out_lower + at;
      float* const high = sums ? between + kPixelsOfBlock : call_.out_upper + at;
      AffineLoop loop = norms_[static_cast<size_t>(n)];
      loop.past_cache = past_cache && !sums;
      finite = run_channel(loop, call_.rounding, loops_, lower, upper, pixels, low, high);
      lower = low;
      upper = high;
    }
    if (!sums) return finite;
    SumLoop loop = sum_;
    loop.past_cache = past_cache;
    loop.low_x = lower;
    loop.high_x = upper;
    loop.low_y = late.lower + at;
    loop.high_y = late.upper + at;
    loop.count = pixels;
    loop.out_lower = call_.out_lower + at;
    loop.out_upper = call_.out_upper + at;
    return loops_.sum(loop) && finite;
  }

  const Call& call_;
  ElementLoops loops_;
  SumLoop sum_{};
  std::vector<AffineLoop> norms_;
};

}  // namespace
}  // namespace interval
}  // namespace pyrobust
