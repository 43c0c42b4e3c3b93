// The product as XLA calls it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mamba_eqx {
namespace {

// A block of outputs is small enough that threads finish together, and large enough that the counter
// costs nothing. Its weights stay in the cache while several rows of x pass.
constexpr int64_t kBlockBytes = 32768;
constexpr int64_t kBlockUnit = 16;  // the outputs in a cache line, which no two threads share

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                   ffi::Buffer<ffi::F32> scale, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const Kernels& kernels = best_kernels();
  if (kernels.error != nullptr)
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, kernels.error);
  const bool is_int4 = weight.element_type() == ffi::U8;
  if (!is_int4 && weight.element_type() != ffi::S8)
    return ffi::Error::InvalidArgument("`weight` must be int8 or uint8.");
  const auto xs = x.dimensions(), ws = weight.dimensions(), ss = scale.dimensions(),
             ys = y->dimensions();
  bool fits = xs.size() == 2 && ws.size() == 2 && ss.size() == 2 && ys.size() == 2;
  fits = fits && xs[1] == ws[1] * (is_int4 ? 2 : 1) && ss[0] == ws[0] && ys[0] == xs[0] &&
         ys[1] == ws[0] && ss[1] > 0 && xs[1] > 0 && xs[1] % (ss[1] * kUnit) == 0;
  if (!fits)
    return ffi::Error::InvalidArgument(
        "The shapes of `x`, `weight`, `scale` and the result do not fit together: " + shown(xs) +
        ", " + shown(ws) + ", " + shown(ss) + " and " + shown(ys) + ".");
  const int64_t rows = xs[0], in = xs[1], out = ws[0];
  if (rows == 0 || out == 0) return ffi::Error::Success();

  Product p{is_int4 ? Kind::kInt4 : Kind::kInt8,
            x.typed_data(),
            nullptr,
            weight.untyped_data(),
            scale.typed_data(),
            y->typed_data(),
            rows,
            in,
            out,
            in / ss[1]};
  std::vector<float> x_sum;
  if (is_int4) {
    x_sum.resize(rows * ss[1] * kLanes);
    sum_of_lanes(p.x, rows * ss[1], p.group, x_sum.data());
    p.x_sum = x_sum.data();
  }
  const int64_t row_bytes = std::max<int64_t>(ws[1], 1);
  const int64_t units = (kBlockBytes / row_bytes + kBlockUnit - 1) / kBlockUnit;
  const int64_t block = std::max<int64_t>(units, 1) * kBlockUnit;
  for_each_item(pool, (out + block - 1) / block, [&](int64_t b) {
    kernels.product(p, b * block, std::min((b + 1) * block, out));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mamba_eqx

XLA_FFI_DEFINE_HANDLER_SYMBOL(mamba_eqx_native_product, mamba_eqx::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
