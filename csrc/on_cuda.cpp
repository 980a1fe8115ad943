// PyTorch's CUDA half is looked up when it is first needed: a binary that named it would not load in a PyTorch without CUDA.
#ifdef PERSONMAE_CUDA
#include "on_cuda.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda_errors.h"

namespace personmae {

namespace {

using CurrentStream = AOTITorchError (*)(int32_t, void**);

CurrentStream find_current_stream() {
  // Already in the process wherever a tensor lies on CUDA, but its symbols are not global.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

void* current_stream(const torch::stable::Tensor& tensor) {
  static const CurrentStream get = find_current_stream();
  STD_TORCH_CHECK(get != nullptr, "this PyTorch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, ": ", cuda_error_name(error), " (", cuda_error_text(error), "). It was built with CUDA ",
                  cuda_version() / 1000, ".", cuda_version() % 1000 / 10,
                  " for GPUs of compute capability 8.0 and newer, and",
                  " takes a driver made for that CUDA; PERSONMAE_OPERATORS=triton does without");
}

}  // namespace personmae
#endif
