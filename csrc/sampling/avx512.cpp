// Sixteen lanes, two tiles at a time: the sixteen octaves down to 2^-16 of tail probability by one
// in-register look-up, which covers all that needs no refinement; the rest (1 element in 2^13) is
// mended one by one afterwards.
#include <string.h>

#include "sampling/avx512_random.h"

namespace pyrobust {
namespace sampling {
namespace {

constexpr int kVectors = 2 * kWords;  // of a pair of tiles

inline __m512i magnitude_of(__m512i bits) {
  return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
}

inline __m512 with_sign_of(__m512 value, __m512i bits) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(value), bits, sign, 0x78));
}

// The mantissa of a float in [1, 2), less 1.5.
inline __m512 centred_mantissa(__m512i scaled) {
  const __m512i mantissa = _mm512_ternarylogic_epi32(scaled, _mm512_set1_epi32(0x007fffff),
                                                     _mm512_set1_epi32(0x3f800000), 0xea);
  return _mm512_sub_ps(_mm512_castsi512_ps(mantissa), _mm512_set1_ps(1.5f));
}

// The octaves from 2^-16 of tail probability on, in the order of the exponent's last four bits.
struct RotatedTable {
  alignas(64) float coefficient[kNormalDegree + 1][16];

  constexpr RotatedTable() : coefficient() {
    for (int k = 0; k <= kNormalDegree; ++k) {
      for (int octave = 48; octave < 64; ++octave) {
        coefficient[k][(octave - 32 + 127) & 15] = kNormalTable.coefficient[k][octave];
      }
    }
  }
};
constexpr RotatedTable kRotated;

// normal_from_bits.
struct NormalVector {
  __m512 coefficient[kNormalDegree + 1];

  NormalVector() {
    for (int k = 0; k <= kNormalDegree; ++k)
      coefficient[k] = _mm512_load_ps(kRotated.coefficient[k]);
  }

  __m512 operator()(__m512i bits) const {
    const __m512i scaled = _mm512_castps_si512(_mm512_cvtepi32_ps(magnitude_of(bits)));
    const __m512i index = _mm512_srli_epi32(scaled, 23);
    const __m512 s = centred_mantissa(scaled);
    __m512 value = _mm512_permutexvar_ps(index, coefficient[kNormalDegree]);
#pragma GCC unroll 5
    for (int k = kNormalDegree - 1; k >= 0; --k) {
      value = _mm512_fmadd_ps(value, s, _mm512_permutexvar_ps(index, coefficient[k]));
    }
    return with_sign_of(value, bits);
  }
};

// A distribution gives: purpose of its words; `value(x, bits)`; and which lanes that leaves open:
// those whose `open_key(bits)` is below kOpenBelow, closed one by one by `mend`.
struct Gaussian {
  static constexpr uint32_t kPurpose = kPurposeNormal, kOpenBelow = kNormalRefineBelow;
  NormalVector normal;
  __m512 scale;
  float scale_alone;

  explicit Gaussian(const NoiseRow& row)
      : scale(_mm512_set1_ps(row.scale)), scale_alone(row.scale) {}
  __m512i open_key(__m512i bits) const { return magnitude_of(bits); }
  __m512 value(__m512 x, __m512i bits) const {
    return _mm512_add_ps(x, _mm512_mul_ps(scale, normal(bits)));
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return x + scale_alone * normal_at(kNormalTable, stream, place, bits);
  }
};

struct Laplace {
  static constexpr uint32_t kPurpose = kPurposeLaplace, kOpenBelow = kNormalRefineBelow;
  __m512 scale;
  float scale_alone;

  explicit Laplace(const NoiseRow& row)
      : scale(_mm512_set1_ps(row.scale)), scale_alone(row.scale) {}
  __m512i open_key(__m512i bits) const { return magnitude_of(bits); }
  __m512 value(__m512 x, __m512i bits) const {
    const __m512i scaled = _mm512_castps_si512(_mm512_cvtepi32_ps(magnitude_of(bits)));
    const __m512 s = centred_mantissa(scaled);
    __m512 z = _mm512_set1_ps(kLaplaceTable.coefficient[kLaplaceDegree]);
#pragma GCC unroll 7
    for (int k = kLaplaceDegree - 1; k >= 0; --k) {
      z = _mm512_fmadd_ps(z, s, _mm512_set1_ps(kLaplaceTable.coefficient[k]));
    }
    const __m512i octaves =
        _mm512_sub_epi32(_mm512_set1_epi32(63 - 32 + 127), _mm512_srli_epi32(scaled, 23));
    z = _mm512_fmadd_ps(_mm512_cvtepi32_ps(octaves), _mm512_set1_ps(kLn2), z);
    return _mm512_add_ps(x, _mm512_mul_ps(scale, with_sign_of(z, bits)));
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return x + scale_alone * laplace_at(kLaplaceTable, stream, place, bits);
  }
};

struct Uniform {
  static constexpr uint32_t kPurpose = kPurposeUniform, kOpenBelow = 0;
  __m512 scale;

  explicit Uniform(const NoiseRow& row) : scale(_mm512_set1_ps(row.scale)) {}
  __m512i open_key(__m512i bits) const { return bits; }
  __m512 value(__m512 x, __m512i bits) const {
    const __m512 z = _mm512_mul_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(kUniformStep));
    return _mm512_add_ps(x, _mm512_mul_ps(scale, z));
  }
  float mend(const Stream&, Place, float x, uint32_t) const { return x; }  // never called
};

struct Keep {
  static constexpr uint32_t kPurpose = kPurposeKeep, kOpenBelow = 1;
  uint64_t threshold;
  __m512i high;
  __m512 fill;
  float fill_alone;

  explicit Keep(const KeepRow& row)
      : threshold(row.keep),
        high(_mm512_set1_epi32(static_cast<int>(row.keep >> 32))),
        fill(_mm512_set1_ps(row.fill)),
        fill_alone(row.fill) {}
  __m512i open_key(__m512i bits) const { return _mm512_xor_si512(bits, high); }
  __m512 value(__m512 x, __m512i bits) const {
    return _mm512_mask_mov_ps(fill, _mm512_cmplt_epu32_mask(bits, high), x);
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return keep_at(stream, place, threshold, bits) ? x : fill_alone;
  }
};

// bfloat16_from_float, in the low halves of 32-bit lanes.
inline __m512i bfloat16_vector(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
  return _mm512_srli_epi32(chosen, 16);
}

// 32 consecutive values.
template <FloatType kType>
inline void store_two(void* out, int64_t index, __m512 first, __m512 second) {
  if constexpr (kType == FloatType::kFloat32) {
    float* to = static_cast<float*>(out) + index;
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + 16, second);
  } else {
    uint16_t* to = static_cast<uint16_t*>(out) + index;
    if constexpr (kType == FloatType::kFloat16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16),
                          _mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i packed = _mm512_packus_epi32(bfloat16_vector(first), bfloat16_vector(second));
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, packed));
    }
  }
}

template <FloatType kType>
void* element_address(void* out, int64_t index) {
  return static_cast<char*>(out) + index * float_type_bytes(kType);
}

// Closes the open lanes of `count` elements from the first of `tile` on.
template <FloatType kType, class Noise>
__attribute__((noinline)) void mend_tiles(const Noise& noise, const RowKeys& keys,
                                          const Stream& stream, int64_t tile, int tiles,
                                          const float* x, void* out) {
  for (int t = 0; t < tiles; ++t) {
    __m512i words[kWords];
    random_words<1>(keys, tile + t, words);
    alignas(64) uint32_t bits[kTile];
    for (int word = 0; word < kWords; ++word) {
      _mm512_store_si512(bits + word * kLanes, words[word]);
      uint32_t open = _mm512_cmplt_epu32_mask(
          noise.open_key(words[word]), _mm512_set1_epi32(static_cast<int>(Noise::kOpenBelow)));
      for (; open != 0; open &= open - 1) {
        const int64_t i = word * kLanes + __builtin_ctz(open), at = t * kTile + i;
        const Place place = place_of(tile * kTile + at);
        store_float(out, at, kType, noise.mend(stream, place, x[at], bits[i]));
      }
    }
  }
}

template <FloatType kType, int kTiles, class Noise>
inline void noise_tiles(const Noise& noise, const RowKeys& keys, const Stream& stream, int64_t tile,
                        const float* x, void* out) {
  __m512i bits[kTiles * kWords];
  random_words<kTiles>(keys, tile, bits);
  __m512i least = _mm512_set1_epi32(-1);
#pragma GCC unroll 4
  for (int v = 0; v < kTiles * kWords; v += 2) {
    const __m512 first = noise.value(_mm512_loadu_ps(x + v * kLanes), bits[v]);
    const __m512 second = noise.value(_mm512_loadu_ps(x + (v + 1) * kLanes), bits[v + 1]);
    store_two<kType>(out, v * kLanes, first, second);
    if constexpr (Noise::kOpenBelow > 0) {
      least = _mm512_min_epu32(
          least, _mm512_min_epu32(noise.open_key(bits[v]), noise.open_key(bits[v + 1])));
    }
  }
  if constexpr (Noise::kOpenBelow > 0) {
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(Noise::kOpenBelow));
    if (__builtin_expect(_mm512_cmplt_epu32_mask(least, limit) != 0, 0)) {
      mend_tiles<kType>(noise, keys, stream, tile, kTiles, x, out);
    }
  }
}

template <FloatType kType, class Noise, class Row>
void float_row(const Row& row) {
  const Noise noise(row);
  const RowTiles& tiles = row.tiles;
  const RowKeys keys = row_keys(tiles.stream, Noise::kPurpose);
  const int64_t whole = tiles.elements / kTile;
  const int64_t end = tiles.end_tile < whole ? tiles.end_tile : whole;
  int64_t tile = tiles.begin_tile;
  for (; tile + 2 <= end; tile += 2) {
    noise_tiles<kType, 2>(noise, keys, tiles.stream, tile, row.x + tile * kTile,
                          element_address<kType>(row.out, tile * kTile));
  }
  if (tile < end) {
    noise_tiles<kType, 1>(noise, keys, tiles.stream, tile, row.x + tile * kTile,
                          element_address<kType>(row.out, tile * kTile));
    ++tile;
  }
  if (tile < tiles.end_tile) {  // the cut one, through buffers of full length
    float x[kTile] = {}, y[kTile];
    const int64_t count = tiles.elements - tile * kTile;
    memcpy(x, row.x + tile * kTile, count * sizeof(float));
    noise_tiles<kType, 1>(noise, keys, tiles.stream, tile, x, y);
    memcpy(element_address<kType>(row.out, tile * kTile), y, count * float_type_bytes(kType));
  }
}

template <class Noise, class Row>
void any_row(const Row& row) {
  if (row.out_type == FloatType::kFloat32) return float_row<FloatType::kFloat32, Noise>(row);
  if (row.out_type == FloatType::kFloat16) return float_row<FloatType::kFloat16, Noise>(row);
  float_row<FloatType::kBFloat16, Noise>(row);
}

// The rounded Gaussian. A lane is open where s z + 1/2 is within `margin` of an integer, or where z
// itself is.
struct Grid {
  NormalVector normal;
  __m512 scale, offset, width, levels, inverse;

  explicit Grid(const GridRow& row)
      : scale(_mm512_set1_ps(row.table.scale)),
        offset(_mm512_set1_ps(0.5f + row.margin)),
        width(_mm512_set1_ps(2.0f * row.margin)),
        levels(_mm512_set1_ps(row.levels)),
        inverse(_mm512_set1_ps(1.0f / row.levels)) {}

  __m512i round(__m512i bits, __mmask16* open) const {
    const __m512 shifted = _mm512_fmadd_ps(normal(bits), scale, offset);
    const __m512 rest = _mm512_reduce_ps(shifted, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512i small = _mm512_set1_epi32(static_cast<int>(0x80000000u - kNormalRefineBelow));
    *open = _mm512_cmp_ps_mask(rest, width, _CMP_LT_OQ) | _mm512_testn_epi32_mask(bits, small);
    return _mm512_cvt_roundps_epi32(shifted, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }

  // n / levels rounded once: a quotient by the rounded reciprocal, mended by its exact remainder.
  __m512 divided(__m512i n) const {
    const __m512 value = _mm512_cvtepi32_ps(n);
    const __m512 quotient = _mm512_mul_ps(value, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, levels, value), inverse, quotient);
  }
};

template <int kTiles>
inline void grid_tiles(const Grid& grid, const RowKeys& keys, const GridRow& row, int64_t tile,
                       const uint8_t* x, void* out) {
  __m512i bits[kTiles * kWords];
  random_words<kTiles>(keys, tile, bits);
  __mmask16 open[kTiles * kWords];
  uint32_t any = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kTiles * kWords; v += 2) {
    const __m512i first = grid.round(bits[v], open + v);
    const __m512i second = grid.round(bits[v + 1], open + v + 1);
    any |= open[v] | open[v + 1];
    const uint8_t* from = x + v * kLanes;
    if (row.integers) {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      const __m512i k = _mm512_permutexvar_epi64(order, _mm512_packs_epi32(first, second));
      const __m512i pixels =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      _mm512_storeu_si512(static_cast<int16_t*>(out) + v * kLanes, _mm512_add_epi16(pixels, k));
    } else {
      const __m128i* pixels = reinterpret_cast<const __m128i*>(from);
      const __m512 low =
          grid.divided(_mm512_add_epi32(first, _mm512_cvtepu8_epi32(_mm_loadu_si128(pixels))));
      const __m512 high =
          grid.divided(_mm512_add_epi32(second, _mm512_cvtepu8_epi32(_mm_loadu_si128(pixels + 1))));
      if (row.out_type == FloatType::kFloat32) {
        store_two<FloatType::kFloat32>(out, v * kLanes, low, high);
      } else if (row.out_type == FloatType::kFloat16) {
        store_two<FloatType::kFloat16>(out, v * kLanes, low, high);
      } else {
        store_two<FloatType::kBFloat16>(out, v * kLanes, low, high);
      }
    }
  }
  if (any == 0) return;
  GridRow at = row;
  at.out = out;
  alignas(64) uint32_t words[kTiles * kTile];
  for (int v = 0; v < kTiles * kWords; ++v) _mm512_store_si512(words + v * kLanes, bits[v]);
  for (int v = 0; v < kTiles * kWords; ++v) {
    for (uint32_t rest = open[v]; rest != 0; rest &= rest - 1) {
      const int64_t i = v * kLanes + __builtin_ctz(rest);
      const Place place = place_of(tile * kTile + i);
      store_grid(at, i, x[i] + grid_at(kNormalTable, row.tiles.stream, place, row.table, words[i]));
    }
  }
}

void grid_row(const GridRow& row) {
  const Grid grid(row);
  const RowTiles& tiles = row.tiles;
  const RowKeys keys = row_keys(tiles.stream, kPurposeNormal);
  const int64_t bytes = row.integers ? 2 : float_type_bytes(row.out_type);
  const int64_t whole = tiles.elements / kTile;
  const int64_t end = tiles.end_tile < whole ? tiles.end_tile : whole;
  char* out = static_cast<char*>(row.out);
  int64_t tile = tiles.begin_tile;
  for (; tile + 2 <= end; tile += 2) {
    grid_tiles<2>(grid, keys, row, tile, row.x + tile * kTile, out + tile * kTile * bytes);
  }
  for (; tile < end; ++tile) {
    grid_tiles<1>(grid, keys, row, tile, row.x + tile * kTile, out + tile * kTile * bytes);
  }
  if (tile < tiles.end_tile) {  // the cut one, through buffers of full length
    uint8_t x[kTile] = {};
    float y[kTile];
    const int64_t count = tiles.elements - tile * kTile;
    memcpy(x, row.x + tile * kTile, count);
    grid_tiles<1>(grid, keys, row, tile, x, y);
    memcpy(out + tile * kTile * bytes, y, count * bytes);
  }
}

void random_tile(const Stream& stream, uint32_t purpose, int64_t tile, uint32_t* out) {
  __m512i bits[kWords];
  random_words<1>(row_keys(stream, purpose), tile, bits);
  for (int word = 0; word < kWords; ++word) _mm512_storeu_si512(out + word * kLanes, bits[word]);
}

}  // namespace

const SamplingKernels kAvx512Kernels = {any_row<Gaussian, NoiseRow>,
                                        any_row<Uniform, NoiseRow>,
                                        any_row<Laplace, NoiseRow>,
                                        any_row<Keep, KeepRow>,
                                        grid_row,
                                        random_tile,
                                        nullptr};

}  // namespace sampling
}  // namespace pyrobust
