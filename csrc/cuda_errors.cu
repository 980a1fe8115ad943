#include <cuda_runtime.h>

#include "cuda_errors.h"

namespace personmae {

const char* cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int cuda_version() { return CUDART_VERSION; }

}  // namespace personmae
