// The products of matrices with panels, for all processors.
#define LANES 4
#define TARGET
#define PANEL_PRODUCT panel_product_portable
#include "matmul_kernels.inc"
