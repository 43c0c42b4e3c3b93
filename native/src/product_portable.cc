// The products for all processors, which compilers turn into vector instructions.
#include "product.h"

namespace mamba_eqx {

void product_portable(const Product& p, int64_t begin, int64_t end) {
  const int64_t groups = p.in / p.group;
  const int64_t half = p.group / 2;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t row = 0; row < p.rows; ++row) {
      float total[kLanes] = {};
      for (int64_t g = 0; g < groups; ++g) {
        const float* x = p.x + row * p.in + g * p.group;
        float part[kLanes] = {};
        if (p.kind == Kind::kInt8) {
          const int8_t* w = static_cast<const int8_t*>(p.weight) + i * p.in + g * p.group;
          for (int64_t k = 0; k < p.group; k += kLanes)
            for (int64_t lane = 0; lane < kLanes; ++lane)
              part[lane] += static_cast<float>(w[k + lane]) * x[k + lane];
        } else {
          const uint8_t* w = static_cast<const uint8_t*>(p.weight) + (i * p.in + g * p.group) / 2;
          for (int64_t k = 0; k < half; k += kLanes)
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              part[lane] += static_cast<float>((w[k + lane] & 15) - 8) * x[k + lane];
              part[lane] += static_cast<float>((w[k + lane] >> 4) - 8) * x[half + k + lane];
            }
        }
        const float scale = p.scale[i * groups + g];
        for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += scale * part[lane];
      }
      float sum = 0;
      for (float t : total) sum += t;
      p.y[row * p.out + i] = sum;
    }
  }
}

}  // namespace mamba_eqx
