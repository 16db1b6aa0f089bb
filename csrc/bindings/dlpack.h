// The published DLPack ABI (major version 1), as far as it is used here.
#pragma once

#include <cstdint>

namespace pyrobust {

struct DLDevice {
  int32_t type;
  int32_t id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
// What a capsule of the name "dltensor" points to: whoever takes the tensor calls `deleter` once.
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
};
static_assert(sizeof(DLTensor) == 48 && sizeof(DLManagedTensor) == 64, "DLPack ABI");

constexpr int kDeviceCpu = 1;
constexpr int kCodeInt = 0, kCodeUInt = 1, kCodeFloat = 2, kCodeBFloat = 4, kCodeBool = 6;

}  // namespace pyrobust
