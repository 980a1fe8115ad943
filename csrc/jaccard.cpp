// k-reciprocal sets, query expansion and sums of minima over sparse rows. kernels/personmae_kernels/jaccard.py has the
// definitions and the same in plain torch; weights are integers, so both agree to the bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;  // rows that one thread takes at a time

// Rows of a sparse matrix as they come out of a block of rows.
struct Rows {
  std::vector<int64_t> ends;
  std::vector<int32_t> columns, values;
};

const int32_t* ints(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.const_data_ptr()); }
const int64_t* longs(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

struct Sparse {
  const int64_t* offsets;
  const int32_t* columns;
  const int32_t* values;
  int64_t num_rows;
};

// Every column has to lie below num_columns, since the loops index with them; and units are positive, since a sum of 0 is one not begun.
Sparse sparse(const Tensor& offsets, const Tensor& columns, const Tensor& values, int64_t num_columns, const char* name,
              bool positive = true) {
  personmae::check_tensor(offsets, name, ScalarType::Long, 1);
  personmae::check_tensor(columns, name, ScalarType::Int, 1);
  personmae::check_tensor(values, name, ScalarType::Int, 1);
  const int64_t num_rows = offsets.size(0) - 1, num_values = columns.size(0);
  const int64_t* offset = longs(offsets);
  const int32_t* column = ints(columns);
  STD_TORCH_CHECK(num_rows >= 0 && values.size(0) == num_values && offset[0] == 0 && offset[num_rows] == num_values &&
                      std::is_sorted(offset, offset + num_rows + 1),
                  name, ": offsets, columns and values do not belong together");
  STD_TORCH_CHECK(std::all_of(column, column + num_values, [&](int32_t c) { return 0 <= c && c < num_columns; }), name,
                  ": columns must be 0 to ", num_columns - 1);
  if (positive)
    STD_TORCH_CHECK(std::all_of(ints(values), ints(values) + num_values, [](int32_t unit) { return unit > 0; }), name,
                    ": units must be positive");
  return {offset, column, ints(values), num_rows};
}

// Runs `row(i, out)` for rows first to last in blocks, each of which appends to its own lists; then puts the lists one after
// the other. Returns (offsets int64 [rows + 1], columns int32, values int32).
template <typename MakeRows>
std::tuple<Tensor, Tensor, Tensor> collect(const Tensor& like, int64_t first, int64_t last, bool has_values, MakeRows make_rows) {
  const int64_t num_rows = last - first, num_blocks = (num_rows + kBlock - 1) / kBlock;
  std::vector<Rows> blocks(num_blocks);
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    auto make_row = make_rows();
    for (int64_t b = begin; b < end; ++b)
      for (int64_t i = first + b * kBlock; i < std::min(last, first + (b + 1) * kBlock); ++i) {
        make_row(i, blocks[b]);
        blocks[b].ends.push_back(static_cast<int64_t>(blocks[b].columns.size()));
      }
  });
  Tensor offsets = torch::stable::new_empty(like, {num_rows + 1}, ScalarType::Long);
  auto* offset = static_cast<int64_t*>(offsets.mutable_data_ptr());
  offset[0] = 0;
  std::vector<int64_t> starts(num_blocks + 1, 0);
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (size_t i = 0; i < blocks[b].ends.size(); ++i) offset[b * kBlock + i + 1] = starts[b] + blocks[b].ends[i];
    starts[b + 1] = starts[b] + static_cast<int64_t>(blocks[b].columns.size());
  }
  Tensor columns = torch::stable::new_empty(like, {starts[num_blocks]}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(like, {has_values ? starts[num_blocks] : 0}, ScalarType::Int);
  auto* column = static_cast<int32_t*>(columns.mutable_data_ptr());
  auto* value = static_cast<int32_t*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::copy(blocks[b].columns.begin(), blocks[b].columns.end(), column + starts[b]);
      if (has_values) std::copy(blocks[b].values.begin(), blocks[b].values.end(), value + starts[b]);
      blocks[b] = {};
    }
  });
  return {offsets, columns, values};
}

// Neighbour lists int32 [N, W]; an entry below 0 is no neighbour.
struct Lists {
  const int32_t* ranks;
  int64_t num, width;

  bool has(int64_t row, int64_t count, int64_t wanted) const {
    const int32_t* list = ranks + row * width;
    return std::find(list, list + count, static_cast<int32_t>(wanted)) != list + count;
  }

  // Those of the first `count` neighbours of `row` that have it among their first `count`.
  void reciprocal(int64_t row, int64_t count, std::vector<int32_t>& found) const {
    found.clear();
    for (int64_t k = 0; k < count; ++k) {
      const int32_t other = ranks[row * width + k];
      if (has(other, count, row)) found.push_back(other);
    }
  }
};

Lists lists(const Tensor& ranks) {
  personmae::check_tensor(ranks, "ranks", ScalarType::Int, 2);
  const int64_t num = ranks.size(0), width = ranks.size(1);
  const int32_t* rank = ints(ranks);
  STD_TORCH_CHECK(std::all_of(rank, rank + num * width, [&](int32_t j) { return 0 <= j && j < num; }), "ranks: must be 0 to ",
                  num - 1);
  return {rank, num, width};
}

// ranks int32 [N, W], nearest first; num_half of them count for the half sets -> offsets int64 [N + 1], columns int32, rising in
// each row: the k-reciprocal neighbours with the half sets of those that are for two thirds among them.
std::tuple<Tensor, Tensor> reciprocal_sets(const Tensor& ranks, int64_t num_half) {
  const Lists neighbours = lists(ranks);
  STD_TORCH_CHECK(0 < num_half && num_half <= neighbours.width, "num_half: 1 to ", neighbours.width, ", got ", num_half);
  const auto make_rows = [&] {
    return [&neighbours, num_half, stamp = std::vector<int32_t>(neighbours.num, -1), own = std::vector<int32_t>(),
            half = std::vector<int32_t>()](int64_t i, Rows& out) mutable {
      neighbours.reciprocal(i, neighbours.width, own);
      const auto start = static_cast<int64_t>(out.columns.size());
      for (const int32_t j : own) stamp[j] = static_cast<int32_t>(i);
      out.columns.insert(out.columns.end(), own.begin(), own.end());
      for (const int32_t j : own) {
        neighbours.reciprocal(j, num_half, half);
        const auto shared = std::count_if(half.begin(), half.end(), [&](int32_t h) { return stamp[h] == i; });
        if (3 * shared > 2 * static_cast<int64_t>(half.size())) out.columns.insert(out.columns.end(), half.begin(), half.end());
      }
      std::sort(out.columns.begin() + start, out.columns.end());
      out.columns.erase(std::unique(out.columns.begin() + start, out.columns.end()), out.columns.end());
    };
  };
  auto [offsets, columns, values] = collect(ranks, 0, neighbours.num, false, make_rows);
  return {offsets, columns};
}

// The rows of `ranks` int32 [N, K2], averaged: (sum + K2 / 2) / K2 in integers, zeros left out. -> offsets, columns, units.
std::tuple<Tensor, Tensor, Tensor> mean_rows(const Tensor& offsets, const Tensor& columns, const Tensor& units, const Tensor& ranks) {
  const Lists neighbours = lists(ranks);
  const Sparse rows = sparse(offsets, columns, units, neighbours.num, "units", false);
  STD_TORCH_CHECK(rows.num_rows == neighbours.num, "ranks: ", rows.num_rows, " rows are needed, as in units");
  const auto make_rows = [&] {
    return [&neighbours, &rows, sums = std::vector<int64_t>(neighbours.num, 0), touched = std::vector<int32_t>()](int64_t i, Rows& out) mutable {
      touched.clear();
      for (int64_t k = 0; k < neighbours.width; ++k) {
        const int64_t row = neighbours.ranks[i * neighbours.width + k];
        for (int64_t p = rows.offsets[row]; p < rows.offsets[row + 1]; ++p) {
          if (rows.values[p] == 0) continue;
          if (sums[rows.columns[p]] == 0) touched.push_back(rows.columns[p]);
          sums[rows.columns[p]] += rows.values[p];
        }
      }
      std::sort(touched.begin(), touched.end());
      for (const int32_t column : touched) {
        const int64_t mean = (sums[column] + neighbours.width / 2) / neighbours.width;
        sums[column] = 0;
        if (mean == 0) continue;
        out.columns.push_back(column);
        out.values.push_back(static_cast<int32_t>(mean));
      }
    };
  };
  return collect(units, 0, neighbours.num, true, make_rows);
}

void check_rows(const Sparse& rows, int64_t first, int64_t last) {
  STD_TORCH_CHECK(0 <= first && first <= last && last <= rows.num_rows, "first, last: 0 to ", rows.num_rows, ", got ", first,
                  " and ", last);
}

// Adds, for every column of `row` and every row k that has it too, the smaller of the two units to sums[k].
template <typename Touch>
void add_minima(const Sparse& rows, const Sparse& by_column, int64_t row, int32_t* sums, Touch touch) {
  for (int64_t p = rows.offsets[row]; p < rows.offsets[row + 1]; ++p) {
    const int32_t unit = rows.values[p];
    const int64_t column = rows.columns[p];
    for (int64_t q = by_column.offsets[column]; q < by_column.offsets[column + 1]; ++q) {
      const int32_t other = by_column.columns[q];
      touch(other);
      sums[other] += std::min(unit, by_column.values[q]);
    }
  }
}

// Sums of minima of rows first to last with all `num_others` rows of the matrix whose columns are given by_column (offsets,
// row numbers, units), as far as they are at least `least`. -> offsets, columns (rising), sums.
std::tuple<Tensor, Tensor, Tensor> min_sum_pairs(const Tensor& offsets, const Tensor& columns, const Tensor& units,
                                                 const Tensor& column_offsets, const Tensor& column_rows, const Tensor& column_units,
                                                 int64_t num_others, int64_t first, int64_t last, int64_t least) {
  const Sparse by_column = sparse(column_offsets, column_rows, column_units, num_others, "column_units");
  const Sparse rows = sparse(offsets, columns, units, by_column.num_rows, "units");
  check_rows(rows, first, last);
  STD_TORCH_CHECK(least > 0, "least: must be positive, got ", least);
  const auto make_rows = [&] {
    return [&rows, &by_column, least, sums = std::vector<int32_t>(num_others, 0), touched = std::vector<int32_t>()](int64_t i, Rows& out) mutable {
      touched.clear();
      add_minima(rows, by_column, i, sums.data(), [&](int32_t other) {
        if (sums[other] == 0) touched.push_back(other);
      });
      const auto kept = std::partition(touched.begin(), touched.end(), [&](int32_t other) { return sums[other] >= least; });
      std::sort(touched.begin(), kept);
      for (auto other = touched.begin(); other != kept; ++other) {
        out.columns.push_back(*other);
        out.values.push_back(sums[*other]);
      }
      for (const int32_t other : touched) sums[other] = 0;
    };
  };
  return collect(units, first, last, true, make_rows);
}

// The same sums as a dense block int32 [last - first, num_others].
Tensor min_sums(const Tensor& offsets, const Tensor& columns, const Tensor& units, const Tensor& column_offsets,
                const Tensor& column_rows, const Tensor& column_units, int64_t num_others, int64_t first, int64_t last) {
  const Sparse by_column = sparse(column_offsets, column_rows, column_units, num_others, "column_units");
  const Sparse rows = sparse(offsets, columns, units, by_column.num_rows, "units");
  check_rows(rows, first, last);
  Tensor sums = torch::stable::new_zeros(units, {last - first, num_others}, ScalarType::Int);
  auto* sum = static_cast<int32_t*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(first, last, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add_minima(rows, by_column, i, sum + (i - first) * num_others, [](int32_t) {});
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) {
  m.impl("reciprocal_sets", TORCH_BOX(&reciprocal_sets));
  m.impl("mean_rows", TORCH_BOX(&mean_rows));
  m.impl("min_sum_pairs", TORCH_BOX(&min_sum_pairs));
  m.impl("min_sums", TORCH_BOX(&min_sums));
}
