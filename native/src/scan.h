// The interface of the kernels of the selective scan, of one sequence. Arrays have time first and
// channels last; the tokens are cut into chunks of equal length.
#pragma once

#include <cstdint>

namespace mamba_eqx {

// h_t = exp(dt_t * A) * h_{t-1} + B_t * (dt_t * x_t), y_t = sum(C_t * h_t)
struct Scan {
  int64_t chunks, chunk;  // the number of chunks, and of tokens in each
  int64_t d_inner, d_state;
  const float *x, *dt;         // (tokens, d_inner)
  const float *B, *C;          // (tokens, d_state)
  const float* A;              // (d_state, d_inner)
  const unsigned char* reset;  // (tokens), whether a token forgets everything before it; or null
};

struct ScanForward {
  Scan scan;
  const float* start;  // (d_state, d_inner), the state before the first token
  float* y;            // (tokens, d_inner)
  float* end;          // (d_state, d_inner), the state after the last token
  float* starts;       // (chunks, d_state, d_inner), the state before each chunk; or null
};

// The bars mark derivatives of a loss.
struct ScanReverse {
  Scan scan;
  const float* starts;  // as from the forward pass
  const float* y_bar;
  const float* end_bar;
  float *x_bar, *dt_bar, *A_bar, *start_bar;
  float *B_bar, *C_bar;  // (tokens, d_state), the sums over the channels of a call, which adds them
};

// Compute the channels begin <= i < end, where `begin` is a multiple of `kScanUnit`.
using ForwardKernel = void (*)(const ScanForward& s, int64_t begin, int64_t end);
using ReverseKernel = void (*)(const ScanReverse& s, int64_t begin, int64_t end);

void scan_forward_portable(const ScanForward& s, int64_t begin, int64_t end);
void scan_reverse_portable(const ScanReverse& s, int64_t begin, int64_t end);
void scan_forward_avx2(const ScanForward& s, int64_t begin, int64_t end);
void scan_reverse_avx2(const ScanReverse& s, int64_t begin, int64_t end);
void scan_forward_avx512(const ScanForward& s, int64_t begin, int64_t end);
void scan_reverse_avx512(const ScanReverse& s, int64_t begin, int64_t end);

// The channels that the widest kernel computes together.
inline constexpr int64_t kScanUnit = 64;

}  // namespace mamba_eqx
