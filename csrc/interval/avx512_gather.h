// Included by the files whose radii meet |W| in bfloat16: panels copied side by side, two terms at
// a time. A Layout says where they go.
#pragma once

#include "interval/avx512_pairs.h"

namespace pyrobust {
namespace interval {
namespace {

// Sixteen centres of each of two terms, and pairs of their radii rounded up.
struct TermPair {
  __m512 first, second;
  __m512i radii;
};

// Terms k and k + 1 of two panels, zeros from `terms` on.
inline TermPair term_pair(const float* left, const float* right, int64_t k, int64_t terms) {
  const auto column = [&](int64_t at) {
    if (at >= terms) return Column{_mm512_setzero_ps(), _mm512_setzero_ps()};
    return column_of(left + at * kPanelWidth, right + at * kPanelWidth);
  };
  const auto bits = [&](int64_t at, __m512 radius) {
    return at < terms ? round_up(_mm512_castps_si512(radius)) : _mm512_setzero_si512();
  };
  const Column one = column(k), two = column(k + 1);
  return {one.centre, two.centre, pair_up(bits(k, one.radius), bits(k + 1, two.radius))};
}

template <typename Layout>
void gather_groups(const GatherPanels& work) {
  const Layout layout(work.to, work.terms);
  for (int64_t p = 0; p < Layout::kGroups; ++p) {
    const int64_t odd = 2 * p + 1 < work.panels ? 2 * p + 1 : 2 * p;  // the last may be absent
    const float *left = work.panel + 2 * p * work.panel_stride,
                *right = work.panel + odd * work.panel_stride;
    for (int64_t q = 0; q < layout.pairs; ++q) {
      layout.put(q, p, term_pair(left, right, 2 * q, work.terms));
    }
  }
}

// Layout<P> holds P groups of two panels.
template <template <int> class Layout>
void gather_panels(const GatherPanels& work) {
  if (work.panels > 2) {
    gather_groups<Layout<2>>(work);
  } else {
    gather_groups<Layout<1>>(work);
  }
}

}  // namespace
}  // namespace interval
}  // namespace pyrobust
