// The words of the CUDA runtime that is linked into the binary.
#pragma once

namespace personmae {

const char* cuda_error_name(int error);
const char* cuda_error_text(int error);
int cuda_version();  // 13000 is 13.0

}  // namespace personmae
