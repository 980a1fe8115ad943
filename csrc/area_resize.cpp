// Shrinks a box of an image by averaging over the footprint of each output pixel: what OpenCV calls INTER_AREA, in its
// order of additions and so equal to it to the bit, in a fraction of its time. OpenCV goes through a row channel by
// channel, and again for each output row that it touches; here a pixel is one vector, and a row is shrunk once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"

// The same source for processors with and without AVX2; neither fuses products and sums.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define PERSONMAE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define PERSONMAE_CLONES
#endif
#define PERSONMAE_INLINE inline __attribute__((always_inline))

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A pixel: red, green, blue and whatever comes next. GCC and Clang make of it what the processor has.
typedef float Pixel __attribute__((vector_size(16)));

// One source cell of one output cell, and its weight; the cells of an output cell stand together.
struct Tap {
  int64_t source, target;
  float weight;
};

// The cells under each output cell along one axis, as OpenCV has them: parts of less than a thousandth count as nothing.
std::vector<Tap> find_taps(int64_t source_size, int64_t target_size) {
  const double scale = static_cast<double>(source_size) / static_cast<double>(target_size);
  std::vector<Tap> taps;
  taps.reserve(2 * source_size);
  for (int64_t target = 0; target < target_size; ++target) {
    const double begin = static_cast<double>(target) * scale, end = begin + scale;
    const double width = std::min(scale, static_cast<double>(source_size) - begin);
    const int64_t last = std::min(static_cast<int64_t>(std::floor(end)), source_size - 1);
    const int64_t first = std::min(static_cast<int64_t>(std::ceil(begin)), last);
    if (static_cast<double>(first) - begin > 1e-3)
      taps.push_back({first - 1, target, static_cast<float>((static_cast<double>(first) - begin) / width)});
    for (int64_t source = first; source < last; ++source)
      taps.push_back({source, target, static_cast<float>(1.0 / width)});
    const double rest = end - static_cast<double>(last);
    if (rest > 1e-3) taps.push_back({last, target, static_cast<float>(std::min(std::min(rest, 1.0), width) / width)});
  }
  return taps;
}

// The taps of a row as a table: as many for each output cell, the missing ones of weight 0, which add nothing.
struct Columns {
  int64_t num_taps = 0;          // of each output cell
  std::vector<int32_t> sources;  // [width * num_taps]
  std::vector<float> weights;    // [width * num_taps]
};

Columns to_table(const std::vector<Tap>& taps, int64_t width) {
  std::vector<int64_t> counts(width, 0);
  for (const Tap& tap : taps) ++counts[tap.target];
  Columns table;
  table.num_taps = *std::max_element(counts.begin(), counts.end());
  table.sources.assign(width * table.num_taps, 0);
  table.weights.assign(width * table.num_taps, 0.0f);
  std::fill(counts.begin(), counts.end(), 0);
  for (const Tap& tap : taps) {
    const int64_t place = tap.target * table.num_taps + counts[tap.target]++;
    table.sources[place] = static_cast<int32_t>(tap.source);
    table.weights[place] = tap.weight;
  }
  return table;
}

// Levels of 0 to 255 to the nearest whole ones, halves to even: behind this addend a float has no bits for fractions.
// bytes: room for 4 * width. is_last: of the image, behind which there is no byte to write to.
PERSONMAE_INLINE void write_row(const float* sums, int64_t width, uint8_t* bytes, uint8_t* out, bool is_last) {
  for (int64_t i = 0; i < 4 * width; ++i) {
    const float shifted = sums[i] + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bytes[i] = static_cast<uint8_t>(bits);
  }
  const int64_t num = width - (is_last ? 1 : 0);
  for (int64_t x = 0; x < num; ++x) std::memcpy(out + 3 * x, bytes + 4 * x, 4);
  if (is_last) std::memcpy(out + 3 * num, bytes + 4 * num, 3);
}

// kTaps: as many as there are, known to the compiler; 0 for any number.
template <int kTaps>
PERSONMAE_INLINE void shrink_row(const float* wide, const Columns& columns, int64_t width, float* row) {
  const int64_t num_taps = kTaps ? kTaps : columns.num_taps;
  const int32_t* sources = columns.sources.data();
  const float* weights = columns.weights.data();
  for (int64_t x = 0; x < width; ++x, sources += num_taps, weights += num_taps) {
    Pixel sum{};
    for (int64_t k = 0; k < num_taps; ++k) {
      Pixel pixel;
      std::memcpy(&pixel, wide + 3 * sources[k], sizeof pixel);
      sum += pixel * weights[k];
    }
    std::memcpy(row + 4 * x, &sum, sizeof sum);
  }
}

PERSONMAE_CLONES void shrink(const uint8_t* source, int64_t stride, const Columns& columns, const std::vector<Tap>& rows,
                             int64_t source_width, int64_t width, uint8_t* target) {
  // One number more: a pixel is read with what comes next.
  std::vector<float> wide(3 * source_width + 1), row(4 * width), sums(4 * width);
  std::vector<uint8_t> bytes(4 * width);
  int64_t shrunk = -1, current = -1;
  for (const Tap& tap : rows) {
    if (tap.source != shrunk) {
      const uint8_t* levels = source + tap.source * stride;
      for (int64_t i = 0; i < 3 * source_width; ++i) wide[i] = levels[i];
      switch (columns.num_taps) {
        case 1: shrink_row<1>(wide.data(), columns, width, row.data()); break;
        case 2: shrink_row<2>(wide.data(), columns, width, row.data()); break;
        case 3: shrink_row<3>(wide.data(), columns, width, row.data()); break;
        default: shrink_row<0>(wide.data(), columns, width, row.data());
      }
      shrunk = tap.source;
    }
    if (tap.target != current) {
      if (current >= 0) write_row(sums.data(), width, bytes.data(), target + 3 * width * current, false);
      current = tap.target;
      for (int64_t i = 0; i < 4 * width; ++i) sums[i] = row[i] * tap.weight;
    } else {
      for (int64_t i = 0; i < 4 * width; ++i) sums[i] += row[i] * tap.weight;
    }
  }
  write_row(sums.data(), width, bytes.data(), target + 3 * width * current, true);
}

// out uint8 [h, w, 3], image uint8 [H, W, 3]; the box (y0, x0, y1, x1) is at least as large as out along both axes.
void area_resize_(Tensor out, const Tensor& image, int64_t y0, int64_t x0, int64_t y1, int64_t x1) {
  personmae::check_tensor(out, "out", ScalarType::Byte, 3);
  personmae::check_tensor(image, "image", ScalarType::Byte, 3);
  STD_TORCH_CHECK(out.size(2) == 3 && image.size(2) == 3, "image and out: must have 3 channels");
  STD_TORCH_CHECK(0 <= y0 && y0 < y1 && y1 <= image.size(0) && 0 <= x0 && x0 < x1 && x1 <= image.size(1),
                  "box: must lie within the image");
  const int64_t height = out.size(0), width = out.size(1), stride = 3 * image.size(1);
  STD_TORCH_CHECK(0 < height && height <= y1 - y0 && 0 < width && width <= x1 - x0, "box: must not be smaller than out");
  const auto* source = static_cast<const uint8_t*>(image.const_data_ptr()) + y0 * stride + 3 * x0;
  auto* target = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Columns columns = to_table(find_taps(x1 - x0, width), width);
  shrink(source, stride, columns, find_taps(y1 - y0, height), x1 - x0, width, target);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) { m.impl("area_resize_", TORCH_BOX(&area_resize_)); }
