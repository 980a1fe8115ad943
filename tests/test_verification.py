"""ROC and TPR at FPR: counted in bins against scikit-learn on all pairs."""

from __future__ import annotations

import evaluators
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from personmae.evaluation.ranking import Labels
from personmae.evaluation.verification import PairCounts, Roc, rates

RATES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.5, 1.0)


def random_case(seed: int, dtype=np.float64, scale: float = 1.0):
    generator = np.random.default_rng(seed)
    query = generator.integers(0, 14, 31), generator.integers(1, 4, 31)
    gallery = generator.integers(0, 11, 83), generator.integers(1, 4, 83)
    same = query[0][:, None] == gallery[0]
    return (generator.beta(4, 4, (31, 83)) - 0.15 * same).astype(dtype) * dtype(scale), query, gallery


def counted(distance, query, gallery, num_tiles: int = 3) -> Roc:
    pairs = PairCounts()
    for rows in np.array_split(np.arange(len(distance)), num_tiles):
        pairs.add(distance[rows], Labels(query[0][rows], query[1][rows]), Labels(*gallery))
    return pairs.roc()


def check(distance, query, gallery, num_tiles: int = 3) -> None:
    roc = counted(distance, query, gallery, num_tiles)
    rounded = np.floor(distance.astype(np.float64) / roc.resolution) * roc.resolution
    values, same = evaluators.kept_pairs(rounded, query, gallery)
    assert (roc.num_same, roc.num_different) == (same.sum(), (~same).sum())
    assert sorted(np.repeat(roc.distance, roc.same)) == sorted(values[same])
    assert sorted(np.repeat(roc.distance, roc.different)) == sorted(values[~same])
    if not same.any() or same.all():
        assert np.isnan(roc.true_positive_rate(0.1))
        assert np.isnan(roc.fast_reid_rate(0.1))
        return
    false, true, _ = roc_curve(same, -values, drop_intermediate=False)
    for rate in RATES:
        assert roc.true_positive_rate(rate) == pytest.approx(true[false <= rate].max())
        assert roc.fast_reid_rate(rate) == pytest.approx(evaluators.fast_reid_rate(rounded, query, gallery, rate))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 3.9, 1e4, 1e-9, -2.0])
def test_rates_equal_scikit_learn_on_rounded_distances(dtype, scale):
    for seed in range(3):
        check(*random_case(seed, dtype, scale))


@settings(max_examples=100, deadline=None)
@given(
    people=st.lists(st.integers(0, 2), min_size=2, max_size=9),
    num_queries=st.integers(1, 3),
    num_tiles=st.integers(1, 3),
    data=st.data(),
)
def test_rates_with_many_ties(people, num_queries, num_tiles, data):
    num_queries = min(num_queries, len(people) - 1)
    cameras = data.draw(st.lists(st.integers(1, 2), min_size=len(people), max_size=len(people)))
    query = np.array(people[:num_queries]), np.array(cameras[:num_queries])
    gallery = np.array(people[num_queries:]), np.array(cameras[num_queries:])
    values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 40.0]), min_size=len(gallery[0]), max_size=len(gallery[0]))
    check(np.array([data.draw(values) for _ in range(num_queries)]), query, gallery, num_tiles)


def test_rounding_hides_nothing_at_this_size():
    """With distances this far apart the rates are those of the distances themselves."""
    case = random_case(0)
    roc = counted(*case)
    assert roc.resolution == 2**-21  # the largest distance lies between 0.5 and 1
    for rate in RATES:
        assert roc.fast_reid_rate(rate) == pytest.approx(evaluators.fast_reid_rate(*case, rate))


def test_rates_by_hand():
    # Same-person pairs at 1, 2 and 5, different-person pairs at 2, 3, 4 and 6.
    roc = Roc(np.array([1.0, 2, 3, 4, 5, 6]), np.array([1, 1, 0, 0, 1, 0]), np.array([0, 1, 1, 1, 0, 1]), 1.0)
    assert [roc.true_positive_rate(rate) for rate in (0, 0.24, 0.25, 0.74, 0.75, 1)] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert list(rates(roc)) == ["TPR@FPR=1e-04", "TPR@FPR=1e-03", "TPR@FPR=1e-02", "TPR@FPR=1e-01"]
    assert rates(roc, "different person", [0.3]) == {"TPR@FPR=3e-01": pytest.approx(roc.fast_reid_rate(0.3))}
    # At or above 4 stand a third of the same-person pairs and half of the others; at or above 3, three quarters.
    assert roc.fast_reid_rate(1 / 3) == 0.25
    assert roc.fast_reid_rate(0) == 0


def test_bad_input():
    pairs, one = PairCounts(), Labels(np.array([1]), np.array([1]))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            pairs.add(np.array([[value]]), one, one)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        pairs.add(np.zeros((1, 2)), one, one)
    pairs.add(np.array([[0.5]]), one, one)
    assert (pairs.roc().num_same, pairs.roc().num_different) == (0, 0)


def test_the_scale_of_distances_makes_no_difference():
    distance, query, gallery = random_case(1)
    expected = counted(distance, query, gallery)
    for scale in (2.0**-40, 2.0**40):
        found = counted(distance * scale, query, gallery)
        assert found.resolution == expected.resolution * scale
        assert [found.true_positive_rate(rate) for rate in RATES] == [expected.true_positive_rate(rate) for rate in RATES]
