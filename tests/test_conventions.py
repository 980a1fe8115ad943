"""Conventions: each preset against its evaluator derived anew, with and without ties; and the measures against plain loops."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import evaluators
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.evaluation.conventions import CONVENTIONS, Convention, Reranking, convention_of
from personmae.evaluation.measures import measure_queries
from personmae.evaluation.protocol import ScoringConfig, evaluate_features, score_tiles
from personmae.evaluation.ranking import Labels, match_ranks_of_distances
from personmae.evaluation.scores import Scores


def labels(pairs) -> Labels:
    return Labels(np.array([person for person, _ in pairs], np.int64), np.array([camera for _, camera in pairs], np.int64))


def random_case(seed: int, num_distances: int | None = None, num_gallery: int = 83):
    """Distances, query and gallery as (people, cameras). Some queries have no match; num_distances: how many different ones there are."""
    generator = np.random.default_rng(seed)
    query = generator.integers(0, 14, 31), generator.integers(1, 4, 31)
    gallery = generator.integers(0, 11, num_gallery), generator.integers(1, 4, num_gallery)
    shape = 31, num_gallery
    distance = generator.permutation(31 * num_gallery).reshape(shape) if num_distances is None else generator.integers(0, num_distances, shape)
    return distance.astype(np.float64) / 64, query, gallery


def scores_of(distance, query, gallery, convention: Convention | str, **options) -> Scores:
    scoring = ScoringConfig(convention=convention_of(convention), **options)
    # In two tiles: what is found must not depend on it.
    tiles = [(slice(0, 10), distance[:10]), (slice(10, len(distance)), distance[10:])]
    return score_tiles(tiles, Labels(*query), Labels(*gallery), metric="cosine", scoring=scoring)


def same_curve(found, expected) -> bool:
    """Equal as far as both go; after that the found one is constant."""
    num = min(len(found), len(expected))
    return np.allclose(found[:num], expected[:num], atol=1e-12) and np.allclose(found[num:], expected[-1], atol=1e-12)


# Without ties, the sorts of the originals; with ties, their stable forms.
SORTS = [(None, None), (7, "stable"), (1, "stable")]


@pytest.mark.parametrize(("num_distances", "kind"), SORTS)
@pytest.mark.parametrize("num_gallery", [83, 17])
@pytest.mark.parametrize("name", ["standard", "transreid", "fast-reid", "torchreid"])
def test_the_common_core(name, num_gallery, num_distances, kind):
    for seed in range(3):
        case = random_case(seed, num_distances, num_gallery)
        expected, penalty, curve = evaluators.common_core(*case, kind)
        found = scores_of(*case, name)
        assert found.mAP == pytest.approx(expected, abs=1e-13)
        assert found.mINP == pytest.approx(penalty, abs=1e-13)
        assert same_curve(found.cmc, curve)
        assert len(found.cmc) == 50
        assert 0 < found.num_valid < found.num_queries == 31


@pytest.mark.parametrize(("num_distances", "kind"), SORTS)
def test_cluster_contrast(num_distances, kind):
    for seed in range(3):
        case = random_case(seed, num_distances)
        expected, curve = evaluators.cluster_contrast(*case, kind)
        found = scores_of(*case, "cluster-contrast")
        assert found.mAP == pytest.approx(expected, abs=1e-13)
        assert same_curve(found.cmc, curve)
        if num_distances:
            assert found.mAP != pytest.approx(scores_of(*case, "standard").mAP)
            # Its average precision does not depend on the order of ties: an unstable sort gives the same.
            assert found.mAP == pytest.approx(evaluators.cluster_contrast(*case)[0], abs=1e-13)


@pytest.mark.parametrize(("num_distances", "kind"), SORTS)
@pytest.mark.parametrize("name", ["market-matlab", "layumi"])
def test_the_trapezoid_over_all_queries_and_junk(name, num_distances, kind):
    for seed in range(3):
        distance, query, gallery = random_case(seed, num_distances)
        people = np.where(gallery[0] == 10, evaluators.JUNK, gallery[0])
        case = distance, query, (people, gallery[1])
        expected, curve = evaluators.market_matlab(*case) if name == "market-matlab" else evaluators.layumi(*case, kind)
        kept = people != evaluators.JUNK
        found = scores_of(distance[:, kept], query, (people[kept], gallery[1][kept]), name)
        assert found.mAP == pytest.approx(expected, abs=1e-13)
        assert same_curve(found.cmc, curve)
        assert found.num_valid < found.num_scored == 31
        assert "counted as zero" in str(found)


def test_presets_differ_where_they_are_known_to():
    """The order of magnitude and the sign of the differences between the code bases."""
    case = random_case(0)
    core, official = scores_of(*case, "standard"), scores_of(*case, "market-matlab")
    assert official.mAP < core.mAP * official.num_valid / official.num_queries
    assert official.rank(1) == pytest.approx(core.rank(1) * core.num_valid / core.num_queries)
    tied = random_case(0, 2)
    names = ("standard", "cluster-contrast", "market-matlab", "layumi")
    assert len({round(scores_of(*tied, name).mAP, 6) for name in names}) == 4


@pytest.mark.parametrize("num_distances", [None, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_single_gallery_shot_as_torchreid_draws_it(num_distances, seed):
    case = random_case(5, num_distances)
    convention = dataclasses.replace(CONVENTIONS["torchreid"], single_gallery_shot=True)
    expected = evaluators.torchreid_single_shot(*case, seed, kind="stable")
    found = scores_of(*case, convention, seed=seed)
    assert same_curve(found.cmc, expected)
    assert found.mAP == scores_of(*case, "torchreid").mAP
    exact = scores_of(*case, dataclasses.replace(convention, num_shot_repeats=0))
    many = scores_of(*case, dataclasses.replace(convention, num_shot_repeats=3000))
    np.testing.assert_allclose(exact.cmc, many.cmc, atol=0.006)


def plain_average_precision(groups, definition, ties) -> Fraction:
    """groups: by ascending distance, the hits of images at it, by index."""
    ranking = [hit for group in groups for hit in (group if ties == "by index" else group[::-1])]
    total = Fraction(0)
    if definition == "ties pooled":
        seen = found = 0
        for group in groups:
            seen, found = seen + len(group), found + sum(group)
            total += sum(group) * Fraction(found, max(seen, 1))
    else:
        for place, hit in enumerate(ranking):
            precision = Fraction(sum(ranking[: place + 1]), place + 1)
            earlier = Fraction(sum(ranking[:place]), place) if place else Fraction(1)
            total += hit * (precision if definition == "precision at hits" else (precision + earlier) / 2)
    return total / sum(ranking)


image = st.tuples(st.integers(0, 3), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(
    query=st.lists(image, min_size=1, max_size=4),
    gallery=st.lists(image, min_size=1, max_size=9),
    definition=st.sampled_from(["precision at hits", "trapezoid", "ties pooled"]),
    ties=st.sampled_from(["by index", "reversed"]),
    data=st.data(),
)
def test_measures_equal_plain_loops(query, gallery, definition, ties, data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=len(gallery), max_size=len(gallery)), min_size=len(query), max_size=len(query)))
    found = measure_queries(match_ranks_of_distances(np.array(rows, np.float64), labels(query), labels(gallery)), definition, ties)
    assert len(found) == len(query)
    for q, (row, own) in enumerate(zip(rows, query, strict=True)):
        kept = [g for g in range(len(gallery)) if gallery[g] != own]
        groups = [[gallery[g][0] == own[0] for g in kept if row[g] == value] for value in range(4)]
        ranking = [hit for group in groups for hit in (group if ties == "by index" else group[::-1])]
        assert found.num_matches[q] == sum(ranking)
        assert found.matched[q] == any(ranking)
        if not any(ranking):
            assert found.first_match[q] == -1
            assert np.isnan([found.average_precision[q], found.inverse_negative_penalty[q]]).all()
            continue
        assert found.first_match[q] == ranking.index(True)
        last = len(ranking) - ranking[::-1].index(True)
        assert found.inverse_negative_penalty[q] == pytest.approx(sum(ranking) / last, abs=1e-12)
        assert found.average_precision[q] == pytest.approx(float(plain_average_precision(groups, definition, ties)), abs=1e-12)


@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_presets_from_features(name):
    """From features to scores: the metric and the normalisation of each."""
    generator = np.random.default_rng(3)
    people, cameras = generator.integers(0, 6, 60), generator.integers(1, 4, 60)
    features = (generator.normal(size=(6, 5))[people] + generator.normal(size=(60, 5))) * generator.uniform(0.5, 2, (60, 1))
    query, gallery = (people[:20], cameras[:20]), (people[20:], cameras[20:])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = features if name == "torchreid" else unit
    distance = ((chosen[:20, None] - chosen[None, 20:]) ** 2).sum(axis=2)
    expected = {
        "market-matlab": lambda: evaluators.market_matlab(distance, query, gallery)[0],
        "layumi": lambda: evaluators.layumi(distance, query, gallery)[0],
        "cluster-contrast": lambda: evaluators.cluster_contrast(distance, query, gallery)[0],
    }.get(name, lambda: evaluators.common_core(distance, query, gallery)[0])()
    found = evaluate_features(features[:20], features[20:], query[0], gallery[0], query[1], gallery[1], convention=name)
    assert found.mAP == pytest.approx(expected, abs=1e-12)
    assert found.row()["convention"] == name
    assert f"as {name}, {found.metric}" in str(found)


def test_bad_conventions():
    with pytest.raises(UserError, match="no convention 'matlab'; known: standard, transreid"):
        convention_of("matlab")
    with pytest.raises(ValueError, match="ties is 'random'; allowed: by index, reversed"):
        Convention(name="x", ties="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_shot_repeats is -1"):
        Convention(name="x", num_shot_repeats=-1)
    with pytest.raises(ValueError, match="'new'; allowed: classic, fast-reid"):
        Reranking(definition="new")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight from 0 to 1"):
        Reranking(weight=2)
    with pytest.raises(ValueError, match="1 <= k2 <= k1"):
        Reranking(k1=3, k2=4)
    with pytest.raises(ValueError, match="resquare"):
        Reranking(definition="fast-reid", resquare=True)
    assert all(convention.about for convention in CONVENTIONS.values())
    assert all(name == convention.name for name, convention in CONVENTIONS.items())
    assert convention_of(CONVENTIONS["layumi"]) is CONVENTIONS["layumi"]
