// One step of AdamW, of the moving average and of the bfloat16 copies, for many tensors at once; reference.adamw_ema_ has
// the formula. Each number is read and written once: 28 bytes a parameter with float32 gradients, 40 with average and
// copies.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "adamw_tensors.h"

namespace personmae {
namespace {

constexpr int kThreads = 256;
static_assert(sizeof(AdamwTensors) + sizeof(float*) <= 32764, "more than the parameters of a launch may take");

struct Hyper {  // in the order of reference.ADAMW_HYPER
  float learning_rate, beta1, beta2, eps, correction1, correction2, gradient_scale, ema_momentum;
};

struct Element {
  float p, m, v;
};

__device__ Element step(Element old, float gradient, float kept, const Hyper& h) {
  const float g = h.gradient_scale * gradient;
  Element now;
  now.m = h.beta1 * old.m + (1.0f - h.beta1) * g;
  now.v = h.beta2 * old.v + (1.0f - h.beta2) * (g * g);
  now.p = old.p * kept - h.learning_rate * (now.m / h.correction1) / (sqrtf(now.v / h.correction2) + h.eps);
  return now;
}

__device__ float widened(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ uint32_t rounded(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ uint2 rounded(float4 values) {
  return make_uint2(rounded(values.x) | rounded(values.y) << 16, rounded(values.z) | rounded(values.w) << 16);
}
__device__ float lerp(float average, float p, float momentum) { return momentum * average + (1.0f - momentum) * p; }

__device__ bool aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ AdamwTensors tensors, const float* __restrict__ hyper) {
  // The last tensor that begins at or before this block; every thread looks at the same entries.
  int low = 0, high = tensors.num_tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tensors.first_block[middle] <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle - 1;
  }
  const int t = low;
  const Hyper h{hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6], hyper[7]};
  const float kept = 1.0f - h.learning_rate * tensors.weight_decay[t];
  float* parameter = tensors.parameter[t];
  const void* gradient = tensors.gradient[t];
  const bool half = tensors.half_gradient[t];
  float *first = tensors.first_moment[t], *second = tensors.second_moment[t], *average = tensors.average[t];
  uint16_t *copy = tensors.copy[t], *average_copy = tensors.average_copy[t];
  const bool wide = aligned(parameter, 16) && aligned(gradient, half ? 8 : 16) && aligned(first, 16) &&
                    aligned(second, 16) && aligned(average, 16) && aligned(copy, 8) && aligned(average_copy, 8);

  const int64_t start = (static_cast<int64_t>(blockIdx.x) - tensors.first_block[t]) * kBlockElements;
  const int64_t end = min(start + kBlockElements, tensors.num_elements[t]);
  for (int64_t i = start + 4 * threadIdx.x; i < end; i += 4 * kThreads) {
    if (wide && i + 4 <= end) {
      float4 p = *reinterpret_cast<float4*>(parameter + i), m = *reinterpret_cast<float4*>(first + i);
      float4 v = *reinterpret_cast<float4*>(second + i), g, e{};
      // All loads come before the first store, which the compiler must take for a write to any of them.
      if (average) e = *reinterpret_cast<float4*>(average + i);
      if (half) {
        const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(gradient) + i);
        g = make_float4(widened(bits.x), widened(bits.x >> 16), widened(bits.y), widened(bits.y >> 16));
      } else {
        g = *reinterpret_cast<const float4*>(static_cast<const float*>(gradient) + i);
      }
      const Element a = step({p.x, m.x, v.x}, g.x, kept, h), b = step({p.y, m.y, v.y}, g.y, kept, h);
      const Element c = step({p.z, m.z, v.z}, g.z, kept, h), d = step({p.w, m.w, v.w}, g.w, kept, h);
      p = make_float4(a.p, b.p, c.p, d.p);
      *reinterpret_cast<float4*>(parameter + i) = p;
      *reinterpret_cast<float4*>(first + i) = make_float4(a.m, b.m, c.m, d.m);
      *reinterpret_cast<float4*>(second + i) = make_float4(a.v, b.v, c.v, d.v);
      if (copy) *reinterpret_cast<uint2*>(copy + i) = rounded(p);
      if (average) {
        const float k = h.ema_momentum;
        e = make_float4(lerp(e.x, p.x, k), lerp(e.y, p.y, k), lerp(e.z, p.z, k), lerp(e.w, p.w, k));
        *reinterpret_cast<float4*>(average + i) = e;
        if (average_copy) *reinterpret_cast<uint2*>(average_copy + i) = rounded(e);
      }
      continue;
    }
    for (int64_t j = i; j < min(i + 4, end); ++j) {
      const float g = half ? widened(static_cast<const uint16_t*>(gradient)[j]) : static_cast<const float*>(gradient)[j];
      const Element now = step({parameter[j], first[j], second[j]}, g, kept, h);
      parameter[j] = now.p;
      first[j] = now.m;
      second[j] = now.v;
      if (copy) copy[j] = static_cast<uint16_t>(rounded(now.p));
      if (average) {
        const float e = lerp(average[j], now.p, h.ema_momentum);
        average[j] = e;
        if (average_copy) average_copy[j] = static_cast<uint16_t>(rounded(e));
      }
    }
  }
}

}  // namespace

int launch_adamw_ema(const AdamwTensors& tensors, const float* hyper, void* stream) {
  const auto blocks = static_cast<unsigned>(tensors.first_block[tensors.num_tensors]);
  adamw_ema_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(tensors, hyper);
  return cudaGetLastError();
}

}  // namespace personmae
