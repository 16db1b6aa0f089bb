// How the sums of a few inputs are split into kernels of R rows and at most four inputs. Included
// by the file of each instruction set and compiled with its flags; the set supplies
//
//   struct Set {
//     static constexpr int kRows[4];  // of W at a time, for 1 to 4 inputs
//     template <int R, int B> static void rows(const Dots& work, int64_t n);
//   };
#pragma once

#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

template <typename Set, int B>
void dots_of(const Dots& work) {
  constexpr int kRows = Set::kRows[B - 1];
  int64_t n = 0;
  for (; n + kRows <= work.rows; n += kRows) Set::template rows<kRows, B>(work, n);
  for (; n < work.rows; ++n) Set::template rows<1, B>(work, n);
}

template <typename Set>
void dots(const Dots& work) {
  Dots part = work;
  for (int64_t b = 0; b < work.batch; b += 4) {
    part.centre = work.centre + b * work.terms;
    part.radius = work.radius + b * work.terms;
    part.centre_sums = work.centre_sums + b * work.sum_stride;
    part.radius_sums = work.radius_sums + b * work.sum_stride;
    switch (work.batch - b) {
      case 1:
        dots_of<Set, 1>(part);
        break;
      case 2:
        dots_of<Set, 2>(part);
        break;
      case 3:
        dots_of<Set, 3>(part);
        break;
      default:
        dots_of<Set, 4>(part);
    }
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
