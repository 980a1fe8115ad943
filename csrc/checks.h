// Checks at the boundary of an operator: they name the argument, what it is and what it has to be.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace personmae {

inline void check_tensor(const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType dtype,
                         int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": must have ", dim, " dimensions, has ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
}

}  // namespace personmae
