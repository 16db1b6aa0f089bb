// The reference: plain loops, round to nearest, bounds as proven in interval.h.
#include "core/rounding.h"
#include "interval/kernels.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr float kSlack = 1.0f + 8.0f / 16777216.0f;  // 1 + 8u: covers the roundings of one line

float prepare(const Ends& ends, const Constants& constants, float* centre, float* radius) {
  float largest = 0.0f;
  for (int64_t i = 0; i < ends.count; ++i) {
    const float low = ends.lower[i], high = ends.upper[i];
    const float c = low == high ? low : 0.5f * low + 0.5f * high;
    const float reach = std::fmax(high - c, c - low), size = std::fabs(c);
    const float magnitude = std::fmax(std::fabs(low), std::fabs(high));
    centre[i] = c;
    radius[i] = constants.outward
                    ? (reach * constants.radius_gain + size * constants.centre_gain) * kSlack +
                          constants.input_floor
                    : reach;
    // Written so that a NaN counts as infinite.
    if (!(magnitude <= largest)) largest = magnitude;
    if (!(c - c == 0.0f && reach - reach == 0.0f)) largest = rounding::infinity();
  }
  return largest;
}

struct Sums {
  float centre;
  float radius;
};

constexpr int kLanes = 8;

Sums dot(const float* weight, const float* centre, const float* radius, int64_t terms) {
  float total_c[kLanes] = {}, total_r[kLanes] = {};
  for (int64_t block = 0; block < terms; block += kLanes * kBlock) {
    const int64_t end = terms < block + kLanes * kBlock ? terms : block + kLanes * kBlock;
    float part_c[kLanes] = {}, part_r[kLanes] = {};
    int64_t k = block;
    for (; k + kLanes <= end; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        part_c[lane] += weight[k + lane] * centre[k + lane];
        part_r[lane] += std::fabs(weight[k + lane]) * radius[k + lane];
      }
    }
    for (int lane = 0; k < end; ++k, ++lane) {
      part_c[lane] += weight[k] * centre[k];
      part_r[lane] += std::fabs(weight[k]) * radius[k];
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      total_c[lane] += part_c[lane];
      total_r[lane] += part_r[lane];
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      total_c[lane] += total_c[lane + half];
      total_r[lane] += total_r[lane + half];
    }
  }
  return {total_c[0], total_r[0]};
}

void products(const Products& work) {
  for (int64_t n = 0; n < work.rows; ++n) {
    for (int64_t b = 0; b < work.batch; ++b) {
      const Sums sums = dot(work.weight + n * work.terms, work.centre + b * work.terms,
                            work.radius + b * work.terms, work.terms);
      work.centre_sums[b * work.sum_stride + n] = sums.centre;
      work.radius_sums[b * work.sum_stride + n] = sums.radius;
    }
  }
}

void finish(const Finish& work, const Constants& constants) {
  for (int64_t n = 0; n < work.count; ++n) {
    const float shift = work.bias != nullptr ? work.bias[n] : 0.0f;
    const float centre = work.centre_sums[n] + shift;
    float low = centre - work.radius_sums[n], high = centre + work.radius_sums[n];
    float radius = work.radius_sums[n];
    if (constants.outward) {
      radius = (radius * constants.inflate + std::fabs(shift) * constants.bias_gain + work.offset) *
               kSlack;
      low = rounding::below(rounding::below(centre) - radius);
      high = rounding::above(rounding::above(centre) + radius);
    }
    const bool bounded = rounding::is_finite(centre) && radius < constants.limit;
    work.out_lower[n] = bounded ? low : -rounding::infinity();
    work.out_upper[n] = bounded ? high : rounding::infinity();
  }
}

}  // namespace

const IntervalKernels kPortableKernels = {prepare, products, finish};

}  // namespace interval
}  // namespace pyrobust
