// Compiles every header of csrc/core as device code; a header that uses the host only fails here.
#include "core/activation_int8.h"
#include "core/bit_layout.h"
#include "core/choice.h"
#include "core/float_types.h"
#include "core/fused.h"
#include "core/grid_normal.h"
#include "core/keep.h"
#include "core/laplace.h"
#include "core/normal.h"
#include "core/philox.h"
#include "core/rounding.h"
#include "core/uniform.h"

namespace pyrobust {

__global__ void noise(const NormalTable* table, uint64_t key, float* out) {
  const uint32_t element = blockIdx.x * blockDim.x + threadIdx.x;
  const PhiloxWords words = philox4x32({{element, 0, 0, 0}}, key);
  out[element] = normal_needs_refinement(words.word[0])
                     ? normal_refined(*table, words.word[0], words.word[1])
                     : normal_from_bits(*table, words.word[0]);
}

__global__ void other_noise(const NormalTable* normal, const LaplaceTable* laplace, GridTable grid,
                            const uint32_t* u, float* out, int32_t* k, bool* kept) {
  const uint32_t bits = u[0];
  out[0] = uniform_from_bits(bits);
  out[1] = normal_needs_refinement(bits) ? laplace_refined(*laplace, bits, u[1])
                                         : laplace_from_bits(*laplace, bits);
  out[2] = fused_emulated(out[0], out[1], out[1]);
  k[0] = grid_with_sign(grid_magnitude(grid, u, kGridWords, grid_guess(grid, *normal, bits)), bits);
  k[1] = choice_needs_more(7, bits) ? choice_refined(7, bits, u[1]) : choice_from_bits(7, bits);
  kept[0] =
      keep_needs_more(u[2], bits) ? keep_refined(u[2], bits, u[1]) : keep_from_bits(u[2], bits);
}

__global__ void codes(const uint8_t* row, int64_t cols, int levels, uint8_t* unpacked,
                      uint8_t* packed) {
  decode_codes(row, 0, cols, levels, unpacked);
  encode_codes(unpacked, cols, levels, packed);
  packed[packed_row_bytes(cols, levels)] = static_cast<uint8_t>(get_code(row, 0, levels));
}

__global__ void activations(const float* x, int64_t count, int8_t* q) {
  quantize_activations(x, count, activation_step(x, count), q);
}

__global__ void halves(const void* in, void* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = load_float(in, i, FloatType::kBFloat16);
    store_float(out, i, FloatType::kFloat16, value);
  }
}

__global__ void outward(const float* a, const float* b, float* low, float* high, double* gamma) {
  using namespace rounding;
  const int i = threadIdx.x;
  low[i] = fma_down(a[i], b[i], sub_down(a[i], mul_down(a[i], add_down(a[i], b[i]))));
  high[i] = fma_up(a[i], b[i], sub_up(a[i], mul_up(a[i], add_up(a[i], b[i]))));
  high[i] = above(high[i]) + to_float_up(gamma_bound(i));
  low[i] = below(low[i]) + to_float_down(gamma_bound(i));
  *gamma = two_sum(a[i], b[i], gamma);
}

}  // namespace pyrobust
