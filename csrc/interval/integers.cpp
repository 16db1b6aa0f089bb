// One input under a packed weight by integer sums: memory, constants and shares of rows.
#include "interval/integers.h"

#include <algorithm>

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

// The arrays of an input, one after the other in memory whose lines they begin with.
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
  }

  IntegerInput input{};
  float* scratch;

 private:
  Floats memory_;
};

// Rows that meet the input before their ends are made: a multiple of a panel's.
constexpr int64_t kIntegerRows = 64;

}  // namespace

bool integer_image(const Call& call, int64_t b, int num_threads) {
  const bool sound = call.rounding != Rounding::kNearest;
  if (call.weight.packed == nullptr || call.int8 || !sound) return false;
  const matmul::PackedMatrix& weight = *call.weight.packed;
  if (!integer_format(weight)) return false;
  const IntegerKernels& table = *pick_kernels().integers;
  const bool panels = weight.panels != nullptr && table.panels != nullptr;
  const int64_t terms = call.weight.terms, rows = call.weight.rows;
  IntegerMemory memory(weight, panels);
  const Ends ends{call.lower + b * terms, call.upper + b * terms, terms, call.floor()};
  const IntegerConstants constants = integer_constants(call, ends, memory.input.groups);
  double offset;
  {
    const DefaultFloatEnvironment environment;
    float largest;
    if (!table.prepare({ends, constants, memory.scratch, &memory.input}, &largest)) return false;
    offset = offset_for(call, largest);
    if (panels) table.order(&memory.input);
  }
  // Panels: some 100 products a nanosecond, and half of 5 us pays for a second thread that spins.
  const double work = static_cast<double>(rows * terms) / (panels ? 2.5 : 0.5);
  const Shares shares(rows, kIntegerRows, work, num_threads);
  const int64_t scratch = panels ? 0 : blocks(row_scratch(weight), 64) * 64;
  const int64_t size = scratch + 2 * kIntegerRows * int64_t{sizeof(double)};
  const Floats own_memory = floats(shares.number * size / int64_t{sizeof(float)});
  shares.run([&](int64_t share, int64_t begin, int64_t end) {
    auto* own = reinterpret_cast<uint8_t*>(own_memory.get()) + share * size;
    auto* sums = reinterpret_cast<double*>(own + scratch);
    for (int64_t n = begin; n < end; n += kIntegerRows) {
      const int64_t count = std::min(kIntegerRows, end - n);
      const IntegerDots dots{&weight, &memory.input, n, count, own, sums, sums + kIntegerRows};
      (panels ? table.panels : table.rows)(dots);
      call.report(table.finish({sums, sums + kIntegerRows, shifted(call.bias, n), offset, count,
                                call.out_lower + b * rows + n, call.out_upper + b * rows + n},
                               constants));
    }
  });
  return true;
}

}  // namespace interval
}  // namespace pyrobust
