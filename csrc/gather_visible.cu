// The visible tokens of each image, and back: rows of bytes, copied in the widest words that all addresses allow.
#include <cuda_runtime.h>

#include <algorithm>

#include "visible_rows.h"

namespace personmae {
namespace {

constexpr int kLanes = 16;         // threads that copy one row: 256 bytes at a time in 16-byte words
constexpr int kRowsPerBlock = 16;  // rows in flight in a block
constexpr int kThreads = kLanes * kRowsPerBlock;
constexpr int kSlots = 64;  // target rows that a block of scatter_visible owns
constexpr int64_t kMaxBlocks = 8192;

// All bits set are a NaN in every floating format: what an index out of range gives, since the host cannot be told.
template <typename Word>
__device__ Word all_ones() {
  return static_cast<Word>(~Word{0});
}
template <>
__device__ uint4 all_ones<uint4>() {
  return make_uint4(~0u, ~0u, ~0u, ~0u);
}

// tokens: [B, L] rows. visible: [B, V]. target: [B, V] rows.
template <typename Word, typename Index>
__global__ void __launch_bounds__(kThreads) gather_kernel(const char* __restrict__ tokens, const Index* __restrict__ visible,
                                                          char* __restrict__ target, VisibleRows rows) {
  const int64_t num_rows = rows.num_images * rows.num_visible;
  const int64_t num_words = rows.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t first = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y, step = int64_t{gridDim.x} * kRowsPerBlock;
  for (int64_t row = first; row < num_rows; row += step) {
    const int64_t token = visible[row];
    Word* to = reinterpret_cast<Word*>(target + row * rows.row_bytes);
    if (token < 0 || token >= rows.num_tokens) {
      for (int64_t i = threadIdx.x; i < num_words; i += kLanes) to[i] = all_ones<Word>();
      continue;
    }
    const char* image = tokens + row / rows.num_visible * rows.image_stride;
    const auto* from = reinterpret_cast<const Word*>(image + token * rows.row_stride);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < num_words; i += kLanes) to[i] = from[i];
  }
}

// A block owns kSlots target rows of one image: it notes which visible row goes into each, then writes each once, zeros
// where none does. The result does not depend on the order of threads: should a token stand twice in `visible`, its last row
// wins, as on the CPU.
//
// gradient: [B, V] rows. visible: [B, V]. target: [B, L] rows.
template <typename Word, typename Index>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const char* __restrict__ gradient, const Index* __restrict__ visible, char* __restrict__ target,
                   VisibleRows rows) {
  __shared__ int source[kSlots];
  const int64_t num_words = rows.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t parts = (rows.num_tokens + kSlots - 1) / kSlots;
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  for (int64_t part = blockIdx.x; part < rows.num_images * parts; part += gridDim.x) {
    const int64_t image = part / parts, first = part % parts * kSlots;
    const int num_slots = static_cast<int>(min(int64_t{kSlots}, rows.num_tokens - first));
    for (int slot = thread; slot < num_slots; slot += kThreads) source[slot] = -1;
    __syncthreads();
    for (int v = thread; v < rows.num_visible; v += kThreads) {
      const int64_t slot = visible[image * rows.num_visible + v] - first;
      if (slot >= 0 && slot < num_slots) atomicMax(&source[slot], v);
    }
    __syncthreads();
    for (int slot = threadIdx.y; slot < num_slots; slot += kRowsPerBlock) {
      Word* to = reinterpret_cast<Word*>(target + (image * rows.num_tokens + first + slot) * rows.row_bytes);
      if (source[slot] < 0) {
        for (int64_t i = threadIdx.x; i < num_words; i += kLanes) to[i] = Word{};
        continue;
      }
      const auto* from =
          reinterpret_cast<const Word*>(gradient + image * rows.image_stride + source[slot] * rows.row_stride);
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < num_words; i += kLanes) to[i] = from[i];
    }
    __syncthreads();
  }
}

template <typename Word, typename Index>
void launch(bool gather, const void* source, const void* visible, void* target, const VisibleRows& rows, void* stream) {
  const dim3 threads(kLanes, kRowsPerBlock);
  const int64_t wanted = gather ? (rows.num_images * rows.num_visible + kRowsPerBlock - 1) / kRowsPerBlock
                                : rows.num_images * ((rows.num_tokens + kSlots - 1) / kSlots);
  const auto blocks = static_cast<unsigned>(std::min(wanted, kMaxBlocks));
  const auto* from = static_cast<const char*>(source);
  const auto* index = static_cast<const Index*>(visible);
  auto* to = static_cast<char*>(target);
  if (gather)
    gather_kernel<Word, Index><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(from, index, to, rows);
  else
    scatter_kernel<Word, Index><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(from, index, to, rows);
}

int launch_any(bool gather, const void* source, const void* visible, bool wide_index, void* target, const VisibleRows& rows,
               void* stream) {
  const auto bits = reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target) |
                    static_cast<uintptr_t>(rows.row_bytes | rows.image_stride | rows.row_stride);
  const auto go = [&](auto word, auto index) {
    launch<decltype(word), decltype(index)>(gather, source, visible, target, rows, stream);
  };
  const auto with_index = [&](auto word) { wide_index ? go(word, int64_t{}) : go(word, int32_t{}); };
  if (bits % 16 == 0)
    with_index(uint4{});
  else if (bits % 4 == 0)
    with_index(uint32_t{});
  else if (bits % 2 == 0)
    with_index(uint16_t{});
  else
    with_index(uint8_t{});
  return cudaGetLastError();
}

}  // namespace

int launch_gather_visible(const void* tokens, const void* visible, bool wide_index, void* target, const VisibleRows& rows,
                          void* stream) {
  return launch_any(true, tokens, visible, wide_index, target, rows, stream);
}

int launch_scatter_visible(const void* gradient, const void* visible, bool wide_index, void* target, const VisibleRows& rows,
                           void* stream) {
  return launch_any(false, gradient, visible, wide_index, target, rows, stream);
}

}  // namespace personmae
