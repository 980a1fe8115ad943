// Launching on the stream that PyTorch works on, and saying what went wrong.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace personmae {

// PyTorch's current stream (a cudaStream_t) on the tensor's device, which has to be the current device.
void* current_stream(const torch::stable::Tensor& tensor);

// Raises an error that names the operator and the cudaError_t, unless that is cudaSuccess.
void check_launch(int error, const char* name);

}  // namespace personmae
