// The loop of a neighbour search that no matrix product does: keeping the nearest of each row from tile to tile.
// kernels/personmae_kernels/neighbours.py has the same in plain torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;
using Scored = std::pair<float, int32_t>;

// The smallest score at the root, so that it is the one to go. Which of equal scores goes does not matter: the search
// looks again at rows where that could be wrong.
bool higher(const Scored& left, const Scored& right) { return left.first > right.first; }

// Takes one row of a tile into its heap; `lowest` falls to the smallest score seen.
void select_row(const float* scores, int64_t num, int32_t first_column, std::vector<Scored>& heap, float& lowest) {
  float lows[kLanes];
  std::fill_n(lows, kLanes, lowest);
  const auto offer = [&](int64_t column) {
    if (!(scores[column] > heap.front().first)) return;
    std::pop_heap(heap.begin(), heap.end(), higher);
    heap.back() = {scores[column], first_column + static_cast<int32_t>(column)};
    std::push_heap(heap.begin(), heap.end(), higher);
  };
  int64_t column = 0;
  for (; column + kLanes <= num; column += kLanes) {
    const float* block = scores + column;
    const float bound = heap.front().first;
    int32_t hit = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      hit |= block[lane] > bound;
      lows[lane] = block[lane] < lows[lane] ? block[lane] : lows[lane];
    }
    if (hit)
      for (int64_t lane = 0; lane < kLanes; ++lane) offer(column + lane);
  }
  for (; column < num; ++column) {
    offer(column);
    lows[0] = std::min(lows[0], scores[column]);
  }
  lowest = *std::min_element(lows, lows + kLanes);
}

// scores float32 [R, C], of columns first_column onwards; best float32 [R, K], indices int32 [R, K]: the K highest so far
// with their columns, in no order a caller may count on, -inf and -1 at the start; lowest float32 [R], +inf at the start.
void select_nearest_(const Tensor& scores, int64_t first_column, Tensor best, Tensor indices, Tensor lowest) {
  personmae::check_tensor(scores, "scores", ScalarType::Float, 2);
  personmae::check_tensor(best, "best", ScalarType::Float, 2);
  personmae::check_tensor(indices, "indices", ScalarType::Int, 2);
  personmae::check_tensor(lowest, "lowest", ScalarType::Float, 1);
  const int64_t num_rows = scores.size(0), num_columns = scores.size(1), num_kept = best.size(1);
  STD_TORCH_CHECK(best.size(0) == num_rows && indices.size(0) == num_rows && lowest.size(0) == num_rows,
                  "best, indices, lowest: ", num_rows, " rows are needed, as in scores");
  STD_TORCH_CHECK(num_kept > 0 && indices.size(1) == num_kept, "best, indices: [R, K] with K > 0 is needed");
  const auto* score = static_cast<const float*>(scores.const_data_ptr());
  auto* kept = static_cast<float*>(best.mutable_data_ptr());
  auto* index = static_cast<int32_t*>(indices.mutable_data_ptr());
  auto* low = static_cast<float*>(lowest.mutable_data_ptr());
  torch::stable::parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<Scored> heap(num_kept);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < num_kept; ++k) heap[k] = {kept[row * num_kept + k], index[row * num_kept + k]};
      std::make_heap(heap.begin(), heap.end(), higher);
      select_row(score + row * num_columns, num_columns, static_cast<int32_t>(first_column), heap, low[row]);
      for (int64_t k = 0; k < num_kept; ++k) {
        kept[row * num_kept + k] = heap[k].first;
        index[row * num_kept + k] = heap[k].second;
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) {
  m.impl("select_nearest_", TORCH_BOX(&select_nearest_));
}
