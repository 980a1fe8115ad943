"""Average query expansion against fast-reid's rule taken image by image; mirror images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from personmae.evaluation.expansion import QueryExpansion, combine_flipped, expand, unit_length


def plain_expansion(query, gallery, k, alpha, num_times):
    """Of each image: the mean of its k most similar images' features, each times its similarity to the power of alpha."""
    features = [row.astype(np.float64) for row in [*query, *gallery]]
    for _ in range(num_times):
        expanded = []
        for one in features:
            similar = [(one @ other) / np.linalg.norm(one) / np.linalg.norm(other) for other in features]
            nearest = sorted(range(len(features)), key=lambda n: -similar[n])[:k]
            expanded.append(sum(similar[n] ** alpha * features[n] for n in nearest) / len(nearest))
        features = expanded
    return np.array(features[: len(query)]), np.array(features[len(query) :])


@pytest.mark.parametrize(("k", "alpha", "num_times"), [(5, 3, 1), (1, 3, 1), (3, 0, 1), (4, 2.5, 1), (5, 3, 2), (100, 3, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_expansion_equals_the_rule(k, alpha, num_times, dtype):
    generator = np.random.default_rng(0)
    # Positive features: no similarity is negative.
    query, gallery = generator.uniform(size=(7, 9)).astype(dtype), generator.uniform(size=(24, 9)).astype(dtype)
    kept = query.copy(), gallery.copy()
    expected = plain_expansion(query, gallery, k, alpha, num_times)
    found = expand(torch.from_numpy(query), torch.from_numpy(gallery), QueryExpansion(k=k, alpha=alpha, num_times=num_times))
    for part, wanted in zip(found, expected, strict=True):
        assert part.numpy().dtype == dtype
        np.testing.assert_allclose(part.numpy(), wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(query, kept[0])
    np.testing.assert_array_equal(gallery, kept[1])


def test_negative_similarities_and_zero_rows_give_numbers():
    query, gallery = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[-1.0, 0], [0, 1]])
    for alpha in (3, 2.5):
        found = torch.cat(expand(query, gallery, QueryExpansion(k=4, alpha=alpha)))
        assert found.isfinite().all()
    # Of the first image: itself with weight 1, its opposite with weight (-1)^3 or 0.
    assert expand(query, gallery, QueryExpansion(k=4, alpha=3))[0][0].tolist() == pytest.approx([0.5, 0])
    assert expand(query, gallery, QueryExpansion(k=4, alpha=2.5))[0][0].tolist() == pytest.approx([0.25, 0])


def test_mirror_images():
    features, flipped = torch.tensor([[3.0, 0], [0, 0]]), torch.tensor([[0.0, 4], [0, 0]])
    assert combine_flipped(features, flipped).tolist() == [[1.5, 2], [0, 0]]
    np.testing.assert_allclose(combine_flipped(features, flipped, "unit-sum"), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert features.tolist() == [[3, 0], [0, 0]]
    np.testing.assert_allclose(unit_length(torch.tensor([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), those of the mirror images \(1, 2\)"):
        combine_flipped(features, flipped[:1])


def test_bad_parameters():
    with pytest.raises(ValueError, match="not 0, 1 and 3"):
        QueryExpansion(k=0)
    assert str(QueryExpansion(num_times=2)) == "query expansion (k 5, alpha 3, 2 passes)"
