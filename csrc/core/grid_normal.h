// The Gaussian rounded to the nearest integer, correctly: k = round(s z) for an exactly normal z.
//
// The random bits are the beginning of the binary expansion of u, uniform on [0, 1/2): 31 bits of
// the first word below its sign bit, then words of 32 bits. |z| is the number with the tail
// probability u, so |k| >= j exactly where u < Q_j, the tail probability of (j - 1/2) / s. A table
// holds the first 128 binary places of every Q_j >= 2^-128. Words of u are drawn until the
// comparison is decided (Ziv's method): one word nearly always, and after four words the rest, of
// probability 2^-127 per threshold, counts as u >= Q_j. No floating point enters the decision, so
// every machine gives the same integer; a float32 variate is used only to guess where to look.
#pragma once

#include <stdint.h>

#include "core/host_device.h"
#include "core/normal.h"

namespace pyrobust {

constexpr int kGridWords = 4;

// word[w][j - 1], j = 1 .. count: binary places 32 w + 1 .. 32 w + 32 of Q_j, falling with j.
struct GridTable {
  const uint32_t* word[kGridWords];
  int32_t count;
  float scale;  // s rounded to float32
};

// Whether the words of u drawn so far decide u < Q_j; *below is then the answer.
PYROBUST_HD bool grid_decided(const GridTable& table, int32_t j, const uint32_t* u, int words,
                              bool* below) {
  for (int w = 0; w < words; ++w) {
    const uint32_t q = table.word[w][j - 1];
    if (u[w] != q) {
      *below = u[w] < q;
      return true;
    }
  }
  *below = false;
  return words == kGridWords;
}

// |k| from the first `words` words of u (word 0 without its sign), searched from `guess`; -1 where
// more words are needed.
PYROBUST_HD int32_t grid_magnitude(const GridTable& table, const uint32_t* u, int words,
                                   int32_t guess) {
  int32_t k = guess < 0 ? 0 : guess > table.count ? table.count : guess;
  bool below = false;
  while (k > 0) {  // down to the largest k <= guess with u < Q_k
    if (!grid_decided(table, k, u, words, &below)) return -1;
    if (below) break;
    --k;
  }
  if (k < guess) return k;
  while (k < table.count) {
    if (!grid_decided(table, k + 1, u, words, &below)) return -1;
    if (!below) break;
    ++k;
  }
  return k;
}

// Where to begin the search: the rounded float32 variate, or by bisection of the first places where
// the bits are too small for it.
PYROBUST_HD int32_t grid_guess(const GridTable& table, const NormalTable& normal, uint32_t bits) {
  const uint32_t m = bits & 0x7fffffffu;
  if (!normal_needs_refinement(bits)) {
    return static_cast<int32_t>(normal_from_bits(normal, m) * table.scale + 0.5f);
  }
  int32_t low = 0, high = table.count;  // Q_low > u >= Q_(high + 1), as far as word 0 tells
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (m < table.word[0][middle - 1]) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

PYROBUST_HD int32_t grid_with_sign(int32_t magnitude, uint32_t bits) {
  return (bits & 0x80000000u) != 0 ? -magnitude : magnitude;
}

}  // namespace pyrobust
