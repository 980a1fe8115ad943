// Block-wise masks from per-sample seeds. kernels/personmae_kernels/block_masks.py has the algorithm, draw by draw; this
// is equal to it to the bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr uint64_t kCellBits = 0xFFFF;

struct Grid {
  int64_t rows, columns;
};

// Draw number k of a seed: splitmix64, as in sample_random.py.
uint64_t draw(uint64_t seed, uint64_t k) {
  uint64_t z = seed + (k + 1) * kGolden;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

int64_t below(uint64_t word, int64_t bound) {
  return static_cast<int64_t>(((word >> 32) * static_cast<uint64_t>(bound)) >> 32);
}

// Fills hidden [L] (0 or 1), which is zero on entry. keys: room for L words.
void block_mask(uint64_t seed, const int32_t* shapes, const int32_t* ranges, Grid grid, int64_t left, int64_t num_tries,
                bool* hidden, uint64_t* keys) {
  const int64_t num_cells = grid.rows * grid.columns;
  for (int64_t t = 0; t < num_tries && left > 0; ++t) {
    const int64_t first = ranges[2 * left], end = ranges[2 * left + 1];
    const int32_t* shape = shapes + 2 * (first + below(draw(seed, 3 * t), end - first));
    const int64_t height = shape[0], width = shape[1];
    const int64_t y = below(draw(seed, 3 * t + 1), grid.rows - height + 1);
    const int64_t x = below(draw(seed, 3 * t + 2), grid.columns - width + 1);
    bool* corner = hidden + y * grid.columns + x;
    int64_t num_new = height * width;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) num_new -= corner[i * grid.columns + j];
    if (num_new == 0 || num_new > left) continue;
    for (int64_t i = 0; i < height; ++i) std::fill_n(corner + i * grid.columns, width, true);
    left -= num_new;
  }
  if (left == 0) return;
  int64_t num_keys = 0;
  for (int64_t cell = 0; cell < num_cells; ++cell)
    if (!hidden[cell])
      keys[num_keys++] = (draw(seed, 3 * num_tries + cell) & ~kCellBits) | static_cast<uint64_t>(cell);
  std::nth_element(keys, keys + left - 1, keys + num_keys);
  for (int64_t i = 0; i < left; ++i) hidden[keys[i] & kCellBits] = true;
}

// seeds int64 [B] (the bits of the uint64 seeds), shapes int32 [S, 2], ranges int32 [L + 1, 2] -> bool [B, L], true = hidden.
Tensor block_masks(const Tensor& seeds, const Tensor& shapes, const Tensor& ranges, int64_t rows, int64_t columns,
                   int64_t num_visible, int64_t num_tries) {
  personmae::check_tensor(seeds, "seeds", ScalarType::Long, 1);
  personmae::check_tensor(shapes, "shapes", ScalarType::Int, 2);
  personmae::check_tensor(ranges, "ranges", ScalarType::Int, 2);
  const int64_t num_cells = rows * columns, num_masks = seeds.size(0);
  STD_TORCH_CHECK(rows > 0 && columns > 0 && num_cells <= static_cast<int64_t>(kCellBits),
                  "rows, columns: 1 to 65535 cells, got ", rows, " x ", columns);
  STD_TORCH_CHECK(0 <= num_visible && num_visible <= num_cells,
                  "num_visible: 0 to ", num_cells, ", got ", num_visible);
  STD_TORCH_CHECK(num_tries >= 0, "num_tries: not negative, got ", num_tries);
  STD_TORCH_CHECK(shapes.size(1) == 2, "shapes: [S, 2] is needed");
  STD_TORCH_CHECK(ranges.size(0) == num_cells + 1 && ranges.size(1) == 2, "ranges: [rows * columns + 1, 2] is needed");

  Tensor masks = torch::stable::new_zeros(seeds, {num_masks, num_cells}, ScalarType::Bool);
  const auto* seed = static_cast<const uint64_t*>(seeds.const_data_ptr());
  const auto* shape = static_cast<const int32_t*>(shapes.const_data_ptr());
  const auto* range = static_cast<const int32_t*>(ranges.const_data_ptr());
  auto* hidden = static_cast<bool*>(masks.mutable_data_ptr());
  // A mask takes about a microsecond: fewer than 64 of them are not worth a thread.
  torch::stable::parallel_for(0, num_masks, 64, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(num_cells);
    for (int64_t b = begin; b < end; ++b)
      block_mask(seed[b], shape, range, {rows, columns}, num_cells - num_visible, num_tries, hidden + b * num_cells, keys.data());
  });
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) {
  m.impl("block_masks", TORCH_BOX(&block_masks));
}
