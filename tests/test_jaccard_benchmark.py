"""The benchmark of the Jaccard distance: its dense way is the definition, and both ways find the same clusters."""

from __future__ import annotations

import numpy as np
import pytest
from dense_jaccard import dense_distances, dense_jaccard, dense_vectors

from benchmarks import _jaccard_cases, _jaccard_peers


@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (9, 1)])
def test_the_peer_is_the_definition(k1, k2):
    features = _jaccard_cases.draw_features(150, 32)
    expected = dense_jaccard(dense_vectors(dense_distances(features), k1, k2, "fast-reid"))
    np.testing.assert_allclose(_jaccard_peers.dense_jaccard(features, k1, k2), expected, atol=2e-6)


def test_rows():
    rows = _jaccard_cases.jaccard_rows(400, dimensions=32)
    assert [row["way"] for row in rows] == ["sparse", "dense"]
    assert all(row["same_labels"] and row["seconds"] > 0 and row["peak_gib"] > 0 for row in rows), rows
    (row,) = _jaccard_cases.reranking_rows(30, 200, dimensions=32)
    assert 0 < row["mean_distance"] < 1


def test_a_way_that_fails_is_a_row():
    (row,) = _jaccard_cases.jaccard_rows(100, ways=["sparse"], device="nothing")
    assert "nothing" in row["failed"]
