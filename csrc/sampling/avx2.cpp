// Eight lanes: Philox on 64-bit lanes that hold one 32-bit word each, the octaves above 2^-9 of
// tail probability by in-register table look-up, deeper ones (1 element in 256) one by one.
#include <immintrin.h>
#include <string.h>

#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

constexpr uint32_t kVectorFrom = 1u << 23;

struct TileBits {
  alignas(32) uint32_t bits[kTile];
};

// The state of eight consecutive counters: `even` holds counters 0, 2, 4, 6 and `odd` the others,
// one 32-bit word per 64-bit lane. The upper halves collect rubbish that no multiplication reads.
struct Eight {
  __m256i even[kWords];
  __m256i odd[kWords];
};

inline __m256i broadcast(uint32_t word) { return _mm256_set1_epi64x(word); }

inline __m256i high_product(__m256i product) { return _mm256_srli_epi64(product, 32); }

inline void philox_round(__m256i c[kWords], __m256i key0, __m256i key1) {
  const __m256i product0 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier0), c[0]);
  const __m256i product1 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier1), c[2]);
  c[0] = _mm256_xor_si256(high_product(product1), _mm256_xor_si256(c[1], key0));
  c[2] = _mm256_xor_si256(high_product(product0), _mm256_xor_si256(c[3], key1));
  c[1] = product1;
  c[3] = product0;
}

// The first two rounds: only word 0 differs between the counters of a tile, so half of each round
// is the same in every lane and done once, in scalar registers.
inline void first_rounds(const PhiloxWords& first, uint32_t key0, uint32_t key1, __m256i block,
                         __m256i c[kWords]) {
  const uint64_t uniform1 = static_cast<uint64_t>(kPhiloxMultiplier1) * first.word[2];
  const uint32_t second0 = static_cast<uint32_t>(uniform1 >> 32) ^ first.word[1] ^ key0;
  const uint64_t uniform0 = static_cast<uint64_t>(kPhiloxMultiplier0) * second0;
  const __m256i product0 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier0), block);
  const __m256i second2 = _mm256_xor_si256(high_product(product0), broadcast(first.word[3] ^ key1));
  const __m256i product1 = _mm256_mul_epu32(broadcast(kPhiloxMultiplier1), second2);
  const uint32_t next0 = static_cast<uint32_t>(uniform1) ^ (key0 + kPhiloxWeyl0);
  const uint32_t next2 = static_cast<uint32_t>(uniform0 >> 32) ^ (key1 + kPhiloxWeyl1);
  c[0] = _mm256_xor_si256(high_product(product1), broadcast(next0));
  c[1] = product1;
  c[2] = _mm256_xor_si256(product0, broadcast(next2));
  c[3] = broadcast(static_cast<uint32_t>(uniform0));
}

// The round keys from the third round on, ready to be used from memory.
struct KeySchedule {
  __m256i key0[kPhiloxRounds - 2];
  __m256i key1[kPhiloxRounds - 2];
};

KeySchedule schedule_keys(uint64_t seed) {
  KeySchedule keys;
  for (uint32_t round = 2; round < kPhiloxRounds; ++round) {
    keys.key0[round - 2] = broadcast(static_cast<uint32_t>(seed) + round * kPhiloxWeyl0);
    keys.key1[round - 2] = broadcast(static_cast<uint32_t>(seed >> 32) + round * kPhiloxWeyl1);
  }
  return keys;
}

// Eight counters from `block` on; word w goes to out[16 w .. 16 w + 7].
inline void random_eight(const Stream& stream, const KeySchedule& keys, const PhiloxWords& first,
                         uint32_t block, uint32_t* out) {
  const uint32_t key0 = static_cast<uint32_t>(stream.seed);
  const uint32_t key1 = static_cast<uint32_t>(stream.seed >> 32);
  const __m256i start = broadcast(block);
  Eight c;
  first_rounds(first, key0, key1, _mm256_add_epi64(start, _mm256_setr_epi64x(0, 2, 4, 6)), c.even);
  first_rounds(first, key0, key1, _mm256_add_epi64(start, _mm256_setr_epi64x(1, 3, 5, 7)), c.odd);
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds - 2; ++round) {
    philox_round(c.even, keys.key0[round], keys.key1[round]);
    philox_round(c.odd, keys.key0[round], keys.key1[round]);
  }
#pragma GCC unroll 4
  for (int word = 0; word < kWords; ++word) {
    const __m256i high = _mm256_slli_epi64(c.odd[word], 32);
    const __m256i lanes = _mm256_blend_epi32(c.even[word], high, 0b10101010);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + word * kLanes), lanes);
  }
}

void random_tile(const Stream& stream, const KeySchedule& keys, int64_t tile, TileBits& out) {
  const uint32_t block = static_cast<uint32_t>(tile * kLanes);
  const PhiloxWords first = stream_counter(stream, block, kPurposeNormal);
  random_eight(stream, keys, first, block, out.bits);
  random_eight(stream, keys, first, block + 8, out.bits + 8);
}

// The eight octaves that the vector path serves, in the order of the exponent's last three bits.
struct VectorTable {
  __m256 coefficient[kNormalDegree + 1];
};

VectorTable load_table() {
  VectorTable table;
  for (int k = 0; k <= kNormalDegree; ++k) {
    float rotated[8];
    for (int octave = 55; octave < 63; ++octave) {
      rotated[(octave - 32 + 127) & 7] = kNormalTable.coefficient[k][octave];
    }
    table.coefficient[k] = _mm256_loadu_ps(rotated);
  }
  return table;
}

// normal_from_bits for lanes whose magnitude is at least kVectorFrom.
__m256 normal_vector(const VectorTable& table, __m256i bits, __m256i magnitude) {
  const __m256i m = _mm256_min_epi32(magnitude, _mm256_set1_epi32(kNormalLargest));
  const __m256i scaled = _mm256_castps_si256(_mm256_cvtepi32_ps(m));
  const __m256i index = _mm256_srli_epi32(scaled, 23);
  const __m256i mantissa = _mm256_or_si256(_mm256_and_si256(scaled, _mm256_set1_epi32(0x007fffff)),
                                           _mm256_set1_epi32(0x3f800000));
  const __m256 s = _mm256_sub_ps(_mm256_castsi256_ps(mantissa), _mm256_set1_ps(1.5f));
  __m256 value = _mm256_permutevar8x32_ps(table.coefficient[kNormalDegree], index);
  for (int k = kNormalDegree - 1; k >= 0; --k) {
    value = _mm256_add_ps(_mm256_mul_ps(value, s),
                          _mm256_permutevar8x32_ps(table.coefficient[k], index));
  }
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  return _mm256_xor_ps(value, _mm256_castsi256_ps(sign));
}

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

float deep_normal(const Stream& stream, int64_t tile, const TileBits& random, int element) {
  const uint32_t bits = random.bits[element];
  if (!normal_needs_refinement(bits)) return normal_from_bits(kNormalTable, bits);
  const uint32_t block = static_cast<uint32_t>(tile * kLanes + element % kLanes);
  return refined_normal(kNormalTable, stream, block, element / kLanes, bits);
}

// out[0 .. 63] = x[0 .. 63] + sigma * z of one tile; the deep octaves follow one by one.
template <FloatType kType>
inline void gaussian_tile(const VectorTable& table, const KeySchedule& keys, const Stream& stream,
                          int64_t tile, const float* x, float sigma, void* out) {
  TileBits random;
  random_tile(stream, keys, tile, random);
  const __m256 scale = _mm256_set1_ps(sigma);
  uint64_t deep = 0;
  for (int i = 0; i < kTile; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(random.bits + i));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256 noise = _mm256_mul_ps(scale, normal_vector(table, bits, magnitude));
    store_vector<kType>(out, i, _mm256_add_ps(_mm256_loadu_ps(x + i), noise));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(kVectorFrom), magnitude);
    deep |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) << i;
  }
  for (; deep != 0; deep &= deep - 1) {
    const int i = __builtin_ctzll(deep);
    store_float(out, i, kType, x[i] + sigma * deep_normal(stream, tile, random, i));
  }
}

template <FloatType kType>
void gaussian_tiles(const GaussianRow& row) {
  const VectorTable table = load_table();
  const KeySchedule keys = schedule_keys(row.stream.seed);
  const int64_t bytes = float_type_bytes(kType), whole_tiles = row.elements / kTile;
  char* out = static_cast<char*>(row.out);
  int64_t tile = row.begin_tile;
  for (; tile < row.end_tile && tile < whole_tiles; ++tile) {
    gaussian_tile<kType>(table, keys, row.stream, tile, row.x + tile * kTile, row.sigma,
                         out + tile * kTile * bytes);
  }
  if (tile < row.end_tile) {  // the cut one, through buffers of full length
    float x[kTile] = {}, y[kTile];
    const int64_t count = row.elements - tile * kTile;
    memcpy(x, row.x + tile * kTile, count * sizeof(float));
    gaussian_tile<kType>(table, keys, row.stream, tile, x, row.sigma, y);
    memcpy(out + tile * kTile * bytes, y, count * bytes);
  }
}

void gaussian_row(const GaussianRow& row) {
  if (row.out_type == FloatType::kFloat32) return gaussian_tiles<FloatType::kFloat32>(row);
  if (row.out_type == FloatType::kFloat16) return gaussian_tiles<FloatType::kFloat16>(row);
  gaussian_tiles<FloatType::kBFloat16>(row);
}

}  // namespace

const SamplingKernels kAvx2Kernels = {gaussian_row, nullptr};

}  // namespace sampling
}  // namespace pyrobust
