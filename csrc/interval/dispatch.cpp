// Picks the kernels; the linear product: prepares centres and radii once and splits the rows of W
// over threads.
#include <algorithm>

#include "interval/interval.h"
#include "interval/panels.h"
#include "interval/plan.h"
#include "runtime/check.h"
#include "runtime/cpu_features.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kFlush = 4.70197740328915e-38;        // 2^-124
constexpr double kInputFloor = 7.888609052210118e-31;  // 2^-100
constexpr double kPackedError = 1.1e-6;                // of matmul/matmul.h, exact mode
constexpr double kLimit = 8.507059173023462e37;        // 2^126

// Up to this many inputs the dot kernels read W once for all; beyond, panels do.
constexpr int64_t kFewInputs = 4;

}  // namespace

IntervalKernels pick_kernels() {
  IntervalKernels table = kPortableKernels;
  const auto take = [&table](const IntervalKernels* faster) {
    if (faster == nullptr) return;
    if (faster->prepare != nullptr) table.prepare = faster->prepare;
    if (faster->pack != nullptr) table.pack = faster->pack;
    if (faster->patches != nullptr) table.patches = faster->patches;
    if (faster->dots != nullptr) table.dots = faster->dots;
    if (faster->tiles != nullptr) table.tiles = faster->tiles;
    if (faster->finish_row != nullptr) table.finish_row = faster->finish_row;
    if (faster->finish_panel != nullptr) table.finish_panel = faster->finish_panel;
    if (faster->fused_dots != nullptr) {
      table.fused_columns = faster->fused_columns;
      table.fused_order = faster->fused_order;
      table.fused_dots = faster->fused_dots;
    }
  };
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) take(avx2_kernels());
  if (current_isa() >= Isa::kAvx512) take(avx512_kernels());
#else
  (void)take;
#endif
  return table;
}

Constants constants_for(const Call& call) {
  using rounding::gamma_bound;
  using rounding::to_float_up;
  const Rounding mode = call.rounding;
  const double own = gamma_bound(static_cast<double>(sum_depth(call.weight.terms)));
  double any = gamma_bound(static_cast<double>(call.weight.terms + 2));
  if (call.weight.packed != nullptr) any = std::max(any, kPackedError);
  const bool deployed = mode == Rounding::kDeployed;
  // G' of interval.h; the last factor covers the roundings of this line
  const double moved =
      (1.0 + call.operand_error) * (1.0 + call.operand_error) * (1.0 + any) * (1.0 + 1e-14) - 1.0;
  Constants out{};
  out.outward = mode != Rounding::kNearest;
  out.centre_gain = to_float_up(deployed ? own + moved : own);
  out.radius_gain = to_float_up(deployed ? 1.0 + moved : 1.0);
  out.input_floor = out.outward ? to_float_up(kInputFloor) : 0.0f;
  out.inflate = to_float_up((1.0 + 8.0 * rounding::kUnit) / (1.0 - own));
  out.bias_gain = deployed ? to_float_up(any) : 0.0f;
  out.limit = deployed ? rounding::to_float_down(any * kLimit) : rounding::infinity();
  return out;
}

float offset_for(const Call& call, float largest) {
  if (call.operand_error > 0.0f && !(largest < 8.507059e37f)) return rounding::infinity();
  const double scale = kFlush * static_cast<double>(call.weight.terms + 8);
  return rounding::to_float_up(scale * (1.0 + 2.0 * static_cast<double>(largest)));
}

void check_terms(const char* subject, int64_t terms) {
  check(terms <= kMaxTerms, subject, ": an output may sum at most ", kMaxTerms, " products; got ",
        terms, ".");
}

namespace {

// Centres and radii of the whole input, and the absolute term of every input.
struct Prepared {
  Floats centre, radius, offsets;
};

void few_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                const Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Shares shares(rows, kRowStep, static_cast<double>(rows * terms), num_threads);
  const int64_t step = rows_at_once(rows, terms), decoded = decoded_size(call.weight, step);
  const Floats scratch = floats(shares.number * (decoded + 2 * batch * step));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = scratch.get() + share * (decoded + 2 * batch * step);
    float *centre_sums = own + decoded, *radius_sums = centre_sums + batch * step;
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = std::min(step, end - n);
      table.dots({input.centre.get(), input.radius.get(), rows_of(call.weight, n, count, own),
                  batch, count, terms, centre_sums, radius_sums, step});
      for (int64_t b = 0; b < batch; ++b) {
        table.finish_row(
            {centre_sums + b * step, radius_sums + b * step, shifted(call.bias, n),
             input.offsets[b], count, call.out_lower + b * rows + n, call.out_upper + b * rows + n},
            constants);
      }
    }
  });
}

// The same with packed weights that the kernels decode in registers; `columns` an ordered input
// has.
void few_inputs_fused(const Call& call, const IntervalKernels& table, const Constants& constants,
                      const Prepared& input, int64_t batch, int64_t columns, int num_threads) {
  const matmul::PackedMatrix& weight = *call.weight.packed;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Floats ordered = floats(2 * batch * columns);
  for (int64_t b = 0; b < batch; ++b) {
    table.fused_order(weight, input.centre.get() + b * terms, ordered.get() + 2 * b * columns);
    table.fused_order(weight, input.radius.get() + b * terms,
                      ordered.get() + (2 * b + 1) * columns);
  }
  const Shares shares(rows, kRowStep, static_cast<double>(batch * rows * terms) / 4, num_threads);
  const int64_t groups = (terms + weight.group_size - 1) / weight.group_size;
  const int64_t size = 2 * kRowStep * (1 + groups);
  const Floats memory = floats(shares.number * size);
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = memory.get() + share * size;
    float *centre_sums = own, *radius_sums = own + kRowStep, *scratch = own + 2 * kRowStep;
    for (int64_t n = begin; n < end; n += kRowStep) {
      const int64_t count = std::min(kRowStep, end - n);
      for (int64_t b = 0; b < batch; ++b) {
        const float* centre = ordered.get() + 2 * b * columns;
        table.fused_dots(
            {centre, centre + columns, &weight, n, count, scratch, centre_sums, radius_sums});
        table.finish_row({centre_sums, radius_sums, shifted(call.bias, n), input.offsets[b], count,
                          call.out_lower + b * rows + n, call.out_upper + b * rows + n},
                         constants);
      }
    }
  });
}

Floats pack_panels(const IntervalKernels& table, const Prepared& input, int64_t batch,
                   int64_t terms, int num_threads) {
  const int64_t panels = blocks(batch, kLanes), panel_size = terms * kPanelWidth;
  Floats packed = floats(panels * panel_size);
  const Shares shares(panels, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * kLanes * terms;
      table.pack({input.centre.get() + at, input.radius.get() + at,
                  std::min(kLanes, batch - p * kLanes), terms, packed.get() + p * panel_size});
    }
  });
  return packed;
}

void many_inputs(const Call& call, const IntervalKernels& table, const Constants& constants,
                 const Prepared& input, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const int64_t panels = blocks(batch, kLanes), panel_size = terms * kPanelWidth;
  const Floats packed = pack_panels(table, input, batch, terms, num_threads);
  const Shares shares(rows, kRowStep, static_cast<double>(batch) * rows * terms / 8, num_threads);
  const int64_t step = rows_at_once(rows, terms), decoded = decoded_size(call.weight, step);
  const int64_t sum_size = step * kPanelWidth;
  const Floats scratch = floats(shares.number * (decoded + kPanelsOfTile * sum_size));
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    float* own = scratch.get() + share * (decoded + kPanelsOfTile * sum_size);
    float* sums = own + decoded;
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = std::min(step, end - n);
      const float* weight = rows_of(call.weight, n, count, own);
      for (int64_t first = 0; first < panels; first += kPanelsOfTile) {
        const int64_t last = std::min(first + kPanelsOfTile, panels);
        table.tiles({packed.get() + first * panel_size, last - first, panel_size, weight, count,
                     terms, sums, sum_size});
        for (int64_t p = first; p < last; ++p) {
          const int64_t at = p * kLanes * rows + n;
          table.finish_panel(
              {sums + (p - first) * sum_size, shifted(call.bias, n),
               input.offsets.get() + p * kLanes, count, std::min(kLanes, batch - p * kLanes), 1,
               rows, 0, call.out_lower + at, call.out_upper + at},
              constants);
        }
      }
    }
  });
}

}  // namespace

void interval_linear(const Call& call, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms;
  check_terms("interval_linear", terms);
  if (batch == 0 || call.weight.rows == 0) return;
  const Constants constants = constants_for(call);
  const IntervalKernels table = pick_kernels();
  const int64_t padded = blocks(batch, kLanes) * kLanes;  // a panel reads kLanes offsets
  Prepared input{floats(batch * terms), floats(batch * terms), floats(padded)};
  std::fill(input.offsets.get(), input.offsets.get() + padded, 0.0f);
  const Shares shares(batch, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * terms;
      float *centre = input.centre.get() + at, *radius = input.radius.get() + at;
      const float largest = table.prepare({call.lower + at, call.upper + at, terms, call.floor()},
                                          constants, centre, radius);
      if (call.int8) widen_to_int8(centre, radius, terms, 1, constants);
      input.offsets[b] = offset_for(call, largest);
    }
  });
  const bool fusible = call.weight.packed != nullptr && table.fused_dots != nullptr;
  const int64_t columns = fusible ? table.fused_columns(*call.weight.packed) : 0;
  if (batch <= kFewInputs && columns > 0) {
    few_inputs_fused(call, table, constants, input, batch, columns, num_threads);
  } else if (batch <= kFewInputs) {
    few_inputs(call, table, constants, input, batch, num_threads);
  } else {
    many_inputs(call, table, constants, input, batch, num_threads);
  }
}

}  // namespace interval
}  // namespace pyrobust
