// The interface of the kernels of matrix products whose right factor has few columns.
#pragma once

#include <cstdint>

namespace mamba_eqx {

// The most columns of a panel.
inline constexpr int64_t kPanel = 64;

// C = A B for a panel of the columns of B, of float32 or bfloat16, with sums in float32.
struct PanelProduct {
  bool is_bfloat16;
  int64_t rows, steps, columns;  // A is (rows, steps), B (steps, columns), C (rows, columns)
  const void* a;
  int64_t a_row, a_step;  // A(i, k) is a[i * a_row + k * a_step]
  const void* b;
  int64_t b_step, b_column;  // B(k, j) is b[k * b_step + j * b_column], and one of these is 1
  void* c;
  int64_t c_row;  // C(i, j) is c[i * c_row + j]
};

// Computes a product of at most kPanel columns.
using PanelKernel = void (*)(const PanelProduct& p);

void panel_product_portable(const PanelProduct& p);
void panel_product_avx2(const PanelProduct& p);
void panel_product_avx512(const PanelProduct& p);
void panel_product_avx512_bf16(const PanelProduct& p);

}  // namespace mamba_eqx
