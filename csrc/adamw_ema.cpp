// The multi-tensor AdamW step on CUDA: checks that keep the kernel within its tensors, and the launches.
// kernels/personmae_kernels/adamw_ema.py is its user; on a CPU the step is reference.adamw_ema_.
#ifdef PERSONMAE_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "adamw_tensors.h"
#include "on_cuda.h"

namespace {

using personmae::AdamwTensors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check_list(const Tensors& tensors, const char* name, const Tensors& parameters, bool may_be_empty) {
  if (may_be_empty && tensors.empty()) return;
  STD_TORCH_CHECK(tensors.size() == parameters.size(), name, ": ", tensors.size(), " tensors, but ", parameters.size(),
                  " in parameters");
}

// Returns the address of tensors[i], or null where the list is empty.
void* address(const Tensors& tensors, size_t i, const char* name, const Tensor& like, ScalarType dtype) {
  if (tensors.empty()) return nullptr;
  const Tensor& tensor = tensors[i];
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, "[", i, "]: wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == like.numel(), name, "[", i, "]: ", tensor.numel(), " elements, but ", like.numel(),
                  " in parameters[", i, "]");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name, "[", i,
                  "]: must be on the device of parameters[", i, "]");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, "[", i, "]: must be contiguous");
  return tensor.data_ptr();
}

// Shapes and dtypes: reference.adamw_ema_. All on one device, all contiguous.
void adamw_ema_(const Tensors& parameters, const Tensors& gradients, const Tensors& first_moments,
                const Tensors& second_moments, const Tensor& hyper, const std::vector<double>& weight_decays,
                const Tensors& averages, const Tensors& copies, const Tensors& average_copies) {
  STD_TORCH_CHECK(hyper.scalar_type() == ScalarType::Float && hyper.numel() == 8 && hyper.is_contiguous() && hyper.is_cuda(),
                  "hyper: contiguous float32 [8] on the device of the parameters is needed");
  check_list(gradients, "gradients", parameters, false);
  check_list(first_moments, "first_moments", parameters, false);
  check_list(second_moments, "second_moments", parameters, false);
  check_list(averages, "averages", parameters, true);
  check_list(copies, "copies", parameters, true);
  check_list(average_copies, "average_copies", parameters, true);
  STD_TORCH_CHECK(weight_decays.size() == parameters.size(), "weight_decays: ", weight_decays.size(), " values, but ",
                  parameters.size(), " tensors in parameters");
  STD_TORCH_CHECK(average_copies.empty() || !averages.empty(), "average_copies: need averages to be copies of");
  const torch::stable::accelerator::DeviceGuard guard(hyper.get_device_index());

  // Too large for comfort on a thread's stack.
  const auto tensors = std::make_unique<AdamwTensors>();
  const auto launch = [&] {
    if (tensors->num_tensors == 0) return;
    const auto* values = static_cast<const float*>(hyper.const_data_ptr());
    personmae::check_launch(personmae::launch_adamw_ema(*tensors, values, personmae::current_stream(hyper)), "adamw_ema_");
    tensors->num_tensors = 0;
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& like = parameters[i];
    const int64_t num_elements = like.numel();
    STD_TORCH_CHECK(like.is_cuda() && like.get_device_index() == hyper.get_device_index(), "parameters[", i,
                    "]: must be on the device of hyper");
    const int t = tensors->num_tensors;
    const bool half = gradients[i].scalar_type() == ScalarType::BFloat16;
    const auto get = [&](const Tensors& list, const char* name, ScalarType dtype) {
      return address(list, i, name, like, dtype);
    };
    tensors->parameter[t] = static_cast<float*>(get(parameters, "parameters", ScalarType::Float));
    tensors->gradient[t] = get(gradients, "gradients", half ? ScalarType::BFloat16 : ScalarType::Float);
    tensors->first_moment[t] = static_cast<float*>(get(first_moments, "first_moments", ScalarType::Float));
    tensors->second_moment[t] = static_cast<float*>(get(second_moments, "second_moments", ScalarType::Float));
    tensors->average[t] = static_cast<float*>(get(averages, "averages", ScalarType::Float));
    tensors->copy[t] = static_cast<uint16_t*>(get(copies, "copies", ScalarType::BFloat16));
    tensors->average_copy[t] = static_cast<uint16_t*>(get(average_copies, "average_copies", ScalarType::BFloat16));
    if (num_elements == 0) continue;
    tensors->num_elements[t] = num_elements;
    tensors->weight_decay[t] = static_cast<float>(weight_decays[i]);
    tensors->half_gradient[t] = half;
    const int64_t num_blocks = (num_elements + personmae::kBlockElements - 1) / personmae::kBlockElements;
    tensors->first_block[t + 1] = static_cast<int32_t>(tensors->first_block[t] + num_blocks);
    if (++tensors->num_tensors == personmae::kMaxTensors) launch();
  }
  launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CUDA, m) { m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_)); }
#endif
