// Differs from portable.cpp in working on tiles and in 512-bit registers with VNNI where that was
// written (avx512_int8.h: 8-bit activations, groups of whole blocks); the other formats take the
// code of avx2_paths.h, compiled with these wider flags.
#include "matmul/avx2_paths.h"
#include "matmul/avx512_int8.h"
#include "matmul/avx512_rows.h"

namespace pyrobust::matmul {
namespace {

bool is_wide(const PackedMatrix& w, Mode mode) { return path_of(w, mode) == Path::kIntegerBlocks; }

int64_t wide_prepared_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  return is_wide(w, mode) ? WideRows::bytes(w, rows) : prepared_bytes(w, mode, rows);
}

int64_t wide_scratch_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (!is_wide(w, mode)) return scratch_bytes(w, mode, rows);
  const int64_t prepare = blocks_of(w) * kBlock * 5 + 64;  // one row as floats and as bytes
  const int64_t multiply = WideScratch(nullptr, w, rows).used;
  return prepare > multiply ? prepare : multiply;
}

// quantize_activations() by vectors; division and conversion round alike.
void quantize_wide(const float* x, int64_t count, double step, int8_t* q) {
  const __m512d divisor = _mm512_set1_pd(step);
  int64_t k = 0;
  for (; step > 0.0 && k + 16 <= count; k += 16) {
    const __m512d low = _mm512_cvtps_pd(_mm256_loadu_ps(x + k));
    const __m512d high = _mm512_cvtps_pd(_mm256_loadu_ps(x + k + 8));
    const __m256i a = _mm512_cvtpd_epi32(_mm512_div_pd(low, divisor));
    const __m256i b = _mm512_cvtpd_epi32(_mm512_div_pd(high, divisor));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(both));
  }
  quantize_activations(x + k, count - k, step, q + k);
}

void wide_prepare(const PackedMatrix& w, Mode mode, const Activations& x, int64_t first,
                  int64_t rows, void* prepared, double* step, void* scratch) {
  if (!is_wide(w, mode)) return prepare(w, mode, x, first, rows, prepared, step, scratch);
  const WideRows out(prepared, w, rows);
  const int64_t columns = out.stride, groups = groups_of(w);
  auto* row = static_cast<float*>(scratch);
  auto* q = reinterpret_cast<int8_t*>(row + columns);
  uint8_t order[kBlock];
  for (int p = 0; p < kBlock; ++p) order[p] = static_cast<uint8_t>(wide_order(stored_bits(w), p));
  for (int64_t m = 0; m < rows; ++m) {
    load_row(x, first + m, w.cols, row);
    step[m] = activation_step(row, w.cols);
    quantize_wide(row, w.cols, step[m], q);
    for (int64_t k = w.cols; k < columns; ++k) q[k] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = g * w.group_size;
      const int64_t to = w.cols - from < w.group_size ? w.cols : from + w.group_size;
      int32_t sum = 0;
      for (int64_t k = from; k < to; ++k) sum += q[k];
      out.q_sum[m * groups + g] = sum;
    }
    int8_t* ordered = out.q + m * columns;
    for (int64_t b = 0; b < columns; b += kBlock) {
      for (int64_t p = 0; p < kBlock; ++p) ordered[b + p] = q[b + order[p]];
    }
  }
}

template <int kBits>
void multiply_wide_bits(const PackedMatrix& w, const Block& block, int64_t begin, int64_t end,
                        const Output& out, void* scratch) {
  if (w.codebook != nullptr) {
    multiply_wide<kBits, true>(w, block, begin, end, out, scratch);
  } else {
    multiply_wide<kBits, false>(w, block, begin, end, out, scratch);
  }
}

void wide_multiply(const PackedMatrix& w, Mode mode, const Block& block, int64_t begin, int64_t end,
                   const Output& out, void* scratch) {
  if (!is_wide(w, mode)) return multiply(w, mode, block, begin, end, out, scratch);
  switch (stored_bits(w)) {
    case 1:
      return multiply_wide_bits<1>(w, block, begin, end, out, scratch);
    case 2:
      return multiply_wide_bits<2>(w, block, begin, end, out, scratch);
    case 3:
      return multiply_wide_bits<3>(w, block, begin, end, out, scratch);
    case 4:
      return multiply_wide_bits<4>(w, block, begin, end, out, scratch);
    default:
      return multiply_wide<8, false>(w, block, begin, end, out, scratch);
  }
}

constexpr MatmulKernels kKernels = {wide_prepared_bytes,
                                    wide_scratch_bytes,
                                    wide_prepare,
                                    wide_multiply,
                                    decode_span<Avx512Codes>,
                                    add_span<Avx512Codes>,
                                    add_levels_span<Avx512Codes>,
                                    sparse_prepare,
                                    sparse_multiply,
                                    complex_order,
                                    complex_multiply,
                                    kWideTiles * kLanes};

}  // namespace

const MatmulKernels* avx512_kernels() { return &kKernels; }

}  // namespace pyrobust::matmul
