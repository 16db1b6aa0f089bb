// Picks the kernels; the linear product: prepares centres and radii once and splits the rows of W
// over threads.
#include <algorithm>
#include <vector>

#include "interval/input_panels.h"
#include "interval/integers.h"
#include "interval/interval.h"
#include "interval/panels.h"
#include "interval/plan.h"
#include "interval/run_factors.h"
#include "interval/uniform_inputs.h"
#include "runtime/cpu_features.h"

namespace pyrobust {
namespace interval {
IntervalKernels pick_kernels() {
  IntervalKernels table = kPortableKernels;
  const auto take = [&table](const IntervalKernels* faster) {
    if (faster == nullptr) return;
    if (faster->prepare != nullptr) table.prepare = faster->prepare;
    if (faster->pack != nullptr) table.pack = faster->pack;
    if (faster->patches != nullptr) table.patches = faster->patches;
    if (faster->spread != nullptr) table.spread = faster->spread;
    if (faster->dots != nullptr) table.dots = faster->dots;
    if (faster->tiles != nullptr) table.tiles = faster->tiles;
    if (faster->direct != nullptr) table.direct = faster->direct;
    if (faster->plane != nullptr) {
      table.fill_plane = faster->fill_plane;
      table.plane = faster->plane;
    }
    if (faster->finish_row != nullptr) table.finish_row = faster->finish_row;
    if (faster->finish_panel != nullptr) table.finish_panel = faster->finish_panel;
    if (faster->fused_dots != nullptr) {
      table.fused_columns = faster->fused_columns;
      table.fused_order = faster->fused_order;
      table.fused_dots = faster->fused_dots;
    }
    if (faster->elements.sum != nullptr) table.elements = faster->elements;
    if (faster->curves.ends != nullptr) table.curves = faster->curves;
    if (faster->pairs.ends != nullptr) table.pairs = faster->pairs;
    if (faster->filter.product != nullptr) table.filter = faster->filter;
    if (faster->widen.panel != nullptr) table.widen = faster->widen;
    if (faster->uniform.tiles != nullptr) table.uniform = faster->uniform;
    if (faster->integers != nullptr) table.integers = faster->integers;
    if (faster->coarse_tiles != nullptr) {
      table.round_sizes = faster->round_sizes;
      table.gather_panels = faster->gather_panels;
      table.coarse_tiles = faster->coarse_tiles;
      table.round_channels = faster->round_channels;
      table.pair_channels = faster->pair_channels;
      table.coarse_direct = faster->coarse_direct;
      table.coarse_channels = faster->coarse_channels;
      table.tiled_filter = faster->tiled_filter;
    }
  };
#if defined(PYROBUST_X86)
  if (current_isa() >= Isa::kAvx2) take(avx2_kernels());
  if (current_isa() >= Isa::kAvx512) take(avx512_kernels());
  if (current_isa() >= Isa::kAvx512 && has_bfloat16_products()) take(avx512_bf16_kernels());
  if (current_isa() >= Isa::kAmx && has_bfloat16_tiles()) take(amx_kernels());
#else
  (void)take;
#endif
  return table;
}

namespace {

// Centres and radii of a few inputs, the absolute term and the constants of each.
struct Prepared {
  Floats centre, radius, offsets;
  Constants constants[kFewInputs];
};

void few_inputs(const Call& call, const IntervalKernels& table, const Prepared& input,
                int64_t batch, int num_threads) {
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
        call.report(table.finish_row(
            {centre_sums + b * step, radius_sums + b * step, shifted(call.bias, n),
             input.offsets[b], count, call.out_lower + b * rows + n, call.out_upper + b * rows + n},
            input.constants[b]));
      }
    }
  });
}

// The same with packed weights that the kernels decode in registers; `columns` an ordered input
// has.
void few_inputs_fused(const Call& call, const IntervalKernels& table, const Prepared& input,
                      int64_t batch, int64_t columns, int num_threads) {
  const matmul::PackedMatrix& weight = *call.weight.packed;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Floats ordered = floats(2 * batch * columns);
  for (int64_t b = 0; b < batch; ++b) {
    float *centre = ordered.get() + 2 * b * columns, *radius = centre + columns;
    table.fused_order(weight, input.centre.get() + b * terms, centre);
    table.fused_order(weight, input.radius.get() + b * terms, radius);
    // in this order the sums are those of `dots`
    if (counts_roundings(call)) table.widen.row({centre, radius, columns}, input.constants[b]);
  }
  const Shares shares(rows, kRowStep, static_cast<double>(batch * rows * terms) / 2, num_threads);
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
        call.report(
            table.finish_row({centre_sums, radius_sums, shifted(call.bias, n), input.offsets[b],
                              count, call.out_lower + b * rows + n, call.out_upper + b * rows + n},
                             input.constants[b]));
      }
    }
  });
}

// What a thread needs for rows [begin, end) against all panels.
struct RowShare {
  const Call& call;
  const IntervalKernels& table;
  const Panels& panels;
  int64_t batch;
  int64_t begin, end;
  int64_t step;        // rows at once
  float* decoded;      // of packed rows
  float* sums;         // (panels, end - begin, kPanelWidth)
  bool whole_numbers;  // times factors, as a coarse kernel takes packed weights
  // of the coarse kernel
  float* scratch;
  float* factors;
  float* gathered;  // gathered_blocks() times kTermsAtOnce terms
  uint32_t* sizes;

  // Blocks of terms that all rows meet before the next ones.
  static int64_t gathered_blocks(const Call& call) {
    return call.weight.packed != nullptr ? blocks(call.weight.terms, kTermsAtOnce) : 1;
  }
  static int64_t gathered_size(const Call& call, int64_t panels) {
    return gathered_blocks(call) * blocks(panels, kPanelsOfCoarseTile) *
           coarse_gathered(kTermsAtOnce);
  }
  static int64_t factors_size(int64_t step) { return whole_lines(step * runs_of(kTermsAtOnce)); }
  static int64_t scratch_size(const Call& call, int64_t rows, int64_t step, int64_t panels) {
    const int64_t coarse = coarse_scratch() + factors_size(step) + gathered_size(call, panels) +
                           coarse_sizes(step, pairs_of(kTermsAtOnce));
    return whole_lines(decoded_size(call.weight, step)) + panels * rows * kPanelWidth +
           (call.coarse_radius ? coarse : 0);
  }

  RowShare(const Call& call, const IntervalKernels& table, const Panels& panels, int64_t batch,
           int64_t begin, int64_t end, int64_t step, bool whole_numbers, float* memory)
      : call(call),
        table(table),
        panels(panels),
        batch(batch),
        begin(begin),
        end(end),
        step(step),
        whole_numbers(whole_numbers) {
    decoded = memory;
    sums = decoded + whole_lines(decoded_size(call.weight, step));
    scratch = sums + panels.count * (end - begin) * kPanelWidth;
    factors = scratch + coarse_scratch();
    gathered = factors + factors_size(step);
    sizes = reinterpret_cast<uint32_t*>(gathered + gathered_size(call, panels.count));
  }

  // Panels from p on, terms from `from` on.
  float* gathered_at(int64_t p, int64_t from) const {
    const int64_t block = from / kTermsAtOnce % gathered_blocks(call);
    return gathered +
           (block * blocks(panels.count, kPanelsOfCoarseTile) + p / kPanelsOfCoarseTile) *
               coarse_gathered(kTermsAtOnce);
  }

  // Terms [from, from + count) of all panels.
  void gather(int64_t from, int64_t count) const {
    for (int64_t p = 0; p < panels.count; p += kPanelsOfCoarseTile) {
      table.gather_panels({panels.at(p, from), std::min(kPanelsOfCoarseTile, panels.count - p),
                           panels.stride, count, gathered_at(p, from)});
    }
  }

  // Terms [from, from + count) of rows [n, n + rows), whose W starts at `weight`.
  void add(const float* weight, int64_t n, int64_t rows, int64_t from, int64_t count) const {
    const int64_t terms = call.weight.terms, sum_stride = (end - begin) * kPanelWidth;
    const int64_t at_once = call.coarse_radius ? kPanelsOfCoarseTile : kPanelsOfTile;
    const int64_t size_stride = coarse_pairs(pairs_of(count));
    RunFactors own;
    if (whole_numbers) own = run_factors(*call.weight.packed, n, rows, from, count, factors);
    if (call.coarse_radius) {
      table.round_sizes({weight + from, terms, rows, count, sizes, size_stride, own});
    }
    for (int64_t p = 0; p < panels.count; p += at_once) {
      const Tiles tiles{panels.at(p, from),
                        std::min(at_once, panels.count - p),
                        panels.stride,
                        weight + from,
                        terms,
                        rows,
                        count,
                        sums + p * sum_stride + (n - begin) * kPanelWidth,
                        sum_stride,
                        from > 0,
                        next_ends(call, batch, p, kLanes, n, from + count)};
      if (call.coarse_radius) {
        table.coarse_tiles({tiles, gathered_at(p, from), sizes, size_stride, scratch, own});
      } else {
        table.tiles(tiles);
      }
    }
  }

  // Ends of rows [n, n + rows), while their sums are at hand.
  void finish(int64_t n, int64_t rows) const {
    for (int64_t p = 0; p < panels.count; ++p) {
      const float* own = sums + (p * (end - begin) + n - begin) * kPanelWidth;
      panels.constants.finish(call, table, batch, p, n, rows, own);
    }
  }

  // Terms [from, to) of W against the panels of this pass, and the ends after the last of them.
  void add_pass(int64_t from, int64_t to) const {
    const bool packed = call.weight.packed != nullptr;
    if (packed) {  // decoded once: rows outside, terms inside
      for (int64_t k = from; call.coarse_radius && k < to; k += kTermsAtOnce) {
        gather(k, std::min(kTermsAtOnce, to - k));
      }
      for (int64_t n = begin; n < end; n += step) {
        const int64_t count = std::min(step, end - n);
        const float* weight = rows_of(call.weight, n, count, decoded);
        for (int64_t k = from; k < to; k += kTermsAtOnce) {
          add(weight, n, count, k, std::min(kTermsAtOnce, to - k));
        }
        if (to == call.weight.terms) finish(n, count);
      }
      return;
    }
    for (int64_t k = from; k < std::max(to, from + 1); k += kTermsAtOnce) {  // once without terms
      if (call.coarse_radius) gather(k, std::min(kTermsAtOnce, to - k));
      for (int64_t n = begin; n < end; n += step) {
        const int64_t count = std::min(step, end - n), next = k + kTermsAtOnce;
        add(call.weight.data + n * call.weight.terms, n, count, k, std::min(next, to) - k);
        if (next >= call.weight.terms) finish(n, count);
      }
    }
  }
};

void many_inputs(const Call& call, const IntervalKernels& table, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  Panels panels(call, batch, num_threads);
  const Shares shares(rows, kShareStep, static_cast<double>(batch) * rows * terms / 8, num_threads);
  const bool packed = call.weight.packed != nullptr;
  const int64_t step = rows_at_once(rows, packed ? terms : std::min(terms, kTermsAtOnce));
  const int64_t most = blocks(blocks(rows, kShareStep), shares.number) * kShareStep;
  const bool whole_numbers = call.coarse_radius && packed && has_run_factors(*call.weight.packed);
  const int64_t size = RowShare::scratch_size(call, most, step, panels.count);
  const Floats memory = floats(shares.number * size);
  for (int64_t from = 0; from < std::max<int64_t>(terms, 1); from += panels.pass) {
    const int64_t to = std::min(terms, from + panels.pass);
    fill_panels(call, table, batch, from, to, num_threads, &panels);
    shares.run([&](int64_t share, int64_t begin, int64_t end) {
      const RowShare own(call, table, panels, batch, begin, end, step, whole_numbers,
                         memory.get() + share * size);
      own.add_pass(from, to);
    });
  }
}

// Up to kFewInputs inputs by sums of floats.
void by_floats(const Call& call, const IntervalKernels& table, int64_t batch, int num_threads) {
  const int64_t terms = call.weight.terms;
  Prepared input{floats(batch * terms), floats(batch * terms), floats(batch), {}};
  const bool fusible = call.weight.packed != nullptr && table.fused_dots != nullptr;
  const int64_t columns = fusible ? table.fused_columns(*call.weight.packed) : 0;
  const bool counted = counts_roundings(call);
  const Constants plain = plain_radii(), of_all = constants_of(call, terms, counted);
  const Shares shares(batch, 1, static_cast<double>(batch * terms), num_threads);
  shares.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * terms;
      float *centre = input.centre.get() + at, *radius = input.radius.get() + at;
      const Ends ends{call.lower + at, call.upper + at, terms, call.floor()};
      const Constants& own = input.constants[b] = constants_of_input(call, ends, of_all, counted);
      const float largest = table.prepare(ends, counted ? plain : own, centre, radius);
      if (counted && columns == 0) table.widen.row({centre, radius, terms}, own);
      if (call.int8) widen_to_int8(centre, radius, terms, 1, own);
      input.offsets[b] = offset_for(call, largest);
    }
  });
  if (columns > 0) {
    few_inputs_fused(call, table, input, batch, columns, num_threads);
  } else {
    few_inputs(call, table, input, batch, num_threads);
  }
}

}  // namespace

void interval_chain(const Call* layers, int64_t count, int num_threads) {
  const IntervalKernels table = pick_kernels();
  for (int64_t at = 0; at < count; ++at) {
    at += integer_chain(layers + at, count - at, num_threads);
    if (at == count) return;
    const Call& call = layers[at];  // integers do not suit its input
    by_floats(call, table, 1, num_threads);
  }
}

void interval_linear(const Call& asked, int64_t batch, int num_threads) {
  const int64_t terms = asked.weight.terms;
  check_terms("interval_linear", terms);
  if (batch == 0 || asked.weight.rows == 0) return;
  const IntervalKernels table = pick_kernels();
  Call call = asked;
  call.coarse_radius = false;
  prefer_large_pages(call.out_lower, batch * call.weight.rows * int64_t{sizeof(float)});
  prefer_large_pages(call.out_upper, batch * call.weight.rows * int64_t{sizeof(float)});
  if (const UniformRadii radii(call, table, batch, num_threads); radii.serve) {
    return uniform_inputs(call, table, radii, batch, num_threads);
  }
  if (batch > kFewInputs) {
    call.coarse_radius = coarse_pays(asked, table, asked.weight.rows);
    return many_inputs(call, table, batch, num_threads);
  }
  if (call.weight.packed != nullptr) {
    for (int64_t b = 0; b < batch; ++b) {
      Call one = call;
      one.lower += b * terms;
      one.upper += b * terms;
      one.out_lower += b * call.weight.rows;
      one.out_upper += b * call.weight.rows;
      interval_chain(&one, 1, num_threads);
    }
    return;
  }
  by_floats(call, table, batch, num_threads);
}

}  // namespace interval
}  // namespace pyrobust
