// Python entry points of the matmul kernels.
#include "bindings/families.h"

namespace pyrobust {

void bind_matmul(pybind11::module_& m) { (void)m; }

}  // namespace pyrobust
