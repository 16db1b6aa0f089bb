// The warp-wide operations of primitives_emulated.h, each as a function of all 32 lanes' inputs.
#include <algorithm>
#include <cmath>

#include "cuda/primitives.h"

namespace pyrobust {
namespace cuda {
namespace {

using fibres::kSlot;
using fibres::kWarp;

template <typename T>
T get(const uint8_t* slot) {
  static_assert(sizeof(T) <= kSlot, "a slot is too small");
  T value;
  memcpy(&value, slot, sizeof(T));
  return value;
}

template <typename T>
void put(uint8_t* slot, const T& value) {
  static_assert(sizeof(T) <= kSlot, "a slot is too small");
  memcpy(slot, &value, sizeof(T));
}

// --- ldmatrix -----------------------------------------------------------------------------------

// Extra cycles of reading eight 16-byte rows: each takes a quarter of one of eight bank groups.
int conflicts_of(const uint8_t* const* rows) {
  int users[8] = {};
  int most = 0;
  for (int row = 0; row < 8; ++row) {
    const auto group = reinterpret_cast<uintptr_t>(rows[row]) / 16 % 8;
    most = std::max(most, ++users[group]);
  }
  return most - 1;
}

template <int kMatrices, bool kTransposed>
void ldmatrix(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  const uint8_t* rows[8 * kMatrices];
  for (int lane = 0; lane < 8 * kMatrices; ++lane) rows[lane] = get<const uint8_t*>(input[lane]);
  for (int m = 0; m < kMatrices; ++m) {
    fibres::counters().matrix_conflicts += conflicts_of(rows + 8 * m);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t half[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
        memcpy(&half[i], rows[8 * m + row] + 2 * column, 2);
      }
      const uint32_t word = static_cast<uint32_t>(half[1]) << 16 | half[0];
      memcpy(output[lane] + 4 * m, &word, 4);
    }
  }
}

// --- mma ----------------------------------------------------------------------------------------

template <typename T>
struct Operands {
  uint32_t a[4];
  uint32_t b[2];
  T d[4];
};

// The sum of `products` and `start` as a tensor core that aligns blocks of four products and the
// running sum to their largest exponent, keeps 24 places and cuts the rest.
float truncating_sum(float start, const double* products, int count) {
  double sum = start;
  for (int begin = 0; begin < count; begin += 4) {
    int exponent = -1074;
    const auto widen = [&exponent](double term) {
      if (term == 0.0 || !std::isfinite(term)) return;
      int of_term;
      std::frexp(term, &of_term);
      exponent = std::max(exponent, of_term);
    };
    widen(sum);
    for (int i = begin; i < begin + 4; ++i) widen(products[i]);
    if (exponent == -1074) continue;  // nothing but zeros, or no finite term
    const double unit = std::ldexp(1.0, exponent - 24);
    double total = std::trunc(sum / unit);
    for (int i = begin; i < begin + 4; ++i) total += std::trunc(products[i] / unit);
    total *= unit;  // at most 27 bits, then cut to 24
    const float nearest = static_cast<float>(total);
    const bool grew = std::fabs(static_cast<double>(nearest)) > std::fabs(total);
    sum = grew ? float_from_bits(bits_of_float(nearest) - 1) : nearest;
  }
  return static_cast<float>(sum);
}

float sum_of(float start, const double* products, int count) {
  if (fibres::options().tensor_sum == fibres::TensorSum::kTruncating) {
    return truncating_sum(start, products, count);
  }
  double sum = start;
  for (int k = 0; k < count; ++k) sum += products[k];
  return static_cast<float>(sum);
}

// One product of halves. unpack(word, i): half i of a word.
template <typename Unpack>
void mma_k16(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot], const Unpack& unpack) {
  ++fibres::counters().matrix_products;
  double a[16][16], b[16][8];
  Operands<float> lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    lanes[lane] = get<Operands<float>>(input[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = unpack(lanes[lane].a[i], half);
        if (i < 2) b[2 * t + half + i * 8][g] = unpack(lanes[lane].b[i], half);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      double products[16];
      for (int k = 0; k < 16; ++k) products[k] = a[row][k] * b[k][column];
      lanes[lane].d[i] = sum_of(lanes[lane].d[i], products, 16);
    }
    memcpy(output[lane], lanes[lane].d, sizeof(lanes[lane].d));
  }
}

void mma_f16(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  mma_k16(input, output,
          [](uint32_t word, int half) { return half == 0 ? low_f16(word) : high_f16(word); });
}

void mma_bf16(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  mma_k16(input, output,
          [](uint32_t word, int half) { return half == 0 ? low_bf16(word) : high_bf16(word); });
}

void mma_s8(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  ++fibres::counters().matrix_products;
  int32_t a[16][32], b[32][8];
  Operands<int32_t> lanes[kWarp];
  const auto byte = [](uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); };
  for (int lane = 0; lane < kWarp; ++lane) {
    lanes[lane] = get<Operands<int32_t>>(input[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 4; ++k) {
        a[g + i % 2 * 8][4 * t + k + i / 2 * 16] = byte(lanes[lane].a[i], k);
        if (i < 2) b[4 * t + k + i * 16][g] = byte(lanes[lane].b[i], k);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 32; ++k) lanes[lane].d[i] += a[row][k] * b[k][column];
    }
    memcpy(output[lane], lanes[lane].d, sizeof(lanes[lane].d));
  }
}

template <typename T>
void multiply(const char* name, T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              fibres::WarpOperation operation) {
  Operands<T> operands;
  memcpy(operands.a, a, sizeof(a));
  memcpy(operands.b, b, sizeof(b));
  memcpy(operands.d, d, sizeof(d));
  fibres::rendezvous(name, &operands, sizeof(operands), d, sizeof(d), operation);
}

// --- shuffles -----------------------------------------------------------------------------------

struct Shuffle {
  uint64_t value;
  int argument;
};

template <ShuffleKind kKind>
void shuffle_lanes(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int argument = get<Shuffle>(input[lane]).argument;
    int source = kKind == ShuffleKind::kFrom  ? argument % kWarp
                 : kKind == ShuffleKind::kXor ? lane ^ argument
                                              : lane + argument;
    if (source < 0 || source >= kWarp) source = lane;
    put(output[lane], get<Shuffle>(input[source]).value);
  }
}

void ballot_lanes(const uint8_t (*input)[kSlot], uint8_t (*output)[kSlot]) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= uint32_t{input[lane][0]} << lane;
  for (int lane = 0; lane < kWarp; ++lane) put(output[lane], votes);
}

void nothing(const uint8_t (*)[kSlot], uint8_t (*)[kSlot]) {}

}  // namespace

void emulate_ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row) {
  if (fibres::lane_index() < 8 * matrices) fibres::check_shared(row, 16, "ldmatrix");
  const auto operation = matrices == 2 ? ldmatrix<2, false>
                         : transposed  ? ldmatrix<4, true>
                                       : ldmatrix<4, false>;
  fibres::rendezvous("ldmatrix", &row, sizeof(row), r, sizeof(uint32_t) * matrices, operation);
}

void emulate_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply("mma f16", d, a, b, mma_f16);
}

void emulate_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply("mma bf16", d, a, b, mma_bf16);
}

void emulate_mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply("mma s8", d, a, b, mma_s8);
}

uint64_t emulate_shuffle(uint64_t value, int argument, ShuffleKind kind) {
  const Shuffle shuffle = {value, argument};
  uint64_t result;
  const auto operation = kind == ShuffleKind::kFrom  ? shuffle_lanes<ShuffleKind::kFrom>
                         : kind == ShuffleKind::kXor ? shuffle_lanes<ShuffleKind::kXor>
                                                     : shuffle_lanes<ShuffleKind::kDown>;
  fibres::rendezvous("shuffle", &shuffle, sizeof(shuffle), &result, sizeof(result), operation);
  return result;
}

uint32_t emulate_ballot(bool vote) {
  const uint8_t bit = vote ? 1 : 0;
  uint32_t votes;
  fibres::rendezvous("ballot", &bit, 1, &votes, sizeof(votes), ballot_lanes);
  return votes;
}

void emulate_sync_warp() {
  uint8_t none = 0;
  fibres::rendezvous("sync_warp", &none, 1, &none, 0, nothing);
}

}  // namespace cuda
}  // namespace pyrobust
