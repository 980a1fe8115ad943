// Where the images of a gallery stand among the matches of each query: counted, without a sort. kernels/personmae_kernels/
// match_places.py has the definitions; match_places_reference.py is equal to this to the bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "checks.h"

// A second version for AVX2, chosen when the binary is loaded. Without FMA, whose single rounding would change the sums.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define PERSONMAE_ALSO_AVX2 __attribute__((target_clones("avx2", "default")))
#else
#define PERSONMAE_ALSO_AVX2
#endif

namespace personmae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The order of the sum is part of the definition: element i goes to lane i mod kLanes, then the lanes are folded in halves.
constexpr int64_t kLanes = 32;
constexpr int64_t kBlock = 512;

template <typename Value>
inline __attribute__((always_inline)) double sum_of_squares(const Value* a, double a_scale, const Value* b, double b_scale,
                                                            int64_t width) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double difference =
          static_cast<double>(a[i + lane]) * a_scale - static_cast<double>(b[i + lane]) * b_scale;
      lanes[lane] += difference * difference;
    }
  for (int64_t lane = 0; i + lane < width; ++lane) {
    const double difference = static_cast<double>(a[i + lane]) * a_scale - static_cast<double>(b[i + lane]) * b_scale;
    lanes[lane] += difference * difference;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

PERSONMAE_ALSO_AVX2
double squared_distance(const float* a, double a_scale, const float* b, double b_scale, int64_t width) {
  return sum_of_squares(a, a_scale, b, b_scale, width);
}

PERSONMAE_ALSO_AVX2
double squared_distance(const double* a, double a_scale, const double* b, double b_scale, int64_t width) {
  return sum_of_squares(a, a_scale, b, b_scale, width);
}

// What the product of a pair leaves open: its value in float64 lies between lower and upper.
PERSONMAE_ALSO_AVX2
void bounds_of_products(const float* product, const double* low, const double* high, const double* norm, double slack,
                        int64_t num, double* lower, double* upper) {
  for (int64_t i = 0; i < num; ++i) {
    const double twice = 2.0 * static_cast<double>(product[i]), doubt = slack * norm[i];
    lower[i] = (low[i] - doubt) - twice;
    upper[i] = (high[i] + doubt) - twice;
  }
}

// How many of the ascending values are smaller than x; none are smaller than NaN. num is at least 1.
inline int64_t num_smaller(const double* values, int64_t num, double x) {
  const double* first = values;
  while (num > 1) {
    const int64_t half = num / 2;
    first += first[half - 1] < x ? half : 0;
    num -= half;
  }
  return first - values + (*first < x);
}

// Rows of features as they came, each with the factor that goes with its elements.
struct Features {
  const void* values;
  const double* scale;
  bool is_double;
  int64_t num, width;
};

Features features_of(const Tensor& values, const char* name, const Tensor& scale, const char* scale_name) {
  const bool is_double = values.scalar_type() == ScalarType::Double;
  check_tensor(values, name, is_double ? ScalarType::Double : ScalarType::Float, 2);
  check_tensor(scale, scale_name, ScalarType::Double, 1);
  STD_TORCH_CHECK(scale.size(0) == values.size(0), scale_name, ": ", scale.size(0), " factors, but ", values.size(0),
                  " rows in ", name);
  return {values.const_data_ptr(), static_cast<const double*>(scale.const_data_ptr()), is_double, values.size(0),
          values.size(1)};
}

void check_pair(const Features& query, const Features& gallery) {
  STD_TORCH_CHECK(query.is_double == gallery.is_double, "gallery: must have the dtype of query");
  STD_TORCH_CHECK(query.width == gallery.width, "gallery: ", gallery.width, " dimensions, but ", query.width, " in query");
}

double pair_distance(const Features& query, int64_t row, const Features& gallery, int64_t column, bool cosine) {
  const double a = query.scale[row], b = gallery.scale[column];
  if (cosine && (a == 0.0 || b == 0.0)) return 1.0;
  const int64_t width = query.width;
  const double square =
      query.is_double
          ? squared_distance(static_cast<const double*>(query.values) + row * width, a,
                             static_cast<const double*>(gallery.values) + column * width, b, width)
          : squared_distance(static_cast<const float*>(query.values) + row * width, a,
                             static_cast<const float*>(gallery.values) + column * width, b, width);
  return cosine ? 0.5 * square : std::sqrt(square);
}

// The matches of one query, by (distance, index), and the steps of its counts: see match_places.py.
struct Matches {
  const double* distance;
  const int64_t* index;
  int64_t num;
  int64_t *closer, *before, *after;

  // A gallery image whose distance is known.
  void place(double d, int64_t image) const {
    const int64_t first = std::lower_bound(distance, distance + num, d) - distance;
    const int64_t end = std::upper_bound(distance + first, distance + num, d) - distance;
    ++closer[end];
    if (first == end) return;
    const int64_t own = std::lower_bound(index + first, index + end, image) - index;
    ++before[own + (own < end && index[own] == image)];
    --before[end];
    ++after[first];
    --after[own];
  }
};

struct AllMatches {
  const int64_t *offsets, *index;
  const double* distance;
  int64_t* steps;
  int64_t num_steps;

  Matches of(int64_t query) const {
    const int64_t first = offsets[query];
    int64_t* own = steps + first + query;
    return {distance + first, index + first, offsets[query + 1] - first, own, own + num_steps, own + 2 * num_steps};
  }
};

AllMatches matches_of(const Tensor& steps, const Tensor& offsets, const Tensor& match, const Tensor& distance,
                      int64_t num_queries) {
  check_tensor(steps, "steps", ScalarType::Long, 2);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_tensor(match, "match", ScalarType::Long, 1);
  check_tensor(distance, "distance", ScalarType::Double, 1);
  const int64_t num_matches = match.size(0);
  STD_TORCH_CHECK(offsets.size(0) == num_queries + 1, "offsets: ", num_queries + 1, " are needed, got ", offsets.size(0));
  STD_TORCH_CHECK(distance.size(0) == num_matches, "distance: ", num_matches, " are needed, got ", distance.size(0));
  STD_TORCH_CHECK(steps.size(0) == 3 && steps.size(1) == num_matches + num_queries, "steps: [3, ", num_matches + num_queries,
                  "] is needed");
  const auto* offset = static_cast<const int64_t*>(offsets.const_data_ptr());
  STD_TORCH_CHECK(offset[0] == 0 && offset[num_queries] == num_matches, "offsets: must lead from 0 to ", num_matches);
  for (int64_t q = 0; q < num_queries; ++q)
    STD_TORCH_CHECK(offset[q] <= offset[q + 1], "offsets: must not fall, as they do after query ", q);
  return {offset, static_cast<const int64_t*>(match.const_data_ptr()), static_cast<const double*>(distance.const_data_ptr()),
          static_cast<int64_t*>(steps.mutable_data_ptr()), num_matches + num_queries};
}

// Queries for one thread: some ten thousand pairs, below that a thread costs more than it brings.
int64_t grain(int64_t num_gallery) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, num_gallery)); }

// query [Q, D], gallery [G, D] both float32 or float64; scales float64; rows, columns int64 [P] -> float64 [P].
Tensor pair_distances(const Tensor& query, const Tensor& query_scale, const Tensor& gallery, const Tensor& gallery_scale,
                      const Tensor& rows, const Tensor& columns, bool cosine) {
  const Features from = features_of(query, "query", query_scale, "query_scale");
  const Features to = features_of(gallery, "gallery", gallery_scale, "gallery_scale");
  check_pair(from, to);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_tensor(columns, "columns", ScalarType::Long, 1);
  const int64_t num_pairs = rows.size(0);
  STD_TORCH_CHECK(columns.size(0) == num_pairs, "columns: ", num_pairs, " are needed, got ", columns.size(0));
  const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
  const auto* column = static_cast<const int64_t*>(columns.const_data_ptr());
  for (int64_t i = 0; i < num_pairs; ++i) {
    STD_TORCH_CHECK(0 <= row[i] && row[i] < from.num, "rows: 0 to ", from.num - 1, ", got ", row[i]);
    STD_TORCH_CHECK(0 <= column[i] && column[i] < to.num, "columns: 0 to ", to.num - 1, ", got ", column[i]);
  }
  Tensor result = torch::stable::new_empty(query_scale, {num_pairs});
  auto* distance = static_cast<double*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, num_pairs, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) distance[i] = pair_distance(from, row[i], to, column[i], cosine);
  });
  return result;
}

template <typename Value>
void place_row(const Value* value, int64_t num_gallery, int64_t first, const Matches& matches) {
  for (int64_t g = 0; g < num_gallery; ++g) {
    const auto d = static_cast<double>(value[g]);
    const int64_t k = num_smaller(matches.distance, matches.num, d);
    if (k < matches.num && matches.distance[k] == d)
      matches.place(d, first + g);
    else
      ++matches.closer[k];
  }
}

// distances float32 or float64 [Q, G], of gallery images first, first + 1, ...
void place_distances_(const Tensor& steps, const Tensor& offsets, const Tensor& match, const Tensor& distance,
                      const Tensor& distances, int64_t first) {
  const bool is_double = distances.scalar_type() == ScalarType::Double;
  check_tensor(distances, "distances", is_double ? ScalarType::Double : ScalarType::Float, 2);
  const int64_t num_queries = distances.size(0), num_gallery = distances.size(1);
  const AllMatches all = matches_of(steps, offsets, match, distance, num_queries);
  const void* data = distances.const_data_ptr();
  torch::stable::parallel_for(0, num_queries, grain(num_gallery), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      const Matches matches = all.of(q);
      if (matches.num == 0) {
        matches.closer[0] += num_gallery;
        continue;
      }
      if (is_double)
        place_row(static_cast<const double*>(data) + q * num_gallery, num_gallery, first, matches);
      else
        place_row(static_cast<const float*>(data) + q * num_gallery, num_gallery, first, matches);
    }
  });
}

// products float32 [Q, G]; match_bounds [2, M], gallery_bounds [3, G], slack [Q] float64.
void place_products_(const Tensor& steps, const Tensor& offsets, const Tensor& match, const Tensor& distance,
                     const Tensor& match_bounds, const Tensor& products, const Tensor& slack, const Tensor& gallery_bounds,
                     const Tensor& query, const Tensor& query_scale, const Tensor& gallery, const Tensor& gallery_scale,
                     bool cosine, int64_t first) {
  check_tensor(products, "products", ScalarType::Float, 2);
  check_tensor(match_bounds, "match_bounds", ScalarType::Double, 2);
  check_tensor(gallery_bounds, "gallery_bounds", ScalarType::Double, 2);
  check_tensor(slack, "slack", ScalarType::Double, 1);
  const Features from = features_of(query, "query", query_scale, "query_scale");
  const Features to = features_of(gallery, "gallery", gallery_scale, "gallery_scale");
  check_pair(from, to);
  const int64_t num_queries = products.size(0), num_gallery = products.size(1), num_matches = match.size(0);
  STD_TORCH_CHECK(from.num == num_queries, "query: ", num_queries, " rows are needed, got ", from.num);
  STD_TORCH_CHECK(to.num == num_gallery, "gallery: ", num_gallery, " rows are needed, got ", to.num);
  STD_TORCH_CHECK(slack.size(0) == num_queries, "slack: ", num_queries, " are needed, got ", slack.size(0));
  STD_TORCH_CHECK(match_bounds.size(0) == 2 && match_bounds.size(1) == num_matches, "match_bounds: [2, ", num_matches,
                  "] is needed");
  STD_TORCH_CHECK(gallery_bounds.size(0) == 3 && gallery_bounds.size(1) == num_gallery, "gallery_bounds: [3, ", num_gallery,
                  "] is needed");
  const AllMatches all = matches_of(steps, offsets, match, distance, num_queries);
  const auto* product = static_cast<const float*>(products.const_data_ptr());
  const auto* doubt = static_cast<const double*>(slack.const_data_ptr());
  const auto* bounds = static_cast<const double*>(match_bounds.const_data_ptr());
  const auto* low = static_cast<const double*>(gallery_bounds.const_data_ptr());
  const double *high = low + num_gallery, *norm = high + num_gallery;
  torch::stable::parallel_for(0, num_queries, grain(num_gallery), [&](int64_t begin, int64_t end) {
    double lower[kBlock], upper[kBlock];
    for (int64_t q = begin; q < end; ++q) {
      const Matches matches = all.of(q);
      if (matches.num == 0) {
        matches.closer[0] += num_gallery;
        continue;
      }
      const double *nearer = bounds + all.offsets[q], *farther = nearer + num_matches;
      for (int64_t block = 0; block < num_gallery; block += kBlock) {
        const int64_t num = std::min(kBlock, num_gallery - block);
        bounds_of_products(product + q * num_gallery + block, low + block, high + block, norm + block, doubt[q], num, lower,
                           upper);
        for (int64_t i = 0; i < num; ++i) {
          const int64_t k = num_smaller(farther, matches.num, lower[i]);
          // Written so that NaN, too, is decided by the distance itself.
          if (k == matches.num || upper[i] < nearer[k])
            ++matches.closer[k];
          else
            matches.place(pair_distance(from, q, to, block + i, cosine), first + block + i);
        }
      }
    }
  });
}

}  // namespace
}  // namespace personmae

STABLE_TORCH_LIBRARY_IMPL(personmae, CPU, m) {
  m.impl("pair_distances", TORCH_BOX(&personmae::pair_distances));
  m.impl("place_distances_", TORCH_BOX(&personmae::place_distances_));
  m.impl("place_products_", TORCH_BOX(&personmae::place_products_));
}
