// The interface of the kernels of products of a few float32 rows with a matrix of narrow weights.
#pragma once

#include <cstdint>

namespace mamba_eqx {

// How the weights of a row are stored.
enum class Kind {
  kInt8,  // int8
  kInt4,  // two in a byte: of each group, byte j holds value j + 8 in its lower half, and
          // value j + group / 2 + 8 in its upper half
};

// y = x @ (scale * weight).T
struct Product {
  Kind kind;
  const float* x;      // (rows, in)
  const float* x_sum;  // (rows, groups, kLanes): -8 times the sums of x per lane, for kInt4
  const void* weight;  // (out, in) or (out, in / 2) bytes
  const float* scale;  // (out, groups)
  float* y;            // (rows, out)
  int64_t rows, in, out;
  int64_t group;  // a multiple of kUnit that divides `in`
};

inline constexpr int64_t kLanes = 8;
inline constexpr int64_t kUnit = 32;

// Fills `x_sum` for `groups` groups of x.
void sum_of_lanes(const float* x, int64_t groups, int64_t group, float* x_sum);

// Computes the outputs begin <= i < end of all rows.
using ProductKernel = void (*)(const Product& p, int64_t begin, int64_t end);

void product_portable(const Product& p, int64_t begin, int64_t end);
void product_avx2(const Product& p, int64_t begin, int64_t end);

}  // namespace mamba_eqx
