// The one place where the compiled operators are named: their schemas, and the Python module whose import registers them.
// Stable ABI throughout (torch/csrc/stable, limited Python API): the same binary loads in every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(personmae, m) {
  m.def(
      "block_masks(Tensor seeds, Tensor shapes, Tensor ranges, int rows, int columns, int num_visible, int num_tries) -> Tensor");
  m.def("area_resize_(Tensor(a!) out, Tensor image, int y0, int x0, int y1, int x1) -> ()");
  m.def("gather_visible(Tensor tokens, Tensor visible) -> Tensor");
  m.def("scatter_visible(Tensor gradient, Tensor visible, int num_tokens) -> Tensor");
  m.def(
      "adamw_ema_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
      "Tensor hyper, float[] weight_decays, Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor(f!)[] average_copies) -> ()");
  m.def(
      "pair_distances(Tensor query, Tensor query_scale, Tensor gallery, Tensor gallery_scale, Tensor rows, Tensor columns, "
      "bool cosine) -> Tensor");
  m.def(
      "place_distances_(Tensor(a!) steps, Tensor offsets, Tensor match, Tensor distance, Tensor distances, int first) -> ()");
  m.def(
      "place_products_(Tensor(a!) steps, Tensor offsets, Tensor match, Tensor distance, Tensor match_bounds, Tensor products, "
      "Tensor slack, Tensor gallery_bounds, Tensor query, Tensor query_scale, Tensor gallery, Tensor gallery_scale, bool cosine, "
      "int first) -> ()");
  m.def("select_nearest_(Tensor scores, int first_column, Tensor(a!) best, Tensor(b!) indices, Tensor(c!) lowest) -> ()");
  m.def("reciprocal_sets(Tensor ranks, int num_half) -> (Tensor, Tensor)");
  m.def("mean_rows(Tensor offsets, Tensor columns, Tensor units, Tensor ranks) -> (Tensor, Tensor, Tensor)");
  m.def(
      "min_sum_pairs(Tensor offsets, Tensor columns, Tensor units, Tensor column_offsets, Tensor column_rows, "
      "Tensor column_units, int num_others, int first, int last, int least) -> (Tensor, Tensor, Tensor)");
  m.def(
      "min_sums(Tensor offsets, Tensor columns, Tensor units, Tensor column_offsets, Tensor column_rows, Tensor column_units, "
      "int num_others, int first, int last) -> Tensor");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Registers the compiled operators with PyTorch.", -1, nullptr};
  return PyModule_Create(&definition);
}
