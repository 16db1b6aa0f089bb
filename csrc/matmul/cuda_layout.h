// How a packed weight lies in GPU memory: in the order in which the lanes of a warp multiply it.
//
// Rows of W go in strips of 64, columns in blocks of 64; a strip times a block is one run of bytes,
// blocks of a strip follow one another. In it a lane owns 16-byte vectors, which it alone reads:
//
//     vector j of lane l at 16 (32 j + l),  j = 0 .. stored_bits - 1,  words 4j .. 4j + 3
//     words step * stored_bits + w belong to step 0 .. 3: columns 16 step .. 16 step + 15
//
// A step of a lane is 32 codes: with g = lane / 4 and t = lane % 4, the 16 pairs (r, h),
//
//     r = 0 .. 7: row 16 (r / 2) + 8 (r % 2) + g       h = 0, 1: columns 8 h + 2 t, 8 h + 2 t + 1
//
// which are the A operand of four mma.m16n8k16: pair (r, h) is a[r % 2 + 2 h] of tile r / 2. Where
// the bits of a pair lie in its words is the table `code_place`, one case a width; it gives all
// pairs of one row the same position within a half word (up to a shift), so that one constant a row
// turns them into numbers:
//
//     8 bits     word r; bytes 2 h and 2 h + 1
//     4 bits     word r / 2; bits 4 (r % 2) + 8 h of each half word; the first code in the low half
//     2 bits     word r / 4; bits 2 (r % 4) + 8 h of each half word
//     1 bit      bit r + 8 h of each half word, inverted (1 is the sign of -1)
//     3 bits     five fields and one bit a half word: fields 0 and 3 of word r for rows 0 .. 2,
//                fields 1 and 4 of word r - 3 for rows 3 .. 5, field 2 for row 6 and (7, 0), and
//                the bits 15 of the three words for (7, 1)
//     codebook   4 bits whatever the width: byte 2 (r % 2) + h of word r / 2, first code low
//     complex    as 2 bits; bit 0: a multiple of 1 (not of i), bit 1: negative
//
// Ternary codes are stored as 2 bits: base 3 costs more instructions than the memory it saves.
// Codes past the end of W are 0; the kernel gives them activations and results that do not exist.
//
// Source: the fragment-order packing of E. Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive
// Parallel Inference on Large Language Models", 2024, arXiv 2408.11743; tables by us.
#pragma once

#include <cstdint>

#include "core/bit_layout.h"

namespace pyrobust::matmul::gpu {

enum class Format : int { k1, k2, k3, k4, k8, kCodebook, kComplex };

constexpr int kStrip = 64;  // rows
constexpr int kBlock = 64;  // columns
constexpr int kStepColumns = 16;
constexpr int kSteps = kBlock / kStepColumns;
constexpr int kLanes = 32;
constexpr int kPairRows = 8;  // rows of a strip that one lane holds
constexpr int kMaxStepWords = 8;

PYROBUST_HD constexpr int stored_bits(Format format) {
  switch (format) {
    case Format::k1:
      return 1;
    case Format::k2:
    case Format::kComplex:
      return 2;
    case Format::k3:
      return 3;
    case Format::k8:
      return 8;
    default:
      return 4;
  }
}

// The format of `levels` code values, without and with a codebook.
PYROBUST_HD Format format_of(int levels, bool codebook) {
  if (codebook) return Format::kCodebook;
  switch (levels) {
    case 2:
      return Format::k1;
    case 8:
      return Format::k3;
    case 16:
      return Format::k4;
    case 256:
      return Format::k8;
    default:
      return Format::k2;
  }
}

PYROBUST_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYROBUST_HD int64_t strips_of(int64_t rows) { return divide_up(rows, kStrip); }
PYROBUST_HD int64_t blocks_of(int64_t cols) { return divide_up(cols, kBlock); }

// Words of one strip times one block.
PYROBUST_HD constexpr int64_t block_words(Format format) {
  return int64_t{kSteps} * kLanes * stored_bits(format);
}

PYROBUST_HD int64_t stored_words(Format format, int64_t rows, int64_t cols) {
  return strips_of(rows) * blocks_of(cols) * block_words(format);
}

// Index of word w of a step within its block.
PYROBUST_HD constexpr int word_index(Format format, int lane, int step, int w) {
  const int word = step * stored_bits(format) + w;
  return (word / 4 * kLanes + lane) * 4 + word % 4;
}

struct Place {
  int word;
  int bit;
};

// Where bit i of code e (0, 1) of pair (r, h) lies among the words of a step.
PYROBUST_HD constexpr Place code_place(Format format, int r, int h, int e, int i) {
  switch (format) {
    case Format::k8:
      return {r, 16 * h + 8 * e + i};
    case Format::k4:
      return {r / 2, 4 * (r % 2) + 8 * h + 16 * e + i};
    case Format::k1:
      return {0, r + 8 * h + 16 * e};
    case Format::kCodebook:
      return {r / 2, 16 * (r % 2) + 8 * h + 4 * e + i};
    case Format::k3:
      if (r < 3) return {r, 9 * h + 16 * e + i};
      if (r < 6) return {r - 3, 3 + 9 * h + 16 * e + i};
      if (r == 7 && h == 1) return {i, 15 + 16 * e};
      return {2 * (r - 6) + h, 6 + 16 * e + i};
    default:
      return {r / 4, 2 * (r % 4) + 8 * h + 16 * e + i};
  }
}

// Row within the strip of pairs r, and first column within the step of pairs h.
PYROBUST_HD constexpr int pair_row(int lane, int r) {
  return 16 * (r / 2) + 8 * (r % 2) + lane / 4;
}
PYROBUST_HD constexpr int pair_column(int lane, int h) { return 8 * h + 2 * (lane % 4); }

// The pair's owner, the other way round: what holds (row, column) of a strip times a block.
struct Owner {
  int lane, step, r, h, e;
};

PYROBUST_HD constexpr Owner owner_of(int row, int column) {
  const int within = column % kStepColumns;
  return {row % 8 * 4 + within % 8 / 2, column / kStepColumns, row / 16 * 2 + row / 8 % 2,
          within / 8, within % 2};
}

// A code as it is stored.
PYROBUST_HD int stored_code(Format format, int code) {
  if (format == Format::k1) return 1 - code;
  if (format == Format::kComplex) return (1 - code % 2) + (code >= 2 ? 2 : 0);
  return code;
}

// The canonical matrix that is repacked.
struct Codes {
  const uint8_t* data = nullptr;  // (rows, packed_row_bytes(cols, levels))
  int64_t rows = 0;
  int64_t cols = 0;
  int levels = 16;
};

PYROBUST_HD int code_or_zero(const Codes& codes, int64_t row, int64_t col) {
  if (row >= codes.rows || col >= codes.cols) return 0;
  return get_code(codes.data + row * packed_row_bytes(codes.cols, codes.levels), col, codes.levels);
}

// The words of one lane's step of block `block` of strip `strip`.
PYROBUST_HD void pack_step(Format format, const Codes& codes, int64_t strip, int64_t block,
                           int lane, int step, uint32_t* words) {
  const int bits = stored_bits(format);
  for (int w = 0; w < bits; ++w) words[w] = 0;
  for (int r = 0; r < kPairRows; ++r) {
    const int64_t row = strip * kStrip + pair_row(lane, r);
    for (int pair = 0; pair < 4; ++pair) {
      const int h = pair / 2, e = pair % 2;
      const int64_t col = block * kBlock + step * kStepColumns + pair_column(lane, h) + e;
      const auto code = static_cast<uint32_t>(stored_code(format, code_or_zero(codes, row, col)));
      for (int i = 0; i < bits; ++i) {
        const Place place = code_place(format, r, h, e, i);
        words[place.word] |= (code >> i & 1u) << place.bit;
      }
    }
  }
}

// Packs step `index` of all of W: block after block, 32 lanes, four steps a lane.
PYROBUST_HD void pack_indexed_step(Format format, const Codes& codes, int64_t index,
                                   uint32_t* out) {
  const int64_t run = index / (kLanes * kSteps), blocks = blocks_of(codes.cols);
  const int lane = static_cast<int>(index / kSteps % kLanes),
            step = static_cast<int>(index % kSteps);
  uint32_t words[kMaxStepWords];
  pack_step(format, codes, run / blocks, run % blocks, lane, step, words);
  for (int w = 0; w < stored_bits(format); ++w) {
    out[run * block_words(format) + word_index(format, lane, step, w)] = words[w];
  }
}

PYROBUST_HD int64_t steps_of(int64_t rows, int64_t cols) {
  return strips_of(rows) * blocks_of(cols) * kLanes * kSteps;
}

// The stored code of one weight, read back.
PYROBUST_HD int read_code(Format format, const uint32_t* stored, int64_t cols, int64_t row,
                          int64_t col) {
  const int64_t run = row / kStrip * blocks_of(cols) + col / kBlock;
  const Owner at = owner_of(static_cast<int>(row % kStrip), static_cast<int>(col % kBlock));
  const uint32_t* words = stored + run * block_words(format);
  int code = 0;
  for (int i = 0; i < stored_bits(format); ++i) {
    const Place place = code_place(format, at.r, at.h, at.e, i);
    const uint32_t word = words[word_index(format, at.lane, at.step, place.word)];
    code |= static_cast<int>(word >> place.bit & 1u) << i;
  }
  return code;
}

// --- scales -------------------------------------------------------------------------------------
// Groups along input features: scales (and zeros) of a strip lie by group, then in the order in
// which lanes want them: a lane's eight rows together. Groups along output features: as they are,
// (row groups, columns padded to whole blocks).

// Place of row `row` of a strip among the strip's 64 scales of a group.
PYROBUST_HD constexpr int scale_place(int row) {
  return row % 8 * kPairRows + row / 16 * 2 + row / 8 % 2;
}

// --- activations --------------------------------------------------------------------------------
// A stage of x is rows of 64 halves, 128 bytes, in eight chunks of 16 bytes. Chunk c of row m lies
// where chunk c ^ (m % 8) would: eight rows of one chunk, which ldmatrix reads together, are then
// in different banks.
PYROBUST_HD constexpr int activation_offset(int m, int chunk) {
  return m * 128 + ((chunk ^ (m & 7)) << 4);
}
constexpr int kEightBytes = 8 * 128;  // eight rows of a stage

// --- schedule -----------------------------------------------------------------------------------
// A tile is one strip, or two that share the rows of x where these are more than 16, times all
// columns. It goes to `parts` thread blocks of eight warps. Teams of warps work side by side, each
// on a run of `per` consecutive blocks of columns; the sums of all runs of a tile are added in
// their order. It depends on the sizes of W and the number of multiprocessors, never on chance.
constexpr int kWarps = 8;

PYROBUST_HD constexpr int tile_strips(int rows) { return rows <= 16 ? 1 : 2; }
PYROBUST_HD constexpr int teams_of(int rows) { return kWarps / tile_strips(rows); }
// Thread blocks that a multiprocessor holds.
PYROBUST_HD constexpr int resident_blocks(int rows) { return rows <= 16 ? 2 : 1; }

struct Schedule {
  int tiles = 0;
  int blocks = 0;      // of columns
  int parts_log2 = 0;  // a cluster of thread blocks where those exist
  int parts = 1;
  int per = 1;
  // Whether thread blocks leave few places free. Where they leave many, those of the next launch
  // come beside them unevenly: 128 on an H200, with room for 264, took 15.3 us and not 12.9.
  bool fills = true;
};

// The number of parts with the least time, in blocks of columns: `tiles` tiles, `teams` teams a
// thread block whose runs are multiples of `multiple`, `places` thread blocks at once. Adding up
// costs as much as about two. At most two parts: clusters of two find room wherever two thread
// blocks do, since multiprocessors come in pairs, while of four that came to 256 of the 264 places
// of an H200 62 found room and two waited, which took the product twice as long.
PYROBUST_HD Schedule divide_tiles(int64_t tiles, int64_t cols, int teams, int multiple,
                                  int64_t places) {
  constexpr int64_t kAdding = 2;
  Schedule best;
  int64_t least = 0;
  for (int log2 = 0; log2 <= 1; ++log2) {
    Schedule s;
    s.tiles = static_cast<int>(tiles);
    s.blocks = static_cast<int>(blocks_of(cols));
    s.parts_log2 = log2;
    s.parts = 1 << log2;
    const int64_t runs = int64_t{s.parts} * teams;
    s.per = multiple * static_cast<int>(divide_up(s.blocks, multiple * runs));
    s.fills = 4 * tiles * s.parts >= 3 * places;
    const int64_t time = divide_up(tiles * s.parts, places) * (s.per + (log2 == 0 ? 0 : kAdding));
    if (log2 > 0 && time >= least) continue;
    best = s;
    least = time;
  }
  return best;
}

// For the instance that takes `rows` rows of x.
PYROBUST_HD Schedule make_schedule(int rows, int64_t rows_of_w, int64_t cols, int multiprocessors) {
  const int64_t tiles = divide_up(strips_of(rows_of_w), tile_strips(rows));
  const int64_t places = int64_t{resident_blocks(rows)} * multiprocessors;
  return divide_tiles(tiles, cols, teams_of(rows), 1, places);
}

// The product of few rows (cuda_few.cuh): a tile is a strip, a warp takes an even number of blocks.
constexpr int kFewTeams = 8;
constexpr int kFewRows = 16;

PYROBUST_HD Schedule make_few_schedule(int64_t rows_of_w, int64_t cols, int multiprocessors) {
  return divide_tiles(strips_of(rows_of_w), cols, kFewTeams, 2, int64_t{2} * multiprocessors);
}

// The product of warpgroups: a tile is two strips, a team takes an even number of blocks, and a
// multiprocessor has one thread block. Clusters of four would leave multiprocessors idle: on an
// H200 30 of them find room and not 33.
constexpr int kWideStrips = 2;
constexpr int kWideTeams = 2;

PYROBUST_HD Schedule make_wide_schedule(int64_t rows_of_w, int64_t cols, int multiprocessors) {
  constexpr int64_t kAdding = 4;
  Schedule best;
  int64_t least = 0;
  for (int log2 = 0; log2 <= 1; ++log2) {
    Schedule s;
    s.tiles = static_cast<int>(divide_up(strips_of(rows_of_w), kWideStrips));
    s.blocks = static_cast<int>(blocks_of(cols));
    s.parts_log2 = log2;
    s.parts = 1 << log2;
    s.per = 2 * static_cast<int>(divide_up(s.blocks, int64_t{2} * s.parts * kWideTeams));
    const int64_t waves = divide_up(int64_t{s.tiles} * s.parts, multiprocessors);
    const int64_t time = waves * (s.per + (log2 == 0 ? 0 : kAdding));
    if (log2 > 0 && time >= least) continue;
    best = s;
    least = time;
  }
  return best;
}

// The product of warpgroups with tiles of four strips and kBroadRows rows of x, of which a
// multiprocessor has one.
constexpr int kBroadStrips = 4;
constexpr int kBroadRows = 128;

PYROBUST_HD Schedule make_broad_schedule(int64_t count, int64_t rows_of_w, int64_t cols,
                                         int multiprocessors) {
  constexpr int64_t kAdding = 4;
  const int64_t of_x = divide_up(count, kBroadRows);
  Schedule best;
  int64_t least = 0;
  for (int log2 = 0; log2 <= 1; ++log2) {
    Schedule s;
    s.tiles = static_cast<int>(divide_up(strips_of(rows_of_w), kBroadStrips));
    s.blocks = static_cast<int>(blocks_of(cols));
    s.parts_log2 = log2;
    s.parts = 1 << log2;
    s.per = static_cast<int>(divide_up(s.blocks, int64_t{s.parts}));
    const int64_t waves = divide_up(int64_t{s.tiles} * s.parts * of_x, multiprocessors);
    const int64_t time = waves * (s.per + (log2 == 0 ? 0 : kAdding));
    if (log2 > 0 && time >= least) continue;
    best = s;
    least = time;
  }
  return best;
}

PYROBUST_HD int64_t thread_blocks_of(const Schedule& s) { return int64_t{s.tiles} * s.parts; }

// Blocks of columns [first, last) of run `run` of a tile; empty past the end.
PYROBUST_HD int first_of_run(const Schedule& s, int run) {
  return run * s.per < s.blocks ? run * s.per : s.blocks;
}
PYROBUST_HD int last_of_run(const Schedule& s, int run) { return first_of_run(s, run + 1); }

// --- instances ----------------------------------------------------------------------------------
// Rows of x that the kernel for `count` rows takes; every instance costs seconds of compilation.
// Instances of 8 and of 16 rows add in the same order. More than kMostWarpRows are several launches
// of that many: an H200 took 40 to 44 us for twice 32 rows, 40 to 45 for an instance of 64. Groups
// along output features are multiplied for at most kMostColumnwiseRows at a time: twice 16 rows
// took it as long as 64.
constexpr int kMostWarpRows = 32;
constexpr int kMostColumnwiseRows = 16;
PYROBUST_HD constexpr int instance_rows(Format format, int group_dim, int64_t count) {
  if (count <= 8 && (group_dim == 1 || format == Format::kComplex)) return 8;
  return count <= 16 || group_dim == 0 ? 16 : kMostWarpRows;
}

}  // namespace pyrobust::matmul::gpu
