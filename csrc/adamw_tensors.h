// What adamw_ema.cpp hands to adamw_ema.cu: the tensors of one launch, in the launch's own parameters, so that nothing is
// uploaded and a CUDA graph holds the addresses itself. Without torch's headers.
#pragma once

#include <cstdint>

namespace personmae {

constexpr int kMaxTensors = 400;          // what fits into the 32764 bytes that a launch may take
constexpr int64_t kBlockElements = 2048;  // of one tensor, for one block of threads

struct AdamwTensors {
  float* parameter[kMaxTensors];
  const void* gradient[kMaxTensors];  // float32 or bfloat16
  float* first_moment[kMaxTensors];
  float* second_moment[kMaxTensors];
  float* average[kMaxTensors];          // null where there is none, as the two that follow
  uint16_t* copy[kMaxTensors];          // bfloat16
  uint16_t* average_copy[kMaxTensors];  // bfloat16
  int64_t num_elements[kMaxTensors];
  float weight_decay[kMaxTensors];
  int32_t first_block[kMaxTensors + 1];
  bool half_gradient[kMaxTensors];  // the gradient is bfloat16
  int32_t num_tensors;
};

// hyper: float32 [8] on the device, as reference.ADAMW_HYPER names them. Returns a cudaError_t.
int launch_adamw_ema(const AdamwTensors& tensors, const float* hyper, void* stream);

}  // namespace personmae
