// Included by avx512.cpp alone: products of 8-bit activations with one bit by look-ups
// (sign_tables.h). A tile is up to four rows of x against four panels of W: each table is loaded
// once for four look-ups, each index once for four. Sums of groups go to memory as they are, and a
// second loop adds those of several groups to totals in registers. Group sums and their order are
// those of avx512_panels.h, hence the same bits.
#pragma once

#include "matmul/avx512_panels.h"
#include "matmul/avx512_sign_rows.h"
#include "matmul/avx512_sign_words.h"
#include "runtime/cpu_features.h"

namespace pyrobust::matmul {
namespace {

constexpr int64_t kSignRows = 4;    // of x, in a tile
constexpr int64_t kSignPanels = 4;  // of W

// Rows of x from which words and tables pay. Four take 0.78 of the time of avx512_panels.h on one
// thread of a Zen 4, 16 and more 0.65.
constexpr int64_t kLeastSignRows = 4;
// Rows of W a thread, for fewer of which tables would be made in vain: 256 take 0.88 to 0.95 of
// that time (4096 columns), 128 would take 1.1.
constexpr int64_t kLeastSignShare = 256;
// Columns of a group, of which tables, made for whole groups, must stay in the second cache.
constexpr int64_t kMostSignColumns = 16384;

// Bytes of tables that all panels meet before the next, and of totals: each about half of a second
// cache of 1 MiB. Rows of x at once: more make words no cheaper.
constexpr int64_t kTableBytes = 448 << 10;
constexpr int64_t kSignTotalBytes = 512 << 10;
constexpr int64_t kMostSignRows = 32;

bool takes_signs(const PackedMatrix& w, Mode mode, int64_t rows) {
  return mode == Mode::kInt8 && rows >= kLeastSignRows && w.panels != nullptr && w.levels == 2 &&
         w.codebook == nullptr && w.remainder.offsets == nullptr && w.group_dim == 1 &&
         w.rows >= kLeastSignShare && !has_quad_groups(w) &&
         PanelLayout(w).group_columns <= kMostSignColumns && looks_words_up();
}

inline int64_t within(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// How many rows of x, groups and panels meet at a time, and the memory for these.
struct SignScratch {
  int64_t rows, groups, panels;
  __m512i* tables;  // (tiles of x, tables of the groups, rows of a tile)
  int16_t* start;   // (tiles of x, runs of the groups, rows of a tile)
  __m512i* words;   // (words of the groups, panels of a tile)
  double* scale;    // (groups, panels of a tile, 32)
  __m512i* sums;    // (runs, panels of a tile, rows of a tile)
  double* total;    // (tiles of panels, rows, panels of a tile, 32)
  double* result;   // (rows, 32)
  int64_t used;

  SignScratch(void* memory, const PackedMatrix& w, int64_t all_rows) {
    const PanelLayout layout(w);
    const int64_t row_bytes = group_tables(layout.group_columns) * kLineBytes;  // of a group
    rows = within(kTableBytes / row_bytes / kSignRows * kSignRows, kSignRows, kMostSignRows);
    rows = within(all_rows, 1, rows);
    groups = within(kTableBytes / (rows * row_bytes), 1, layout.groups);
    const int64_t panel_totals = rows * kPanelRows * static_cast<int64_t>(sizeof(double));
    panels = kSignTotalBytes / panel_totals / kSignPanels * kSignPanels;
    panels = within(panels, kSignPanels, round_up(layout.panels, kSignPanels));
    const int64_t runs = groups * group_runs(layout.group_columns);
    Arena arena{static_cast<char*>(memory)};
    tables = arena.take<__m512i>(rows * groups * group_tables(layout.group_columns));
    start = arena.take<int16_t>(rows * runs);
    words = arena.take<__m512i>(kSignPanels * groups * group_words(layout.group_columns));
    scale = arena.take<double>(kSignPanels * groups * kPanelRows);
    sums = arena.take<__m512i>(kSignPanels * kSignRows * runs);
    total = arena.take<double>(panels * rows * kPanelRows);
    result = arena.take<double>(rows * kPanelRows);
    used = arena.used;
  }
};

// What a tile works on: some groups, and its places in SignScratch.
struct SignTile {
  const PanelLayout* layout;
  int64_t from, to;  // groups
  const __m512i* tables;
  const int16_t* start;
  const __m512i* words;
  const double* scale;
  __m512i* sums;
  double* total;  // (rows, panels, 32)
};

// sum += v; an asm statement, so that gcc neither adds look-ups to one another first, for which
// registers do not suffice, nor loads a table for each.
inline void add_words(__m512i& sum, __m512i v) {
  __asm__("vpaddw %1, %0, %0" : "+v"(sum) : "v"(v));
}

// The accumulators and indices of a tile in registers.
template <int kX, int kW>
struct SignSums {
  __m512i sum[kX][kW], word[kW];

  __attribute__((always_inline)) inline void begin(const int16_t* start) {
#pragma GCC unroll 4
    for (int r = 0; r < kX; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kW; ++p) sum[r][p] = _mm512_set1_epi16(start[r]);
    }
  }
  __attribute__((always_inline)) inline void load(const __m512i* words) {
#pragma GCC unroll 4
    for (int p = 0; p < kW; ++p) word[p] = _mm512_load_si512(words + p);
  }
  // Adds what the lower five bits of the words find. Returns where the next tables are.
  __attribute__((always_inline)) inline const __m512i* add(const __m512i* tables) {
#pragma GCC unroll 4
    for (int r = 0; r < kX; ++r) {
      __m512i table = _mm512_load_si512(tables + r);
      __asm__("" : "+v"(table));
#pragma GCC unroll 4
      for (int p = 0; p < kW; ++p) {
        add_words(sum[r][p], _mm512_permutexvar_epi16(word[p], table));
      }
    }
    return tables + kX;
  }
  __attribute__((always_inline)) inline void shift() {
#pragma GCC unroll 4
    for (int p = 0; p < kW; ++p) word[p] = _mm512_srli_epi16(word[p], kTableColumns);
  }
  __attribute__((always_inline)) inline void store(__m512i* out) const {
#pragma GCC unroll 4
    for (int p = 0; p < kW; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < kX; ++r) _mm512_store_si512(out + p * kX + r, sum[r][p]);
    }
  }
};

// The sums of all runs of a tile, (runs, kW, kX), plus kSumOffset.
template <int kX, int kW>
__attribute__((noinline)) void add_sign_products(const SignTile& t) {
  const __m512i *tables = t.tables, *words = t.words;
  const int16_t* start = t.start;
  __m512i* sums = t.sums;
  for (int64_t g = t.from; g < t.to; ++g) {
    for (int64_t left = group_quads(*t.layout, g); left > 0; left -= kRunQuads) {
      const int64_t quads = run_quads(left);
      SignSums<kX, kW> s;
      s.begin(start);
      for (int64_t i = 0; i < quads; ++i, words += kW) {
        s.load(words);
        tables = s.add(tables);
        s.shift();
        tables = s.add(tables);
        s.shift();
        tables = s.add(tables);
      }
      s.load(words);
      for (int64_t i = 0; i < quads; i += kTableColumns) {
        tables = s.add(tables);
        s.shift();
      }
      s.store(sums);
      words += kW;
      start += kX;
      sums += kX * kW;
    }
  }
}

// Sums of a run as doubles, in the order of kWordUnits and over these. A double of 2^52 has its
// integer in the lower bits: the bits of a word are put where they are, or'ed to that, and what is
// too much is taken off.
struct WordDoubles {
  __m512i mask[3], one = _mm512_set1_epi64(0x4330000000000000);
  __m512d offset[3];

  WordDoubles() {
    for (int i = 0; i < 3; ++i) {
      mask[i] = _mm512_set1_epi64(int64_t{0xffff} << (16 * i));
      offset[i] = _mm512_set1_pd(0x1p52 + static_cast<double>(int64_t{kSumOffset} << (16 * i)));
    }
  }

  __attribute__((always_inline)) inline void of(__m512i sums, __m512d* out) const {
    constexpr int kAndOr = 0xea;  // the first and the second, or the third
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m512i bits = _mm512_ternarylogic_epi64(sums, mask[i], one, kAndOr);
      out[i] = _mm512_sub_pd(_mm512_castsi512_pd(bits), offset[i]);
    }
    const __m512i bits = _mm512_or_si512(_mm512_srli_epi64(sums, 48), one);
    out[3] = _mm512_sub_pd(_mm512_castsi512_pd(bits), offset[0]);
  }
};

// total += scale * sums of groups of one run, of all rows of x and one panel.
template <int kX, int kW>
__attribute__((noinline)) void add_sign_totals(const SignTile& t, int p) {
  const WordDoubles doubles;
  double* total = t.total + p * kPanelRows;
  __m512d own[kX][4];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kX; ++i) {
    own[i / 4][i % 4] = _mm512_load_pd(total + i / 4 * kW * kPanelRows + 8 * (i % 4));
  }
  const double* scale = t.scale + p * kPanelRows;
  const __m512i* sums = t.sums + p * kX;
  for (int64_t g = t.from; g < t.to; ++g, scale += kW * kPanelRows, sums += kW * kX) {
#pragma GCC unroll 4
    for (int r = 0; r < kX; ++r) {
      __m512d sum[4];
      doubles.of(_mm512_load_si512(sums + r), sum);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        own[r][i] = _mm512_fmadd_pd(sum[i], _mm512_load_pd(scale + 8 * i), own[r][i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kX; ++i) {
    _mm512_store_pd(total + i / 4 * kW * kPanelRows + 8 * (i % 4), own[i / 4][i % 4]);
  }
}

// The same of groups of several runs, whose sums are added first, of one row and one panel.
template <int kX, int kW>
__attribute__((noinline)) void add_long_totals(const SignTile& t, int p, int r) {
  const WordDoubles doubles;
  double* total = t.total + (r * kW + p) * kPanelRows;
  const double* scale = t.scale + p * kPanelRows;
  const __m512i* sums = t.sums + p * kX + r;
  for (int64_t g = t.from; g < t.to; ++g, scale += kW * kPanelRows) {
    __m512d sum[4], next[4];
    for (__m512d& each : sum) each = _mm512_setzero_pd();
    for (int64_t i = group_runs(t.layout->columns_of(g)); i > 0; --i, sums += kW * kX) {
      doubles.of(_mm512_load_si512(sums), next);
      for (int j = 0; j < 4; ++j) sum[j] = _mm512_add_pd(sum[j], next[j]);
    }
    for (int j = 0; j < 4; ++j) add_scaled(sum[j], _mm512_load_pd(scale + 8 * j), total + 8 * j);
  }
}

template <int kX, int kW>
void sign_tile(const SignTile& t) {
  add_sign_products<kX, kW>(t);
  const bool long_groups = group_runs(t.layout->group_columns) > 1;
  for (int p = 0; p < kW; ++p) {
    if (!long_groups) add_sign_totals<kX, kW>(t, p);
    for (int r = 0; long_groups && r < kX; ++r) add_long_totals<kX, kW>(t, p, r);
  }
}

void sign_tile_of(int64_t rows, int64_t panels, const SignTile& t) {
  constexpr int kW = kSignPanels;
  switch (panels == kW ? rows : -rows) {
    case 1:
      return sign_tile<1, kW>(t);
    case 2:
      return sign_tile<2, kW>(t);
    case 3:
      return sign_tile<3, kW>(t);
    case 4:
      return sign_tile<4, kW>(t);
    case -1:
      return sign_tile<1, 1>(t);
    case -2:
      return sign_tile<2, 1>(t);
    case -3:
      return sign_tile<3, 1>(t);
    default:
      return sign_tile<4, 1>(t);
  }
}

// Some rows of x against some panels: rows [m, m + rows) and panels [first, last).
struct SignBlock {
  const PackedMatrix* weight;
  const PanelLayout* layout;
  const SignScratch* scratch;
  const int8_t* q;  // row m
  int64_t stride, rows, first, last;

  // Panels of the tile from panel p on: four, or one where fewer are left.
  int64_t panels_at(int64_t p) const { return last - p < kSignPanels ? 1 : kSignPanels; }
  double* total(int64_t p) const { return scratch->total + (p - first) * rows * kPanelRows; }
  int64_t rows_at(int64_t m) const { return rows - m < kSignRows ? rows - m : kSignRows; }

  void add_groups(int64_t from, int64_t to) const {
    int64_t tables = 0, runs = 0;  // of a row
    for (int64_t g = from; g < to; ++g) {
      tables += group_tables(layout->columns_of(g));
      runs += group_runs(layout->columns_of(g));
    }
    const SignScratch& s = *scratch;
    for (int64_t m = 0; m < rows; m += kSignRows) {
      write_tables(*layout, q + m * stride, stride, rows_at(m), from, to, s.tables + m * tables,
                   s.start + m * runs);
    }
    for (int64_t p = first, count; p < last; p += count) {
      count = panels_at(p);
      write_words(*weight, *layout, weight->panels + p * layout->panel_bytes, count, from, to,
                  s.words, s.scale);
      for (int64_t m = 0; m < rows; m += kSignRows) {
        sign_tile_of(rows_at(m), count,
                     {layout, from, to, s.tables + m * tables, s.start + m * runs, s.words, s.scale,
                      s.sums, total(p) + m * count * kPanelRows});
      }
    }
  }

  // Results of rows [begin, end) of W.
  void store(const Output& out, const double* step, int64_t begin, int64_t end) const {
    for (int64_t p = first; p < last; ++p) {
      const int64_t tile = p - (p - first) % kSignPanels, row = p * kPanelRows;
      const int64_t start = panels_at(tile) == kSignPanels ? tile : p, count = panels_at(start);
      for (int64_t m = 0; m < rows; ++m) {
        to_panel_order(total(start) + (m * count + p - start) * kPanelRows,
                       scratch->result + m * kPanelRows);
      }
      const int64_t stop = row + kPanelRows;
      store_panel_rows(out, rows, step, row, row > begin ? row : begin, stop < end ? stop : end,
                       scratch->result);
    }
  }
};

// Bytes of scratch for blocks of `rows` rows; what is left after whole blocks of kMaxBlockRows may
// meet more groups at a time. Or those of tiles for shares of few rows.
int64_t sign_scratch_bytes(const PackedMatrix& w, int64_t rows) {
  const int64_t tiles = PanelRows(nullptr, w, rows, Mode::kInt8).used;
  int64_t most = tiles + panel_scratch_bytes(w, Mode::kInt8, rows);
  const int64_t least = rows < kMaxBlockRows ? rows : kLeastSignRows;
  for (int64_t r = least; r <= rows && r <= kMostSignRows + least; ++r) {
    const int64_t bytes = SignScratch(nullptr, w, r).used;
    most = bytes > most ? bytes : most;
  }
  return most;
}

// Few rows of W: x as the tiles that `vpdpbusd` wants.
void multiply_sign_tiles(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                         const Output& out, void* memory) {
  const SignRows x(const_cast<void*>(block.data), w, block.rows);
  const PanelRows tiles(memory, w, block.rows, Mode::kInt8);
  for (int64_t m = 0; m < block.rows; m += tiles.x_rows()) {
    const auto load = [&](int64_t i, int64_t b, __m512i* v) {
      *v = _mm512_loadu_si512(x.q + (m + i) * x.stride + b * kBlock);
    };
    for_step_groups(w, tiles.groups, [&](int64_t g, int64_t from, int64_t to) {
      prepare_step_groups(w, m, g, from, to, tiles, load);
    });
  }
  multiply_panel_order<1, false>(w, Mode::kInt8, {memory, block.step, block.rows}, begin, end, out,
                                 static_cast<char*>(memory) + tiles.used);
}

void multiply_signs(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                    const Output& out, void* memory) {
  if (end - begin < kLeastSignShare) {
    return multiply_sign_tiles(w, block, begin, end, out, memory);
  }
  const PanelLayout layout(w);
  const SignRows x(const_cast<void*>(block.data), w, block.rows);
  const SignScratch s(memory, w, block.rows);
  const int64_t all = ceil_div(end, kPanelRows);
  for (int64_t m = 0; m < block.rows; m += s.rows) {
    const int64_t rows = block.rows - m < s.rows ? block.rows - m : s.rows;
    Output own = out;
    own.row += m;
    for (int64_t p = begin / kPanelRows; p < all; p += s.panels) {
      const int64_t stop = all - p < s.panels ? all : p + s.panels;
      const SignBlock part{&w, &layout, &s, x.q + m * x.stride, x.stride, rows, p, stop};
      __builtin_memset(s.total, 0,
                       static_cast<size_t>((stop - p) * rows * kPanelRows) * sizeof(double));
      for (int64_t g = 0; g < layout.groups; g += s.groups) {
        part.add_groups(g, layout.groups - g < s.groups ? layout.groups : g + s.groups);
      }
      part.store(own, block.step + m, begin, end);
    }
  }
}

}  // namespace
}  // namespace pyrobust::matmul
