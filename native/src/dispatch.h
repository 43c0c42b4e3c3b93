// The choice of the kernels for the processor.
#pragma once

#include "matmul.h"
#include "product.h"
#include "scan.h"

namespace mamba_eqx {

struct Kernels {
  const char* name;
  ProductKernel product;
  ForwardKernel scan_forward;
  ReverseKernel scan_reverse;
  PanelKernel panel_product;
  const char* error;  // why there are no kernels, or null
};

// Returns the kernels for this processor. They are checked against the portable ones before their
// first use. The environment variable MAMBA_EQX_NATIVE_ISA may name others; if those do not exist,
// the processor lacks their instructions, or they fail the check, all but `error` are null.
const Kernels& best_kernels();

}  // namespace mamba_eqx
