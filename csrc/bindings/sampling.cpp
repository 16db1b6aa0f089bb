// Python entry points of the sampling kernels.
#include "bindings/families.h"

namespace pyrobust {

void bind_sampling(pybind11::module_& m) { (void)m; }

}  // namespace pyrobust
