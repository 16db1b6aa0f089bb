// Python entry points of the interval kernels.
#include "bindings/families.h"

namespace pyrobust {

void bind_interval(pybind11::module_& m) { (void)m; }

}  // namespace pyrobust
