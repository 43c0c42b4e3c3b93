// The products for x86-64 with AVX2 and FMA.
#include "processor.h"
#include "product.h"

#ifdef MAMBA_EQX_X86
#include <immintrin.h>

// Compiled for these instructions whatever the rest is compiled for.
#define TARGET __attribute__((target("avx2,fma")))

namespace mamba_eqx {
namespace {

// Short rows confuse the processor's own prefetcher: without this, weights arrive at half the speed
// of memory. Requests beyond the end of the weights are harmless.
constexpr uintptr_t kAhead = 4096;

TARGET inline void prefetch(const void* p) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + kAhead), _MM_HINT_T0);
}

TARGET inline __m128i load_bytes(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}

TARGET inline float sum(__m256 v) {
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

// Adds one group's products of M rows of weights with R rows of x to `part`.
template <int M, int R>
TARGET inline void add_int8(const Product& p, int64_t i, int64_t row, int64_t g,
                            __m256 (&part)[M][R]) {
  const int8_t* w = static_cast<const int8_t*>(p.weight) + i * p.in + g * p.group;
  const float* x = p.x + row * p.in + g * p.group;
  for (int m = 0; m < M; ++m) prefetch(w + m * p.in);
  for (int64_t k = 0; k < p.group; k += 8) {
    for (int m = 0; m < M; ++m) {
      const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(w + m * p.in + k)));
      for (int r = 0; r < R; ++r)
        part[m][r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * p.in + k), part[m][r]);
    }
  }
}

template <int M, int R>
TARGET inline void add_int4(const Product& p, int64_t i, int64_t row, int64_t g,
                            __m256 (&part)[M][R]) {
  const int64_t half = p.group / 2;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + i * (p.in / 2) + g * half;
  const float* x = p.x + row * p.in + g * p.group;
  const __m256i low = _mm256_set1_epi32(15);
  for (int m = 0; m < M; ++m) prefetch(w + m * (p.in / 2));
  for (int64_t k = 0; k < half; k += 8) {
    for (int m = 0; m < M; ++m) {
      const __m256i v = _mm256_cvtepu8_epi32(load_bytes(w + m * (p.in / 2) + k));
      const __m256 a = _mm256_cvtepi32_ps(_mm256_and_si256(v, low));
      const __m256 b = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4));
      for (int r = 0; r < R; ++r) {
        const float* xr = x + r * p.in + k;
        part[m][r] = _mm256_fmadd_ps(a, _mm256_loadu_ps(xr), part[m][r]);
        part[m][r] = _mm256_fmadd_ps(b, _mm256_loadu_ps(xr + half), part[m][r]);
      }
    }
  }
}

// Computes M outputs of R rows. M * R accumulators of two kinds fit into the registers.
template <Kind kind, int M, int R>
TARGET inline void tile(const Product& p, int64_t i, int64_t row) {
  const int64_t groups = p.in / p.group;
  __m256 total[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) total[m][r] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256 part[M][R];
    for (int r = 0; r < R; ++r) {
      __m256 start = _mm256_setzero_ps();
      // The halves of a byte are 8 too large.
      if constexpr (kind == Kind::kInt4)
        start = _mm256_loadu_ps(p.x_sum + ((row + r) * groups + g) * kLanes);
      for (int m = 0; m < M; ++m) part[m][r] = start;
    }
    if constexpr (kind == Kind::kInt8)
      add_int8<M, R>(p, i, row, g, part);
    else
      add_int4<M, R>(p, i, row, g, part);
    for (int m = 0; m < M; ++m) {
      const __m256 scale = _mm256_broadcast_ss(p.scale + (i + m) * groups + g);
      for (int r = 0; r < R; ++r) total[m][r] = _mm256_fmadd_ps(part[m][r], scale, total[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) p.y[(row + r) * p.out + i + m] = sum(total[m][r]);
}

template <Kind kind, int M, int R>
TARGET inline void tiles(const Product& p, int64_t begin, int64_t end, int64_t row) {
  int64_t i = begin;
  for (; i + M <= end; i += M) tile<kind, M, R>(p, i, row);
  for (; i < end; ++i) tile<kind, 1, R>(p, i, row);
}

// One row of x is limited by memory, which is read fastest in order; 4-bit weights take so much
// computing that sharing the loads of x among several outputs is worth more.
template <Kind kind, int M>
TARGET inline void rows(const Product& p, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) tiles<kind, 1, 4>(p, begin, end, row);
  for (; row + 2 <= p.rows; row += 2) tiles<kind, 2, 2>(p, begin, end, row);
  for (; row < p.rows; ++row) tiles<kind, M, 1>(p, begin, end, row);
}

// The outputs that are computed together for one row of x.
constexpr int kInt8Outputs = 1;
constexpr int kInt4Outputs = 4;

}  // namespace

TARGET void product_avx2(const Product& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::kInt8)
    rows<Kind::kInt8, kInt8Outputs>(p, begin, end);
  else
    rows<Kind::kInt4, kInt4Outputs>(p, begin, end);
}

}  // namespace mamba_eqx
#endif
