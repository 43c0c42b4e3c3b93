// The products of rows with the weight of their group, and the sums of outer products over groups, as
// XLA calls them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ffi = xla::ffi;

namespace mamba_eqx {
namespace {

using Sizes = ffi::Buffer<ffi::S32>;
using Shape = ffi::AnyBuffer::Dimensions;

struct Group {
  int64_t index, first, count;  // the rows of a group
};

// Returns the groups, which end with the last row.
std::vector<Group> read_groups(const Sizes& sizes, int64_t rows) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (size_t i = 0; i < sizes.element_count(); ++i) {
    const int64_t count = std::clamp<int64_t>(sizes.typed_data()[i], 0, rows - first);
    groups.push_back({static_cast<int64_t>(i), first, count});
    first += count;
  }
  return groups;
}

ffi::Error unfit(const char* names, Shape first, Shape second, Shape third, Shape result) {
  return ffi::Error::InvalidArgument(std::string("The shapes or dtypes of ") + names +
                                     " and the result do not fit together: " + shown(first) + ", " +
                                     shown(second) + ", " + shown(third) + " and " + shown(result) +
                                     ".");
}

// Whether arrays are of one dtype for which there are kernels.
bool are_alike(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::DataType dtype = a.element_type();
  return (dtype == ffi::F32 || dtype == ffi::BF16) && b.element_type() == dtype &&
         y->element_type() == dtype;
}

// An array of numbers of `width` bytes.
struct Data {
  char* bytes;
  int64_t width;

  Data(void* data, ffi::DataType dtype)
      : bytes(static_cast<char*>(data)), width(dtype == ffi::F32 ? 4 : 2) {}
  char* operator+(int64_t offset) const { return bytes + offset * width; }
};

// Asks the system for large pages. XLA allocates a result anew for each call, and the system clears a
// page at its first use, which takes as long as the products if there are many small ones.
void prefer_large_pages([[maybe_unused]] const Data& data, [[maybe_unused]] int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data.bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + count * data.width) / kPage * kPage;
  // If the system has none, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Computes y = x W^T for every group if `axis` is 2, or y = x W if it is 1.
ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, Sizes sizes, ffi::AnyBuffer weight,
                   ffi::Result<ffi::AnyBuffer> y, int64_t axis) {
  const Kernels& kernels = best_kernels();
  if (kernels.error != nullptr)
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, kernels.error);
  const Shape xs = x.dimensions(), gs = sizes.dimensions(), ws = weight.dimensions(),
              ys = y->dimensions();
  bool fits = xs.size() == 2 && gs.size() == 1 && ws.size() == 3 && ys.size() == 2;
  fits = fits && (axis == 1 || axis == 2) && are_alike(x, weight, y);
  fits = fits && ws[0] == gs[0] && ws[axis] == xs[1] && ys[0] == xs[0] && ys[1] == ws[3 - axis];
  if (!fits) return unfit("`x`, `sizes`, `weight`", xs, gs, ws, ys);
  const int64_t rows = xs[0], steps = xs[1], columns = ys[1];
  const Data from(x.untyped_data(), x.element_type());
  const Data by(weight.untyped_data(), x.element_type());
  const Data to(y->untyped_data(), x.element_type());

  std::vector<Group> groups = read_groups(sizes, rows);
  const int64_t end = groups.empty() ? 0 : groups.back().first + groups.back().count;
  if (end < rows) std::memset(to + end * columns, 0, (rows - end) * columns * to.width);
  const auto is_empty = [](const Group& group) { return group.count == 0; };
  groups.erase(std::remove_if(groups.begin(), groups.end(), is_empty), groups.end());

  const int64_t panels = (columns + kPanel - 1) / kPanel;
  for_each_item(pool, static_cast<int64_t>(groups.size()) * panels, [&](int64_t i) {
    const Group& group = groups[i / panels];
    const int64_t first = i % panels * kPanel;
    const int64_t b_step = axis == 2 ? 1 : columns, b_column = axis == 2 ? steps : 1;
    kernels.panel_product({from.width == 2, group.count, steps, std::min(kPanel, columns - first),
                           from + group.first * steps, steps, 1,
                           by + (group.index * steps * columns + first * b_column), b_step, b_column,
                           to + (group.first * columns + first), columns});
  });
  return ffi::Error::Success();
}

// Computes W = a^T b for every group.
ffi::Error outer(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, Sizes sizes,
                 ffi::Result<ffi::AnyBuffer> y) {
  const Kernels& kernels = best_kernels();
  if (kernels.error != nullptr)
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, kernels.error);
  const Shape as = a.dimensions(), bs = b.dimensions(), gs = sizes.dimensions(),
              ys = y->dimensions();
  bool fits = as.size() == 2 && bs.size() == 2 && gs.size() == 1 && ys.size() == 3;
  fits = fits && are_alike(a, b, y) && as[0] == bs[0];
  fits = fits && ys[0] == gs[0] && ys[1] == as[1] && ys[2] == bs[1];
  if (!fits) return unfit("`a`, `b`, `sizes`", as, bs, gs, ys);
  const int64_t outputs = as[1], columns = bs[1];
  const Data left(a.untyped_data(), a.element_type());
  const Data right(b.untyped_data(), a.element_type());
  const Data to(y->untyped_data(), a.element_type());

  prefer_large_pages(to, y->element_count());

  const std::vector<Group> groups = read_groups(sizes, as[0]);
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  for_each_item(pool, static_cast<int64_t>(groups.size()) * panels, [&](int64_t i) {
    const Group& group = groups[i / panels];
    const int64_t first = i % panels * kPanel;
    kernels.panel_product({left.width == 2, outputs, group.count, std::min(kPanel, columns - first),
                           left + group.first * outputs, 1, outputs,
                           right + (group.first * columns + first), columns, 1,
                           to + (group.index * outputs * columns + first), columns});
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mamba_eqx

XLA_FFI_DEFINE_HANDLER_SYMBOL(mamba_eqx_native_grouped_product, mamba_eqx::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("axis"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mamba_eqx_native_grouped_outer, mamba_eqx::outer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
