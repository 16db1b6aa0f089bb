// Formats and types of x as template arguments of a launch: host code of the kernels that take
// every width without a codebook.
#pragma once

#include "matmul/cuda.h"
#include "matmul/cuda_decode.cuh"

namespace pyrobust {
namespace matmul {
namespace gpu {

template <Format kFormat>
struct FormatConstant {
  static constexpr Format kValue = kFormat;
};

// start(FormatConstant, type of x)
template <Format kFormat, class Start>
cuda::Status with_type(FloatType type, const Start& start) {
  return type == FloatType::kFloat16 ? start(FormatConstant<kFormat>{}, Float16{})
                                     : start(FormatConstant<kFormat>{}, BFloat16{});
}

template <class Start>
cuda::Status with_width(Format format, FloatType type, const Start& start) {
  switch (format) {
    case Format::k1:
      return with_type<Format::k1>(type, start);
    case Format::k2:
      return with_type<Format::k2>(type, start);
    case Format::k3:
      return with_type<Format::k3>(type, start);
    case Format::k4:
      return with_type<Format::k4>(type, start);
    default:
      return with_type<Format::k8>(type, start);
  }
}

}  // namespace gpu
}  // namespace matmul
}  // namespace pyrobust
