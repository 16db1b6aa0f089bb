// Eight lanes: the octaves above 2^-9 of tail probability by in-register table look-up, deeper ones
// (1 element in 256) one by one afterwards.
#include <string.h>

#include "sampling/avx2_random.h"

namespace pyrobust {
namespace sampling {
namespace {

constexpr int kFirstOctaveExponent = 150;  // of magnitudes from 2^23 on

inline __m256i ones(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

inline __m256i magnitude_of(__m256i bits) { return _mm256_and_si256(bits, ones(0x7fffffffu)); }

inline uint32_t lanes_of(__m256i mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}

inline __m256 with_sign_of(__m256 value, __m256i bits) {
  return _mm256_xor_ps(value, _mm256_castsi256_ps(_mm256_and_si256(bits, ones(0x80000000u))));
}

// The mantissa of a float in [1, 2), less 1.5.
inline __m256 centred_mantissa(__m256i scaled) {
  const __m256i mantissa =
      _mm256_or_si256(_mm256_and_si256(scaled, ones(0x007fffffu)), ones(0x3f800000u));
  return _mm256_sub_ps(_mm256_castsi256_ps(mantissa), _mm256_set1_ps(1.5f));
}

// normal_from_bits where the float of the magnitude lies in [2^23, 2^31), by the last three bits of
// the exponent.
struct NormalVector {
  __m256 coefficient[kNormalDegree + 1];

  NormalVector() {
    for (int k = 0; k <= kNormalDegree; ++k) {
      float rotated[8];
      for (int octave = 55; octave < 63; ++octave) {
        rotated[(octave - 32 + 127) & 7] = kNormalTable.coefficient[k][octave];
      }
      coefficient[k] = _mm256_loadu_ps(rotated);
    }
  }

  __m256 operator()(__m256i bits, uint32_t* open) const {
    const __m256i scaled = _mm256_castps_si256(_mm256_cvtepi32_ps(magnitude_of(bits)));
    // Unsigned comparison: the exponent counted from the first, with the sign bit flipped.
    const uint32_t from_first = 0x80000000u - (static_cast<uint32_t>(kFirstOctaveExponent) << 23);
    *open = lanes_of(_mm256_cmpgt_epi32(_mm256_add_epi32(scaled, ones(from_first)),
                                        ones(0x80000000u + (8u << 23) - 1)));
    const __m256i index = _mm256_srli_epi32(scaled, 23);
    const __m256 s = centred_mantissa(scaled);
    __m256 value = _mm256_permutevar8x32_ps(coefficient[kNormalDegree], index);
#pragma GCC unroll 5
    for (int k = kNormalDegree - 1; k >= 0; --k) {
      value = _mm256_fmadd_ps(value, s, _mm256_permutevar8x32_ps(coefficient[k], index));
    }
    return with_sign_of(value, bits);
  }
};

// A distribution gives: purpose of its words; `value(x, bits, open)` with a mask of the lanes it
// leaves open; and `mend`, which closes one.
struct Gaussian {
  static constexpr uint32_t kPurpose = kPurposeNormal;
  NormalVector normal;
  float scale;

  explicit Gaussian(const NoiseRow& row) : scale(row.scale) {}
  __m256 value(__m256 x, __m256i bits, uint32_t* open) const {
    return _mm256_add_ps(x, _mm256_mul_ps(_mm256_set1_ps(scale), normal(bits, open)));
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return x + scale * normal_at(kNormalTable, stream, place, bits);
  }
};

struct Laplace {
  static constexpr uint32_t kPurpose = kPurposeLaplace;
  float scale;

  explicit Laplace(const NoiseRow& row) : scale(row.scale) {}
  __m256 value(__m256 x, __m256i bits, uint32_t* open) const {
    const __m256i m = magnitude_of(bits);
    *open = lanes_of(_mm256_cmpgt_epi32(ones(kNormalRefineBelow), m));
    const __m256i scaled = _mm256_castps_si256(_mm256_cvtepi32_ps(m));
    const __m256 s = centred_mantissa(scaled);
    __m256 z = _mm256_set1_ps(kLaplaceTable.coefficient[kLaplaceDegree]);
#pragma GCC unroll 7
    for (int k = kLaplaceDegree - 1; k >= 0; --k) {
      z = _mm256_fmadd_ps(z, s, _mm256_set1_ps(kLaplaceTable.coefficient[k]));
    }
    const __m256i octaves = _mm256_sub_epi32(ones(63 - 32 + 127), _mm256_srli_epi32(scaled, 23));
    z = _mm256_fmadd_ps(_mm256_cvtepi32_ps(octaves), _mm256_set1_ps(kLn2), z);
    return _mm256_add_ps(x, _mm256_mul_ps(_mm256_set1_ps(scale), with_sign_of(z, bits)));
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return x + scale * laplace_at(kLaplaceTable, stream, place, bits);
  }
};

struct Uniform {
  static constexpr uint32_t kPurpose = kPurposeUniform;
  float scale;

  explicit Uniform(const NoiseRow& row) : scale(row.scale) {}
  __m256 value(__m256 x, __m256i bits, uint32_t* open) const {
    *open = 0;
    const __m256 z = _mm256_mul_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(kUniformStep));
    return _mm256_add_ps(x, _mm256_mul_ps(_mm256_set1_ps(scale), z));
  }
  float mend(const Stream&, Place, float x, uint32_t) const { return x; }  // never called
};

struct Keep {
  static constexpr uint32_t kPurpose = kPurposeKeep;
  uint64_t threshold;
  float fill;

  explicit Keep(const KeepRow& row) : threshold(row.keep), fill(row.fill) {}
  __m256 value(__m256 x, __m256i bits, uint32_t* open) const {
    const uint32_t high = static_cast<uint32_t>(threshold >> 32);
    *open = lanes_of(_mm256_cmpeq_epi32(bits, ones(high)));
    const __m256i sign = ones(0x80000000u);  // unsigned comparison by signed
    const __m256i kept = _mm256_cmpgt_epi32(ones(high ^ 0x80000000u), _mm256_xor_si256(bits, sign));
    return _mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(kept));
  }
  float mend(const Stream& stream, Place place, float x, uint32_t bits) const {
    return keep_at(stream, place, threshold, bits) ? x : fill;
  }
};

__m128i bfloat16_vector(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  const __m256i chosen = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  const __m256i high = _mm256_srli_epi32(chosen, 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b00001000));
}

template <FloatType kType>
void store_vector(void* out, int64_t index, __m256 value) {
  if constexpr (kType == FloatType::kFloat32) {
    _mm256_storeu_ps(static_cast<float*>(out) + index, value);
  } else {
    const __m128i half = kType == FloatType::kFloat16
                             ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                             : bfloat16_vector(value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + index), half);
  }
}

template <FloatType kType, class Noise>
inline void noise_tile(const Noise& noise, const KeySchedule& keys, const Stream& stream,
                       int64_t tile, const float* x, void* out) {
  TileBits random;
  random_words(stream, keys, Noise::kPurpose, tile, random);
  uint64_t open = 0;
  for (int i = 0; i < kTile; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(random.bits + i));
    uint32_t lanes;
    store_vector<kType>(out, i, noise.value(_mm256_loadu_ps(x + i), bits, &lanes));
    open |= static_cast<uint64_t>(lanes) << i;
  }
  for (; open != 0; open &= open - 1) {
    const int i = __builtin_ctzll(open);
    const Place place = place_of(tile * kTile + i);
    store_float(out, i, kType, noise.mend(stream, place, x[i], random.bits[i]));
  }
}

template <FloatType kType, class Noise, class Row>
void float_row(const Row& row) {
  const Noise noise(row);
  const RowTiles& tiles = row.tiles;
  const KeySchedule keys = schedule_keys(tiles.stream.seed);
  const int64_t bytes = float_type_bytes(kType), whole_tiles = tiles.elements / kTile;
  char* out = static_cast<char*>(row.out);
  int64_t tile = tiles.begin_tile;
  for (; tile < tiles.end_tile && tile < whole_tiles; ++tile) {
    noise_tile<kType>(noise, keys, tiles.stream, tile, row.x + tile * kTile,
                      out + tile * kTile * bytes);
  }
  if (tile < tiles.end_tile) {  // the cut one, through buffers of full length
    float x[kTile] = {}, y[kTile];
    const int64_t count = tiles.elements - tile * kTile;
    memcpy(x, row.x + tile * kTile, count * sizeof(float));
    noise_tile<kType>(noise, keys, tiles.stream, tile, x, y);
    memcpy(out + tile * kTile * bytes, y, count * bytes);
  }
}

template <class Noise, class Row>
void any_row(const Row& row) {
  if (row.out_type == FloatType::kFloat32) return float_row<FloatType::kFloat32, Noise>(row);
  if (row.out_type == FloatType::kFloat16) return float_row<FloatType::kFloat16, Noise>(row);
  float_row<FloatType::kBFloat16, Noise>(row);
}

// The rounded Gaussian of one tile: k of every element, and the lanes whose float variate is too
// close to a rounding border, or missing.
inline uint64_t round_tile(const NormalVector& normal, const GridRow& row, const TileBits& random,
                           int32_t k[kTile]) {
  const __m256 scale = _mm256_set1_ps(row.table.scale);
  const __m256 offset = _mm256_set1_ps(0.5f + row.margin);
  const __m256 width = _mm256_set1_ps(2.0f * row.margin);
  uint64_t open = 0;
  for (int i = 0; i < kTile; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(random.bits + i));
    uint32_t lanes;
    const __m256 shifted = _mm256_fmadd_ps(normal(bits, &lanes), scale, offset);
    const __m256 below = _mm256_floor_ps(shifted);
    const __m256 close = _mm256_cmp_ps(_mm256_sub_ps(shifted, below), width, _CMP_LT_OQ);
    lanes |= lanes_of(_mm256_castps_si256(close));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(k + i), _mm256_cvttps_epi32(below));
    open |= static_cast<uint64_t>(lanes) << i;
  }
  return open;
}

void grid_row(const GridRow& row) {
  const NormalVector normal;
  const RowTiles& tiles = row.tiles;
  const KeySchedule keys = schedule_keys(tiles.stream.seed);
  TileBits random;
  int32_t k[kTile];
  for (int64_t tile = tiles.begin_tile; tile < tiles.end_tile; ++tile) {
    random_words(tiles.stream, keys, kPurposeNormal, tile, random);
    const int64_t begin = tile * kTile;
    for (uint64_t open = round_tile(normal, row, random, k); open != 0; open &= open - 1) {
      const int i = __builtin_ctzll(open);
      k[i] = grid_at(kNormalTable, tiles.stream, place_of(begin + i), row.table, random.bits[i]);
    }
    const int64_t count = tiles.elements - begin < kTile ? tiles.elements - begin : kTile;
    for (int64_t i = 0; i < count; ++i) store_grid(row, begin + i, row.x[begin + i] + k[i]);
  }
}

void random_tile(const Stream& stream, uint32_t purpose, int64_t tile, uint32_t* out) {
  TileBits random;
  random_words(stream, schedule_keys(stream.seed), purpose, tile, random);
  memcpy(out, random.bits, sizeof(random.bits));
}

}  // namespace

const SamplingKernels kAvx2Kernels = {any_row<Gaussian, NoiseRow>,
                                      any_row<Uniform, NoiseRow>,
                                      any_row<Laplace, NoiseRow>,
                                      any_row<Keep, KeepRow>,
                                      grid_row,
                                      random_tile,
                                      nullptr};

}  // namespace sampling
}  // namespace pyrobust
