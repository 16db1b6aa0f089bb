// Eight lanes: Philox on 64-bit lanes that hold one 32-bit word each, the octaves above 2^-9 of
// tail probability by in-register table look-up, deeper ones (1 element in 256) one by one.
#include <immintrin.h>

#include "sampling/kernels.h"

namespace pyrobust {
namespace sampling {
namespace {

constexpr int kChains = 4;  // vectors of four counters: one tile
constexpr uint32_t kVectorFrom = 1u << 23;

struct TileBits {
  alignas(32) uint32_t bits[kTile];
};

// The words of the 16 counters of one tile. Chain 2h + p holds the counters 8h + p, 8h + p + 2, ...
// so that the odd chain, shifted up by one word, blends with the even one into eight lanes in
// order.
void random_tile(const Stream& stream, int64_t tile, TileBits& out) {
  const PhiloxWords first =
      stream_counter(stream, static_cast<uint32_t>(tile * kLanes), kPurposeNormal);
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  __m256i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  for (int chain = 0; chain < kChains; ++chain) {
    const int start = chain / 2 * 8 + chain % 2;
    c0[chain] = _mm256_add_epi32(_mm256_set1_epi64x(first.word[0]),
                                 _mm256_setr_epi64x(start, start + 2, start + 4, start + 6));
    c1[chain] = _mm256_set1_epi64x(first.word[1]);
    c2[chain] = _mm256_set1_epi64x(first.word[2]);
    c3[chain] = _mm256_set1_epi64x(first.word[3]);
  }
  uint32_t key0 = static_cast<uint32_t>(stream.seed);
  uint32_t key1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
    for (int chain = 0; chain < kChains; ++chain) {
      // The upper halves collect rubbish that no multiplication reads.
      const __m256i product0 = _mm256_mul_epu32(multiplier0, c0[chain]);
      const __m256i product1 = _mm256_mul_epu32(multiplier1, c2[chain]);
      const __m256i high0 = _mm256_srli_epi64(product0, 32);
      const __m256i high1 = _mm256_srli_epi64(product1, 32);
      c0[chain] = _mm256_xor_si256(_mm256_xor_si256(high1, c1[chain]), k0);
      c2[chain] = _mm256_xor_si256(_mm256_xor_si256(high0, c3[chain]), k1);
      c1[chain] = product1;
      c3[chain] = product0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  for (int half = 0; half < 2; ++half) {
    const int even = 2 * half, odd = even + 1;
    const __m256i low[kWords] = {c0[even], c1[even], c2[even], c3[even]};
    const __m256i high[kWords] = {c0[odd], c1[odd], c2[odd], c3[odd]};
    for (int word = 0; word < kWords; ++word) {
      const __m256i lanes =
          _mm256_blend_epi32(low[word], _mm256_slli_epi64(high[word], 32), 0b10101010);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.bits + word * kLanes + half * 8), lanes);
    }
  }
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

// The deep octaves of a tile, one by one: bit e of `deep` stands for element e.
void finish_deep(const Stream& stream, int64_t tile, const TileBits& random, uint64_t deep,
                 float* z) {
  for (; deep != 0; deep &= deep - 1) {
    const int element = __builtin_ctzll(deep);
    const uint32_t bits = random.bits[element];
    const uint32_t block = static_cast<uint32_t>(tile * kLanes + element % kLanes);
    z[element] = normal_needs_refinement(bits)
                     ? refined_normal(kNormalTable, stream, block, element / kLanes, bits)
                     : normal_from_bits(kNormalTable, bits);
  }
}

void normal_tile(const VectorTable& table, const Stream& stream, int64_t tile, float* z) {
  TileBits random;
  random_tile(stream, tile, random);
  uint64_t deep = 0;
  for (int i = 0; i < kTile; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(random.bits + i));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    _mm256_store_ps(z + i, normal_vector(table, bits, magnitude));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(kVectorFrom), magnitude);
    deep |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) << i;
  }
  if (deep != 0) finish_deep(stream, tile, random, deep, z);
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

template <FloatType kType>
void gaussian_tiles(const GaussianRow& row) {
  const VectorTable table = load_table();
  const __m256 sigma = _mm256_set1_ps(row.sigma);
  alignas(32) float z[kTile];
  for (int64_t tile = row.begin_tile; tile < row.end_tile; ++tile) {
    normal_tile(table, row.stream, tile, z);
    const int64_t begin = tile * kTile;
    const int64_t count = row.elements - begin < kTile ? row.elements - begin : kTile;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256 noise = _mm256_mul_ps(sigma, _mm256_load_ps(z + i));
      store_vector<kType>(row.out, begin + i,
                          _mm256_add_ps(_mm256_loadu_ps(row.x + begin + i), noise));
    }
    for (; i < count; ++i) {
      store_float(row.out, begin + i, kType, row.x[begin + i] + row.sigma * z[i]);
    }
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
