// The kernels around a library's interval products, as the host compiler sees them.
#include "interval/cuda_library.cu"
