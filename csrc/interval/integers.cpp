// One input under a packed weight by integer sums: memory, constants and shares of rows.
#include "interval/integers.h"

#include <algorithm>
#include <vector>

#include "interval/plan.h"

namespace pyrobust {
namespace interval {
namespace {

constexpr double kUnitOfDouble = 1.0 / 9007199254740992.0;  // 2^-53

IntegerConstants integer_constants(const Call& call, const Ends& input, int64_t groups) {
  // gamma_{n+3} for at most 2^21 groups
  const double own = static_cast<double>(groups + 4) * kUnitOfDouble;
  const bool deployed = call.rounding == Rounding::kDeployed;
  const int64_t nonzero = deployed ? nonzero_terms(input) : call.weight.terms;
  const Constants floats = constants_for(call, nonzero, own);
  return {floats.centre_gain, floats.radius_gain, floats.input_floor, 1.0 + 2.0 * own,
          floats.bias_gain,   floats.value_gain,  floats.limit,       floats.least};
}

// Rows that meet the input before their ends are made: a multiple of a panel's.
constexpr int64_t kIntegerRows = 64;

// What a thread needs: the arrays of an input, one after the other in memory whose lines they begin
// with, and room for the kernels.
class IntegerMemory {
 public:
  IntegerMemory(const matmul::PackedMatrix& w, bool panels) {
    input.columns = w.cols;
    input.group = columns_of_group(w);
    input.stride = blocks(input.group, kIntegerBlock) * kIntegerBlock;
    input.groups = blocks(w.cols, input.group);
    const int64_t all = input.groups * input.stride, quads = panels ? all : 0;
    int64_t size = 0;
    const auto place = [&size](int64_t bytes) {
      const int64_t at = size;
      size += (bytes + 63) / 64 * 64;
      return at;
    };
    const int64_t centre = place(2 * all), radius = place(2 * all),
                  scratch_at = place(4 * input.stride);
    const int64_t step = place(4 * input.groups), radius_step = place(4 * input.groups);
    const int64_t shift = place(4 * input.groups), total = place(8 * input.groups);
    const int64_t bytes_at = place(4 * quads), ones = place(quads);
    const int64_t sums_at = place(2 * kIntegerRows * int64_t{sizeof(double)});
    const int64_t codes_at = place(panels ? 0 : row_scratch(w));
    memory_ = floats(size / int64_t{sizeof(float)});
    auto* base = reinterpret_cast<char*>(memory_.get());
    input.centre = reinterpret_cast<int16_t*>(base + centre);
    input.radius = reinterpret_cast<int16_t*>(base + radius);
    scratch = reinterpret_cast<float*>(base + scratch_at);
    input.step = reinterpret_cast<float*>(base + step);
    input.radius_step = reinterpret_cast<float*>(base + radius_step);
    input.shift = reinterpret_cast<int32_t*>(base + shift);
    input.total = reinterpret_cast<int64_t*>(base + total);
    input.quads = reinterpret_cast<uint8_t*>(base + bytes_at);
    input.ones = reinterpret_cast<uint8_t*>(base + ones);
    sums = reinterpret_cast<double*>(base + sums_at);
    codes = reinterpret_cast<uint8_t*>(base + codes_at);
  }

  IntegerInput input{};
  float* scratch;  // of a group
  double* sums;    // twice kIntegerRows
  uint8_t* codes;  // row_scratch() bytes where there are no panels

 private:
  Floats memory_;
};

// Asks for lines that another core may have written last, all at once: loops that meet them one
// after the other would wait for each (1 to 2 us for an input of 1024 columns).
void fetch_lines(const void* memory, int64_t bytes) {
  const auto* line = static_cast<const char*>(memory);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
}

}  // namespace

bool integer_image(const Call& call, int64_t b, int num_threads) {
  const bool sound = call.rounding != Rounding::kNearest;
  if (call.weight.packed == nullptr || call.int8 || !sound) return false;
  const matmul::PackedMatrix& weight = *call.weight.packed;
  if (!integer_format(weight)) return false;
  const IntegerKernels& table = *pick_kernels().integers;
  const bool panels = weight.panels != nullptr && table.panels != nullptr;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  const Ends ends{call.lower + b * terms, call.upper + b * terms, terms, call.floor()};
  const int64_t groups = blocks(weight.cols, columns_of_group(weight));
  const IntegerConstants constants = integer_constants(call, ends, groups);
  // Panels: some 100 products a nanosecond, and half of 5 us pays for a second thread that spins.
  const double work = static_cast<double>(rows * terms) / (panels ? 2.5 : 0.5);
  const Shares shares(rows, kIntegerRows, work, num_threads);
  std::vector<IntegerMemory> memories;
  memories.reserve(static_cast<size_t>(shares.number));
  for (int64_t i = 0; i < shares.number; ++i) memories.emplace_back(weight, panels);
  bool served = true;  // by integers: the same for all shares, and told by the first
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    // Every thread makes the integers for itself: sooner than to wait for another core's.
    IntegerMemory& memory = memories[static_cast<size_t>(share)];
    fetch_lines(ends.lower, terms * int64_t{sizeof(float)});
    fetch_lines(ends.upper, terms * int64_t{sizeof(float)});
    float largest;
    const bool suits = table.prepare({ends, constants, memory.scratch, &memory.input}, &largest);
    if (share == 0) served = suits;
    if (!suits) return;
    if (panels) table.order(&memory.input);
    const double offset = offset_for(call, largest);
    double *centre_sums = memory.sums, *radius_sums = centre_sums + kIntegerRows;
    for (int64_t n = begin; n < end; n += kIntegerRows) {
      const int64_t count = std::min(kIntegerRows, end - n);
      (panels ? table.panels : table.rows)(
          {&weight, &memory.input, n, count, memory.codes, centre_sums, radius_sums});
      call.report(table.finish({centre_sums, radius_sums, shifted(call.bias, n), offset, count,
                                call.out_lower + b * rows + n, call.out_upper + b * rows + n},
                               constants));
    }
  });
  return served;
}

}  // namespace interval
}  // namespace pyrobust
