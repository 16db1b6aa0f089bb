// The loops without wide instructions: the reference.
#include "relaxation/loops.h"

namespace pyrobust {
namespace relaxation {

const RelaxationKernels kPortableKernels = {bend_of_row, unbend_image};

}  // namespace relaxation
}  // namespace pyrobust
