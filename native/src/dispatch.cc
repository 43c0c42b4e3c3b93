#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "processor.h"

namespace mamba_eqx {
namespace {

using Vector = std::vector<float>;

constexpr Kernels kPortable = {"portable",            product_portable,       scan_forward_portable,
                               scan_reverse_portable, panel_product_portable, nullptr};

// Numbers that look random, from -1 to 1.
class Random {
 public:
  uint32_t bits() { return (seed_ = seed_ * 1664525 + 1013904223) >> 16; }
  float number() { return static_cast<float>(bits() % 201) / 100 - 1; }
  Vector numbers(int64_t count) {
    Vector numbers(count);
    for (float& value : numbers) value = number();
    return numbers;
  }

 private:
  uint32_t seed_ = 1;
};

bool is_close(const Vector& a, const Vector& b, float bound) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= bound)) return false;
  return true;
}

// Whether a kernel computes what the portable one does, for one and several rows of both kinds.
bool is_right(ProductKernel kernel) {
  constexpr int64_t rows = 7, in = 128, out = 9, group = 64, groups = in / group;
  Random random;
  const Vector x = random.numbers(rows * in);
  Vector x_sum(rows * groups * kLanes), scale(out * groups);
  std::vector<uint8_t> weight(out * in);
  for (float& value : scale) value = static_cast<float>(random.bits() % 99 + 1) / 100;
  for (uint8_t& value : weight) value = static_cast<uint8_t>(random.bits());
  sum_of_lanes(x.data(), rows * groups, group, x_sum.data());
  for (Kind kind : {Kind::kInt8, Kind::kInt4}) {
    for (int64_t used : {int64_t{1}, rows}) {
      Vector right(used * out), y(used * out);
      Product p{kind, x.data(), x_sum.data(), weight.data(), scale.data(), right.data(),
                used, in,       out,          group};
      product_portable(p, 0, out);
      p.y = y.data();
      kernel(p, 0, out);
      // The root mean square of y is about 300 for 8 bits, and 20 for 4 bits.
      if (!is_close(y, right, 0.01f)) return false;
    }
  }
  return true;
}

// Whether the kernels of the scan compute what the portable ones do, with a rest of every kind.
bool is_right(ForwardKernel forward, ReverseKernel reverse) {
  constexpr int64_t chunks = 2, chunk = 3, tokens = chunks * chunk, D = kScanUnit + 5, N = 19;
  Random random;
  const Vector x = random.numbers(tokens * D), B = random.numbers(tokens * N);
  const Vector C = random.numbers(tokens * N), start = random.numbers(N * D);
  const Vector y_bar = random.numbers(tokens * D), end_bar = random.numbers(N * D);
  Vector dt = random.numbers(tokens * D), A = random.numbers(N * D);
  for (float& value : dt) value = std::fabs(value);
  for (float& value : A) value = -3 * std::fabs(value);
  const unsigned char reset[tokens] = {0, 1, 0, 0, 1, 0};
  const Scan s{chunks, chunk, D, N, x.data(), dt.data(), B.data(), C.data(), A.data(), reset};

  auto results = [&](ForwardKernel forward, ReverseKernel reverse) {
    Vector y(tokens * D), end(N * D), starts(chunks * N * D);
    Vector x_bar(tokens * D), dt_bar(tokens * D), A_bar(N * D), start_bar(N * D);
    Vector B_bar(tokens * N), C_bar(tokens * N);
    const ScanForward f{s, start.data(), y.data(), end.data(), starts.data()};
    forward(f, 0, D);
    const ScanReverse r{s,
                        starts.data(),
                        y_bar.data(),
                        end_bar.data(),
                        x_bar.data(),
                        dt_bar.data(),
                        A_bar.data(),
                        start_bar.data(),
                        B_bar.data(),
                        C_bar.data()};
    reverse(r, 0, D);
    Vector all;
    for (const Vector* part : {&y, &end, &starts, &x_bar, &dt_bar, &A_bar, &start_bar, &B_bar, &C_bar})
      all.insert(all.end(), part->begin(), part->end());
    return all;
  };
  // The largest result is about 50.
  return is_close(results(forward, reverse), results(kPortable.scan_forward, kPortable.scan_reverse),
                  1e-3f);
}

// Whether a kernel of matrix products computes what the portable one does: of float32 and of
// bfloat16, with every order of the axes, and with rests of rows, steps and columns.
bool is_right(PanelKernel kernel) {
  constexpr int64_t rows = 8, steps = 38, columns = kPanel - 5;
  Random random;
  const Vector a = random.numbers(rows * steps), b = random.numbers(steps * columns);
  // The upper half of a float32 is a bfloat16.
  const auto halves = [](const Vector& numbers) {
    std::vector<uint16_t> halves(numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &numbers[i], sizeof bits);
      halves[i] = static_cast<uint16_t>(bits >> 16);
    }
    return halves;
  };
  const std::vector<uint16_t> a_halves = halves(a), b_halves = halves(b);

  const auto result = [&](PanelKernel kernel, PanelProduct p) {
    Vector c(rows * columns);
    std::vector<uint16_t> c_halves(rows * columns);
    p.c = c.data();
    if (p.is_bfloat16) p.a = a_halves.data(), p.b = b_halves.data(), p.c = c_halves.data();
    kernel(p);
    for (size_t i = 0; p.is_bfloat16 && i < c.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(c_halves[i]) << 16;
      std::memcpy(&c[i], &bits, sizeof bits);
    }
    return c;
  };
  for (bool is_bfloat16 : {false, true})
    for (bool steps_last_in_a : {false, true})
      for (bool steps_last_in_b : {false, true}) {
        PanelProduct p{is_bfloat16, rows, steps,   columns, a.data(), 1,
                       rows,        b.data(), columns, 1,       nullptr, columns};
        if (steps_last_in_a) p.a_row = steps, p.a_step = 1;
        if (steps_last_in_b) p.b_step = 1, p.b_column = steps;
        // The largest result is about 8, whose neighbours in bfloat16 are 1/16 away.
        const float bound = is_bfloat16 ? 0.1f : 1e-4f;
        if (!is_close(result(kernel, p), result(panel_product_portable, p), bound)) return false;
      }
  return true;
}

Kernels choose() {
  std::vector<Kernels> usable;
#ifdef MAMBA_EQX_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
    // Products with narrow weights are limited by memory, for which AVX2 is enough.
    usable.push_back({"avx512", product_avx2, scan_forward_avx512, scan_reverse_avx512,
                      has_bf16 ? panel_product_avx512_bf16 : panel_product_avx512, nullptr});
  }
  if (has_avx2)
    usable.push_back({"avx2", product_avx2, scan_forward_avx2, scan_reverse_avx2,
                      panel_product_avx2, nullptr});
#endif
  usable.push_back(kPortable);
  bool is_wrong = false;
  const char* wanted = std::getenv("MAMBA_EQX_NATIVE_ISA");
  for (const Kernels& kernels : usable) {
    if (wanted && *wanted && std::strcmp(wanted, kernels.name) != 0) continue;
    if (is_right(kernels.product) && is_right(kernels.scan_forward, kernels.scan_reverse) &&
        is_right(kernels.panel_product))
      return kernels;
    is_wrong = true;
  }
  Kernels none{};
  none.error =
      is_wrong ? "The kernels that the environment variable MAMBA_EQX_NATIVE_ISA names compute other "
                 "results on this processor than the portable ones. Unset the variable."
               : "The environment variable MAMBA_EQX_NATIVE_ISA must be avx512, avx2 or portable, and "
                 "name instructions that the processor has. Unset it to use the best ones.";
  return none;
}

}  // namespace

void sum_of_lanes(const float* x, int64_t groups, int64_t group, float* x_sum) {
  for (int64_t g = 0; g < groups; ++g) {
    float* lanes = x_sum + g * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = 0;
    for (int64_t k = 0; k < group; k += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] -= 8 * x[g * group + k + lane];
  }
}

const Kernels& best_kernels() {
  static const Kernels kernels = choose();
  return kernels;
}

}  // namespace mamba_eqx

// Returns the name of the instructions in use, or null if there are none.
extern "C" const char* mamba_eqx_native_isa() { return mamba_eqx::best_kernels().name; }

// Returns why there are none, or null if there are.
extern "C" const char* mamba_eqx_native_error() { return mamba_eqx::best_kernels().error; }
