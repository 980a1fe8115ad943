// What gather_visible.cpp hands to gather_visible.cu: rows of bytes, whatever their dtype. Without torch's headers, so that
// nvcc takes seconds and any CUDA toolkit will do.
#pragma once

#include <cstdint>

namespace personmae {

// Rows of `row_bytes` bytes, contiguous each. strides in bytes.
struct VisibleRows {
  int64_t num_images;    // B
  int64_t num_tokens;    // L
  int64_t num_visible;   // V
  int64_t row_bytes;     // of one token
  int64_t image_stride;  // of the source, from image to image
  int64_t row_stride;    // of the source, from row to row
};

// visible: [B, V], contiguous, int64 where wide_index, else int32. Each returns a cudaError_t. target: contiguous.
int launch_gather_visible(const void* tokens, const void* visible, bool wide_index, void* target, const VisibleRows& rows,
                          void* stream);
int launch_scatter_visible(const void* gradient, const void* visible, bool wide_index, void* target, const VisibleRows& rows,
                           void* stream);

}  // namespace personmae
