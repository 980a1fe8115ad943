// gather_visible: the visible tokens of each image. scatter_visible, its gradient: the rows back in their places, zeros
// elsewhere. Both copy rows of bytes, so any dtype will do. kernels/personmae_kernels/gather_visible.py is their user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "visible_rows.h"
#ifdef PERSONMAE_CUDA
#include "on_cuda.h"
#endif

namespace {

using personmae::VisibleRows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What both operators and both devices have in common: checked arguments, the source's rows contiguous, room for the result.
struct Call {
  Tensor source, visible, target;
  bool wide_index;
  VisibleRows rows;
};

Call prepare(const Tensor& source, const char* name, const Tensor& visible, bool gather, int64_t num_tokens) {
  STD_TORCH_CHECK(source.dim() == 3, name, ": must have 3 dimensions, has ", source.dim());
  STD_TORCH_CHECK(visible.dim() == 2, "visible: must have 2 dimensions, has ", visible.dim());
  const bool wide_index = visible.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide_index || visible.scalar_type() == ScalarType::Int, "visible: int32 or int64 is needed");
  STD_TORCH_CHECK(visible.device() == source.device(), "visible: must be on the device of ", name);
  STD_TORCH_CHECK(visible.size(0) == source.size(0), "visible: ", visible.size(0), " images, but ", source.size(0), " in ",
                  name);
  STD_TORCH_CHECK(gather || visible.size(1) == source.size(1), "visible: ", visible.size(1), " tokens, but ", source.size(1),
                  " in ", name);
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens: not negative, got ", num_tokens);
  const int64_t num_images = visible.size(0), num_visible = visible.size(1), width = source.size(2);
  // The class token cut off (tokens[:, 1:]) leaves rows whole: only rows that are not are copied first.
  const Tensor from = width < 2 || source.stride(2) == 1 ? source : torch::stable::contiguous(source);
  const auto bytes = static_cast<int64_t>(from.element_size());
  return {from,
          torch::stable::contiguous(visible),
          torch::stable::new_empty(source, {num_images, gather ? num_visible : num_tokens, width}),
          wide_index,
          {num_images, num_tokens, num_visible, width * bytes, from.stride(0) * bytes, from.stride(1) * bytes}};
}

// A pass of its own before anything is written, so that no thread has to fail.
template <typename Index>
void check_range(const Index* visible, const VisibleRows& rows) {
  for (int64_t i = 0; i < rows.num_images * rows.num_visible; ++i)
    STD_TORCH_CHECK(0 <= visible[i] && visible[i] < rows.num_tokens, "visible: 0 to ", rows.num_tokens - 1, ", got ",
                    visible[i], " for image ", i / rows.num_visible);
}

// Images for one thread: about 32 KB, below that a thread costs more than it brings.
int64_t grain(int64_t num_rows, int64_t row_bytes) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, num_rows * row_bytes));
}

template <typename Index>
void gather_rows(const Call& call) {
  const VisibleRows& rows = call.rows;
  const auto* visible = static_cast<const Index*>(call.visible.const_data_ptr());
  const auto* from = static_cast<const char*>(call.source.const_data_ptr());
  auto* to = static_cast<char*>(call.target.mutable_data_ptr());
  check_range(visible, rows);
  if (call.target.numel() == 0) return;
  torch::stable::parallel_for(0, rows.num_images, grain(rows.num_visible, rows.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * rows.num_visible; i < end * rows.num_visible; ++i)
      std::memcpy(to + i * rows.row_bytes, from + i / rows.num_visible * rows.image_stride + visible[i] * rows.row_stride,
                  rows.row_bytes);
  });
}

template <typename Index>
void scatter_rows(const Call& call) {
  const VisibleRows& rows = call.rows;
  const auto* visible = static_cast<const Index*>(call.visible.const_data_ptr());
  const auto* from = static_cast<const char*>(call.source.const_data_ptr());
  auto* to = static_cast<char*>(call.target.mutable_data_ptr());
  check_range(visible, rows);
  if (call.target.numel() == 0) return;
  const int64_t image_bytes = rows.num_tokens * rows.row_bytes;
  torch::stable::parallel_for(0, rows.num_images, grain(rows.num_tokens, rows.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::memset(to + b * image_bytes, 0, image_bytes);
      for (int64_t v = 0; v < rows.num_visible; ++v)
        std::memcpy(to + b * image_bytes + visible[b * rows.num_visible + v] * rows.row_bytes,
                    from + b * rows.image_stride + v * rows.row_stride, rows.row_bytes);
    }
  });
}

// tokens [B, L, D] of any dtype, visible int32 or int64 [B, V] -> [B, V, D].
Tensor gather_visible(const Tensor& tokens, const Tensor& visible) {
  const Call call = prepare(tokens, "tokens", visible, true, tokens.dim() == 3 ? tokens.size(1) : 0);
  call.wide_index ? gather_rows<int64_t>(call) : gather_rows<int32_t>(call);
  return call.target;
}

// gradient [B, V, D] of any dtype, visible int32 or int64 [B, V], no token twice in an image -> [B, num_tokens, D].
Tensor scatter_visible(const Tensor& gradient, const Tensor& visible, int64_t num_tokens) {
  const Call call = prepare(gradient, "gradient", visible, false, num_tokens);
  call.wide_index ? scatter_rows<int64_t>(call) : scatter_rows<int32_t>(call);
  return call.target;
}

#ifdef PERSONMAE_CUDA
// The same on CUDA. The host cannot look at the indices without waiting: one that is out of range gives a row of NaN in
// gather_visible and is passed over in scatter_visible, and touches no memory that is not its own.
Tensor on_cuda(const Call& call, const char* name, decltype(&personmae::launch_gather_visible) launch) {
  if (call.target.numel() == 0) return call.target;
  const torch::stable::accelerator::DeviceGuard guard(call.source.get_device_index());
  personmae::check_launch(launch(call.source.const_data_ptr(), call.visible.const_data_ptr(), call.wide_index,
                                 call.target.mutable_data_ptr(), call.rows, personmae::current_stream(call.source)),
                          name);
  return call.target;
}

Tensor gather_visible_cuda(const Tensor& tokens, const Tensor& visible) {
  const Call call = prepare(tokens, "tokens", visible, true, tokens.dim() == 3 ? tokens.size(1) : 0);
  return on_cuda(call, "gather_visible", personmae::launch_gather_visible);
}

Tensor scatter_visible_cuda(const Tensor& gradient, const Tensor& visible, int64_t num_tokens) {
  const Call call = prepare(gradient, "gradient", visible, false, num_tokens);
  return on_cuda(call, "scatter_visible", personmae::launch_scatter_visible);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) {
  m.impl("gather_visible", TORCH_BOX(&gather_visible));
  m.impl("scatter_visible", TORCH_BOX(&scatter_visible));
}

#ifdef PERSONMAE_CUDA
STABLE_TORCH_LIBRARY_IMPL(personmae, CUDA, m) {
  m.impl("gather_visible", TORCH_BOX(&gather_visible_cuda));
  m.impl("scatter_visible", TORCH_BOX(&scatter_visible_cuda));
}
#endif
