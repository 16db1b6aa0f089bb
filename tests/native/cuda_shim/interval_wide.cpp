// The product of warpgroups, as the host compiler sees it.
#include "interval/cuda_wide.cu"
