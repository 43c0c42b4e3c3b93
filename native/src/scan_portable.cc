// The selective scan for all processors.
#define LANES 4
#define TARGET
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define FORWARD scan_forward_portable
#define REVERSE scan_reverse_portable
#include "scan_kernels.inc"
