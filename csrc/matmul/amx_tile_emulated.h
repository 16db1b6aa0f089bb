// Included by amx_tile.h for tests: tiles as memory of the thread. Throws std::logic_error where
// the processor would fault: a configuration that palette 1 does not admit, tiles without one,
// sizes that do not fit together. Stricter than the processor in one thing: LDTILECFG leaves tiles
// unwritten, and to read one is an error, so that a missing zero() or load() cannot pass.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

namespace pyrobust::matmul {
namespace {
namespace tile {

struct Counters {
  int64_t configurations = 0;
  int64_t releases = 0;
  int64_t loads = 0;
  int64_t stores = 0;
  int64_t products = 0;
};

struct Tile {
  int rows = 0;
  int row_bytes = 0;
  bool written = false;
  uint8_t data[kMaxRows][kMaxRowBytes] = {};
};

struct State {
  bool configured = false;
  Tile tiles[kCount];
  Counters counters;
};

inline State& state() {
  static thread_local State own;
  return own;
}

inline void require(bool condition, const char* fault) {
  if (!condition) throw std::logic_error(std::string("emulated tiles: ") + fault);
}

inline void check_config(const Config& config) {
  require(config.palette == 1, "#GP, the palette is not 1");
  require(config.start_row == 0, "a start row other than 0");
  for (const uint8_t byte : config.reserved) require(byte == 0, "#GP, a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], row_bytes = config.row_bytes[i];
    require(i < kCount || (rows == 0 && row_bytes == 0), "#GP, a tile past the eighth");
    require(rows <= kMaxRows, "#GP, more than 16 rows");
    require(row_bytes <= kMaxRowBytes, "#GP, rows of more than 64 bytes");
    require((rows == 0) == (row_bytes == 0), "#GP, rows without bytes or bytes without rows");
  }
}

inline void configure(const Config& config) {
  check_config(config);
  State& s = state();
  ++s.counters.configurations;
  s.configured = true;
  for (int i = 0; i < kCount; ++i) {
    s.tiles[i] = Tile();
    s.tiles[i].rows = config.rows[i];
    s.tiles[i].row_bytes = config.row_bytes[i];
  }
}

inline void release() {
  State& s = state();
  ++s.counters.releases;
  s.configured = false;
  for (Tile& each : s.tiles) each = Tile();
}

inline Tile& usable(int index) {
  require(state().configured, "#UD, no configuration is loaded");
  Tile& it = state().tiles[index];
  require(it.rows != 0, "#UD, the tile has no rows");
  return it;
}

inline const Tile& readable(int index) {
  const Tile& it = usable(index);
  require(it.written, "the tile is read before it is written");
  return it;
}

template <int kTile>
inline void zero() {
  Tile& it = usable(kTile);
  std::memset(it.data, 0, sizeof(it.data));
  it.written = true;
}

template <int kTile>
inline void load(const void* base, int64_t stride) {
  Tile& it = usable(kTile);
  std::memset(it.data, 0, sizeof(it.data));
  for (int i = 0; i < it.rows; ++i) {
    std::memcpy(it.data[i], static_cast<const uint8_t*>(base) + i * stride,
                static_cast<size_t>(it.row_bytes));
  }
  it.written = true;
  ++state().counters.loads;
}

template <int kTile>
inline void store(void* base, int64_t stride) {
  const Tile& it = readable(kTile);
  for (int i = 0; i < it.rows; ++i) {
    std::memcpy(static_cast<uint8_t*>(base) + i * stride, it.data[i],
                static_cast<size_t>(it.row_bytes));
  }
  ++state().counters.stores;
}

inline void check_operands(const Tile& left, const Tile& right, const Tile& before) {
  require(left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0, "#UD, rows are not whole dwords");
  require(before.rows == left.rows, "#UD, rows of the sum and of the left operand differ");
  require(before.row_bytes == right.row_bytes, "#UD, columns of sum and right operand differ");
  require(left.row_bytes / 4 == right.rows, "#UD, the operands' common sizes differ");
}

template <int kSum, int kLeft, int kRight>
inline void multiply_signed_unsigned() {
  static_assert(kSum != kLeft && kSum != kRight && kLeft != kRight, "#UD, tiles must differ");
  const Tile &left = readable(kLeft), &right = readable(kRight);
  check_operands(left, right, readable(kSum));
  Tile& sum = usable(kSum);
  for (int m = 0; m < sum.rows; ++m) {
    for (int n = 0; n < sum.row_bytes / 4; ++n) {
      uint32_t total;  // wraps, as the processor's does
      std::memcpy(&total, sum.data[m] + 4 * n, sizeof(total));
      for (int k = 0; k < left.row_bytes; ++k) {
        const int a = static_cast<int8_t>(left.data[m][k]), b = right.data[k / 4][4 * n + k % 4];
        total += static_cast<uint32_t>(a * b);
      }
      std::memcpy(sum.data[m] + 4 * n, &total, sizeof(total));
    }
  }
  ++state().counters.products;
}

// How multiply_bfloat16 adds. The manual's way: two chains of fused multiply-adds, of the even and
// of the odd terms, whose sum joins the old one, rounded to nearest. And the worst that interval.h
// allows for: one term after another, products that underflow lost, each addition cut towards zero.
enum class Additions : int { kManual = 0, kCut = 1 };

inline Additions& additions() {
  static Additions chosen = Additions::kManual;
  return chosen;
}

// Denormals become zeros of their sign.
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float cut(double value) {
  auto nearest = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  const double size = value < 0 ? -value : value, found = nearest < 0 ? -nearest : nearest;
  if (found > size) --bits;
  std::memcpy(&nearest, &bits, sizeof(bits));
  return flushed(nearest);
}

// The half of a word as a float: bfloat16 is its upper half.
inline float half_of(const uint8_t* word, bool odd) {
  uint32_t bits;
  std::memcpy(&bits, word, sizeof(bits));
  bits = odd ? bits & 0xffff0000u : bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

constexpr int kMaxColumns = kMaxRowBytes / 4;

inline void add_as_manual(const Tile& left, const Tile& right, int m, int columns, float* sums) {
  float chains[2][kMaxColumns] = {};
  for (int k = 0; k < left.row_bytes / 4; ++k) {
    for (int odd = 0; odd < 2; ++odd) {
      const float a = half_of(left.data[m] + 4 * k, odd != 0);
      for (int n = 0; n < columns; ++n) {
        const float b = half_of(right.data[k] + 4 * n, odd != 0);
        chains[odd][n] = flushed(__builtin_fmaf(a, b, chains[odd][n]));
      }
    }
  }
  for (int n = 0; n < columns; ++n) {
    sums[n] = flushed(flushed(sums[n]) + flushed(chains[0][n] + chains[1][n]));
  }
}

inline void add_and_cut(const Tile& left, const Tile& right, int m, int columns, float* sums) {
  for (int k = 0; k < left.row_bytes / 2; ++k) {
    const float a = half_of(left.data[m] + k / 2 * 4, k % 2 != 0);
    for (int n = 0; n < columns; ++n) {
      const float b = half_of(right.data[k / 2] + 4 * n, k % 2 != 0);
      const float product = cut(static_cast<double>(a) * static_cast<double>(b));
      sums[n] = cut(static_cast<double>(flushed(sums[n])) + static_cast<double>(product));
    }
  }
}

template <int kSum, int kLeft, int kRight>
inline void multiply_bfloat16() {
  static_assert(kSum != kLeft && kSum != kRight && kLeft != kRight, "#UD, tiles must differ");
  const Tile &left = readable(kLeft), &right = readable(kRight);
  check_operands(left, right, readable(kSum));
  Tile& sum = usable(kSum);
  const int columns = sum.row_bytes / 4;
  for (int m = 0; m < sum.rows; ++m) {
    float sums[kMaxColumns];
    std::memcpy(sums, sum.data[m], static_cast<size_t>(sum.row_bytes));
    const auto add = additions() == Additions::kManual ? add_as_manual : add_and_cut;
    add(left, right, m, columns, sums);
    std::memcpy(sum.data[m], sums, static_cast<size_t>(sum.row_bytes));
  }
  ++state().counters.products;
}

}  // namespace tile
}  // namespace
}  // namespace pyrobust::matmul
