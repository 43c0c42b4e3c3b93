// The selective scan as XLA calls it, with batch axes in front of all arrays.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mamba_eqx {
namespace {

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;
using Shape = ffi::AnyBuffer::Dimensions;

// The sizes of a call, and where the sequences of its arrays are.
struct Sizes {
  Shape batch;  // the sizes of the batch axes
  int64_t sequences = 1;
  int64_t chunks, chunk, d_inner, d_state;

  // `y` has all batch axes, and `A` is (d_state, d_inner).
  static bool read(Shape y, Shape A, Sizes* sizes) {
    if (y.size() < 3 || A.size() + 1 != y.size()) return false;
    const size_t axes = y.size() - 3;
    *sizes = {y.first(axes), 1, y[axes], y[axes + 1], y[axes + 2], A[axes]};
    for (int64_t size : sizes->batch) sizes->sequences *= size;
    return sizes->chunk > 0;
  }

  // Whether the last axes are `core`, and those before them the batch's or 1.
  bool fits(Shape shape, std::initializer_list<int64_t> core, bool may_repeat = true) const {
    if (shape.size() != batch.size() + core.size()) return false;
    if (!std::equal(core.begin(), core.end(), shape.begin() + batch.size())) return false;
    for (size_t axis = 0; axis < batch.size(); ++axis)
      if (shape[axis] != batch[axis] && !(may_repeat && shape[axis] == 1)) return false;
    return true;
  }

  // Returns the part of an array for a sequence, which those along an axis of size 1 share.
  template <typename T>
  T* part(T* data, Shape shape, int64_t sequence) const {
    int64_t stride = 1, offset = 0;
    for (size_t axis = batch.size(); axis < shape.size(); ++axis) stride *= shape[axis];
    for (size_t axis = batch.size(); axis-- > 0; sequence /= batch[axis]) {
      if (shape[axis] != 1) offset += sequence % batch[axis] * stride;
      stride *= shape[axis];
    }
    return data + offset;
  }
  const float* part(const Array& array, int64_t sequence) const {
    return part(array.typed_data(), array.dimensions(), sequence);
  }
  float* part(Result& array, int64_t sequence) const {
    return part(array->typed_data(), array->dimensions(), sequence);
  }
};

struct Inputs {
  const Array &x, &dt, &B, &C, &A;
  const ffi::Buffer<ffi::PRED>& reset;

  bool fit(const Sizes& s) const {
    const Shape shape = reset.dimensions();
    return s.fits(x.dimensions(), {s.chunks, s.chunk, s.d_inner}) &&
           s.fits(dt.dimensions(), {s.chunks, s.chunk, s.d_inner}) &&
           s.fits(B.dimensions(), {s.chunks, s.chunk, s.d_state}) &&
           s.fits(C.dimensions(), {s.chunks, s.chunk, s.d_state}) &&
           s.fits(A.dimensions(), {s.d_state, s.d_inner}) &&
           (s.fits(shape, {s.chunks, s.chunk}) || s.fits(shape, {0, s.chunk}));
  }

  Scan scan(const Sizes& s, int64_t sequence) const {
    // Without resets, their array is empty.
    const unsigned char* where = nullptr;
    if (reset.element_count() > 0)
      where = reinterpret_cast<const unsigned char*>(
          s.part(reset.typed_data(), reset.dimensions(), sequence));
    return {s.chunks,           s.chunk,
            s.d_inner,          s.d_state,
            s.part(x, sequence), s.part(dt, sequence),
            s.part(B, sequence), s.part(C, sequence),
            s.part(A, sequence), where};
  }

  ffi::Error error() const {
    std::string text = "The shapes of the arrays do not fit together. `x`, `dt`, `B`, `C` and `A` have ";
    for (const Array* array : {&x, &dt, &B, &C, &A}) text += shown(array->dimensions()) + ", ";
    return ffi::Error::InvalidArgument(text + "and `reset` " + shown(reset.dimensions()) + ".");
  }
};

int64_t units(const Sizes& s) { return (s.d_inner + kScanUnit - 1) / kScanUnit; }

ffi::Error forward(ffi::ThreadPool pool, Array x, Array dt, Array B, Array C, Array A,
                   ffi::Buffer<ffi::PRED> reset, Array start, Result y, Result end, Result starts) {
  const Kernels& kernels = best_kernels();
  if (kernels.error != nullptr)
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, kernels.error);
  const Inputs inputs{x, dt, B, C, A, reset};
  Sizes s;
  // Whoever does not need the states before the chunks asks for none of them.
  const bool fits =
      Sizes::read(y->dimensions(), A.dimensions(), &s) && inputs.fit(s) &&
      s.fits(start.dimensions(), {s.d_state, s.d_inner}) &&
      s.fits(end->dimensions(), {s.d_state, s.d_inner}, false) &&
      (s.fits(starts->dimensions(), {s.chunks, s.d_state, s.d_inner}, false) ||
       s.fits(starts->dimensions(), {0, s.d_state, s.d_inner}, false));
  if (!fits) return inputs.error();
  const bool keeps = starts->element_count() > 0;
  const int64_t n = units(s);
  for_each_item(pool, s.sequences * n, [&](int64_t i) {
    const int64_t k = i / n, begin = i % n * kScanUnit;
    const ScanForward f{inputs.scan(s, k), s.part(start, k), s.part(y, k), s.part(end, k),
                        keeps ? s.part(starts, k) : nullptr};
    kernels.scan_forward(f, begin, std::min(begin + kScanUnit, s.d_inner));
  });
  return ffi::Error::Success();
}

// B_bar and C_bar are sums over all channels. The channels are divided into a number of groups that
// does not depend on the threads, so that the results do not either: the first group writes its sums
// to B_bar and C_bar, and each other one to `rest`, from which they are added in order.
ffi::Error reverse(ffi::ThreadPool pool, Array x, Array dt, Array B, Array C, Array A,
                   ffi::Buffer<ffi::PRED> reset, Array starts, Array y_bar, Array end_bar,
                   Result x_bar, Result dt_bar, Result B_bar, Result C_bar, Result A_bar,
                   Result start_bar, Result rest) {
  const Kernels& kernels = best_kernels();
  if (kernels.error != nullptr)
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, kernels.error);
  const Inputs inputs{x, dt, B, C, A, reset};
  Sizes s;
  bool fits = Sizes::read(x_bar->dimensions(), A.dimensions(), &s) && inputs.fit(s) &&
              s.fits(starts.dimensions(), {s.chunks, s.d_state, s.d_inner}) &&
              s.fits(y_bar.dimensions(), {s.chunks, s.chunk, s.d_inner}) &&
              s.fits(end_bar.dimensions(), {s.d_state, s.d_inner}) &&
              s.fits(dt_bar->dimensions(), {s.chunks, s.chunk, s.d_inner}, false) &&
              s.fits(B_bar->dimensions(), {s.chunks, s.chunk, s.d_state}, false) &&
              s.fits(C_bar->dimensions(), {s.chunks, s.chunk, s.d_state}, false) &&
              s.fits(A_bar->dimensions(), {s.d_state, s.d_inner}, false) &&
              s.fits(start_bar->dimensions(), {s.d_state, s.d_inner}, false) &&
              rest->dimensions().size() == s.batch.size() + 5;
  if (!fits) return inputs.error();
  const int64_t others = rest->dimensions()[s.batch.size()];
  if (!s.fits(rest->dimensions(), {others, 2, s.chunks, s.chunk, s.d_state}, false))
    return inputs.error();

  const int64_t groups = others + 1, n = units(s), size = s.chunks * s.chunk * s.d_state;
  for_each_item(pool, s.sequences * groups, [&](int64_t i) {
    const int64_t k = i / groups, group = i % groups;
    float *B_sum = s.part(B_bar, k), *C_sum = s.part(C_bar, k);
    if (group > 0) {
      B_sum = s.part(rest, k) + (group - 1) * 2 * size;
      C_sum = B_sum + size;
    }
    std::fill_n(B_sum, size, 0.0f);
    std::fill_n(C_sum, size, 0.0f);
    const ScanReverse r{inputs.scan(s, k),  s.part(starts, k), s.part(y_bar, k),
                        s.part(end_bar, k), s.part(x_bar, k),  s.part(dt_bar, k),
                        s.part(A_bar, k),   s.part(start_bar, k), B_sum, C_sum};
    const int64_t begin = group * n / groups * kScanUnit;
    const int64_t end = (group + 1) * n / groups * kScanUnit;
    kernels.scan_reverse(r, begin, std::min(end, s.d_inner));
  });
  for_each_item(pool, others > 0 ? s.sequences : 0, [&](int64_t k) {
    const float* sums = s.part(rest, k);
    for (int64_t group = 0; group < others; ++group) {
      for (float* to : {s.part(B_bar, k), s.part(C_bar, k)}) {
        for (int64_t i = 0; i < size; ++i) to[i] += sums[i];
        sums += size;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mamba_eqx

#define ARRAY Arg<xla::ffi::Buffer<xla::ffi::F32>>()
#define INPUTS \
  Ctx<xla::ffi::ThreadPool>().ARRAY.ARRAY.ARRAY.ARRAY.ARRAY.Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
#define RESULT Ret<xla::ffi::Buffer<xla::ffi::F32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(mamba_eqx_native_selective_scan, mamba_eqx::forward,
                              xla::ffi::Ffi::Bind().INPUTS.ARRAY.RESULT.RESULT.RESULT);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mamba_eqx_native_selective_scan_reverse, mamba_eqx::reverse,
    xla::ffi::Ffi::Bind()
        .INPUTS.ARRAY.ARRAY.ARRAY.RESULT.RESULT.RESULT.RESULT.RESULT.RESULT.RESULT);
