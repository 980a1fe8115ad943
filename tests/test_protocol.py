"""The protocol: identities that any implementation of it has to keep, whitening, and named variants."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personmae.configs import UserError
from personmae.data.reid import read_market_layout
from personmae.evaluation import protocol
from personmae.evaluation.conventions import CONVENTIONS, Reranking
from personmae.evaluation.distances import distances
from personmae.evaluation.protocol import ScoringConfig, evaluate, evaluate_features, score, score_tiles, score_variants
from personmae.evaluation.ranking import Labels
from personmae.evaluation.whitening import fit_whitening


def random_set(
    num_queries: int = 23, num_gallery: int = 61, num_people: int = 9
) -> tuple[np.ndarray, np.ndarray, Labels, Labels]:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(num_people, 7))
    query = Labels(np.arange(num_queries) % num_people, generator.integers(1, 4, num_queries))
    gallery = Labels(np.arange(num_gallery) % num_people, generator.integers(1, 4, num_gallery))
    noise = generator.normal(size=(num_queries + num_gallery, 7))
    return centres[query.people] + noise[:num_queries], centres[gallery.people] + noise[num_queries:], query, gallery


def test_perfect_features_score_one_and_opposite_ones_the_least() -> None:
    people, cameras = np.arange(4), np.ones(4, np.int64)
    query, gallery = Labels(people, cameras), Labels(people, cameras + 1)
    best = score(np.eye(4), np.eye(4), query, gallery, scoring=ScoringConfig(max_rank=3))
    assert (best.mAP, best.mINP, best.cmc.tolist()) == (1, 1, [1, 1, 1])
    worst = score(np.eye(4), -np.eye(4), query, gallery, scoring=ScoringConfig(max_rank=10))
    assert (worst.mAP, worst.mINP) == (0.25, 0.25)
    assert worst.cmc.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_one_match_per_query_makes_ap_inp_and_reciprocal_rank_one_number() -> None:
    generator = np.random.default_rng(4)
    people = np.arange(20)
    scores = score(
        generator.normal(size=(20, 3)),
        generator.normal(size=(20, 3)),
        Labels(people, people * 0),
        Labels(people, people * 0 + 1),
    )
    assert scores.mAP == pytest.approx(scores.mINP)
    # mean(1 / rank), written with the CMC curve.
    shares = np.diff(scores.cmc, prepend=0)
    assert scores.mAP == pytest.approx((shares / np.arange(1, 51)).sum())


def test_what_must_not_change_the_scores() -> None:
    query_features, gallery_features, query, gallery = random_set()
    scores = score(query_features, gallery_features, query, gallery)

    def same(other_query: np.ndarray, other_gallery: np.ndarray, other_labels: Labels = gallery) -> bool:
        other = score(other_query, other_gallery, query, other_labels)
        return other.mAP == pytest.approx(scores.mAP, abs=1e-12) and np.allclose(other.cmc, scores.cmc)

    order = np.random.default_rng(5).permutation(len(gallery))
    assert same(query_features, gallery_features[order], Labels(gallery.people[order], gallery.cameras[order]))
    assert same(query_features * 3, gallery_features * np.linspace(0.1, 5, len(gallery))[:, None])
    rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(7, 7)))[0]
    assert same(query_features @ rotation, gallery_features @ rotation)
    # The same test can fail: queries that swap their features.
    assert not same(np.roll(query_features, 1, axis=0), gallery_features)


def test_images_of_the_query_itself_are_left_out() -> None:
    query_features, gallery_features, query, gallery = random_set(num_queries=1)
    copies = Labels(np.append(gallery.people, query.people), np.append(gallery.cameras, query.cameras))
    scores = score(query_features, gallery_features, query, gallery)
    assert score(query_features, np.vstack([gallery_features, query_features]), query, copies).mAP == scores.mAP


def test_far_distractors_change_nothing_and_near_ones_do() -> None:
    query_features, gallery_features, query, gallery = random_set(num_queries=1)
    more = Labels(np.append(gallery.people, [99]), np.append(gallery.cameras, [1]))
    scores = score(query_features, gallery_features, query, gallery)
    assert score(query_features, np.vstack([gallery_features, -query_features]), query, more).mAP == scores.mAP
    assert score(query_features, np.vstack([gallery_features, query_features]), query, more).mAP < scores.mAP


def test_queries_without_a_match_are_counted_and_not_scored() -> None:
    query = Labels(np.array([1, 2, 3]), np.array([1, 1, 1]))
    # Person 2 is in the gallery only from the query's own camera; person 3 not at all.
    gallery = Labels(np.array([1, 2]), np.array([2, 1]))
    scores = score(np.ones((3, 2)), np.ones((2, 2)), query, gallery)
    assert (scores.num_queries, scores.num_valid, scores.num_gallery) == (3, 1, 2)
    assert scores.mAP == scores.mINP == scores.rank(1) == 1
    assert np.isnan(scores.average_precision).tolist() == [False, True, True]
    assert "2 without a match" in str(scores)
    with pytest.raises(UserError, match="none of the 2 queries"):
        score(np.ones((2, 2)), np.ones((2, 2)), Labels(query.people[1:], query.cameras[1:]), gallery)


def test_ranks_beyond_the_gallery_are_safe() -> None:
    one = Labels(np.array([1]), np.array([1]))
    other = Labels(np.array([1]), np.array([2]))
    scores = score(np.ones((1, 2)), np.ones((1, 2)), one, other, scoring=ScoringConfig(max_rank=50))
    assert scores.cmc.tolist() == [1] * 50
    assert scores.row("a", "b")["rank10"] == 1
    assert "rank5" not in score(np.ones((1, 2)), np.ones((1, 2)), one, other, scoring=ScoringConfig(max_rank=4)).row("a", "b")
    with pytest.raises(ValueError, match="rank-51"):
        scores.rank(51)
    with pytest.raises(ValueError, match="max_rank is 0"):
        score(np.ones((1, 2)), np.ones((1, 2)), one, other, scoring=ScoringConfig(max_rank=0))


def test_variants_are_named_and_whitened() -> None:
    query_features, gallery_features, query, gallery = random_set()
    query_features, gallery_features = query_features.astype(np.float32), gallery_features.astype(np.float32)
    scores = score_variants(
        {"mean": query_features, "class": query_features[:, :3]},
        {"mean": gallery_features, "class": gallery_features[:, :3]},
        query,
        gallery,
        unlabelled_features={"mean": gallery_features, "class": gallery_features[:, :3]},
        metrics=("cosine", "euclidean"),
    )
    variants = ["", ", euclidean", ", whitened", ", whitened, euclidean"]
    assert list(scores) == [name + variant for name in ("mean", "class") for variant in variants]
    assert scores["mean"].mAP == score(query_features, gallery_features, query, gallery).mAP
    assert (
        scores["class, euclidean"].mAP
        == score(query_features[:, :3], gallery_features[:, :3], query, gallery, metric="euclidean").mAP
    )
    # Whitening knows the unlabelled features alone.
    unlabelled = np.random.default_rng(0).normal(size=(40, 7)) * np.arange(1, 8)
    features = {"mean": query_features}, {"mean": gallery_features}
    found = score_variants(*features, query, gallery, unlabelled_features={"mean": unlabelled.astype(np.float32)})
    fitted = fit_whitening(unlabelled.astype(np.float32))
    expected = score(fitted.apply(query_features), fitted.apply(gallery_features), query, gallery)
    assert found["mean, whitened"].mAP == expected.mAP != scores["mean, whitened"].mAP
    # Mahalanobis distance from the covariance, without a decomposition, is euclidean distance after whitening (without
    # regularisation).
    fitted = fit_whitening(gallery_features, regularisation=0)
    inverse = np.linalg.inv(np.cov(gallery_features.astype(np.float64), rowvar=False))
    difference = query_features[0].astype(np.float64) - gallery_features[5].astype(np.float64)
    whitened = fitted.apply(query_features[:1])[0] - fitted.apply(gallery_features[5:6])[0]
    assert whitened @ whitened == pytest.approx(difference @ inverse @ difference)
    with pytest.raises(ValueError, match="gallery features"):
        score_variants({"mean": query_features}, {"class": gallery_features}, query, gallery)


def test_whitening_gives_unit_covariance_and_undoes_a_stretch() -> None:
    generator = np.random.default_rng(7)
    features = generator.normal(size=(400, 6)) @ np.diag([100, 10, 3, 1, 0.5, 0.2]) + 5
    fitted = fit_whitening(features, regularisation=0)
    np.testing.assert_allclose(np.cov(fitted.apply(features), rowvar=False), np.eye(6), atol=1e-9)
    np.testing.assert_allclose(fitted.apply(features).mean(axis=0), 0, atol=1e-9)
    assert (np.diff(fitted.eigenvalues) < 0).all()
    np.testing.assert_allclose(fitted.components @ fitted.components.T, np.eye(6), atol=1e-12)
    np.testing.assert_array_equal(
        fit_whitening(features, num_components=2, regularisation=0).apply(features), fitted.apply(features)[:, :2]
    )


def test_whitening_of_fewer_images_than_dimensions_and_of_constant_features_is_finite() -> None:
    few = fit_whitening(np.random.default_rng(8).normal(size=(4, 33)))
    assert np.isfinite(few.apply(np.ones((2, 33)))).all()
    constant = fit_whitening(np.full((9, 5), 0.1, np.float32))
    np.testing.assert_allclose(constant.apply(np.full((3, 5), 0.1, np.float32)), 0, atol=1e-12)


def test_whitening_refuses_bad_input() -> None:
    features = np.random.default_rng(9).normal(size=(5, 3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_whitening(features[:1])
    with pytest.raises(ValueError, match="1 to 3 are possible"):
        fit_whitening(features, num_components=4)
    with pytest.raises(ValueError, match="cannot be negative"):
        fit_whitening(features, regularisation=-1)
    with pytest.raises(ValueError, match="fitted on 3 dimensions"):
        fit_whitening(features).apply(features[:, :2])
    features[3] = np.inf
    with pytest.raises(ValueError, match="row 3"):
        fit_whitening(features)


def test_evaluate_from_files_to_scores(tmp_path: Path) -> None:
    # Three people, each of one colour: the mean colour finds them all.
    colours = {1: (200, 30, 30), 2: (30, 200, 30), 3: (30, 30, 200)}
    for folder, camera in (("query", 1), ("bounding_box_test", 2)):
        (tmp_path / folder).mkdir()
        for person, colour in colours.items():
            Image.new("RGB", (9, 17), colour).save(tmp_path / folder / f"{person:04d}_c{camera}s1_000000_00.png")
    reid_set = read_market_layout(tmp_path)
    images = [image.path for image in reid_set.gallery]
    found = evaluate(
        lambda batch: {"colour": batch.to(torch.float32).mean(dim=(1, 2))},
        reid_set,
        size=(16, 8),
        unlabelled=images,
        batch_size=2,
    )
    assert list(found.scores) == ["colour", "colour, whitened"]
    assert found.scores["colour"].mAP == 1
    assert found.query_features["colour"].shape == (3, 3)
    np.testing.assert_allclose(found.gallery_features["colour"], list(colours.values()), atol=1)


def test_everything_at_once_from_features(monkeypatch: pytest.MonkeyPatch) -> None:
    query_features, gallery_features, query, gallery = random_set()
    call = (query_features, gallery_features, query.people, gallery.people, query.cameras, gallery.cameras)
    plain = evaluate_features(*call)
    assert plain.mAP == score(query_features, gallery_features, query, gallery).mAP
    low, high = plain.interval("mAP") or (1, 0)
    assert low < plain.mAP < high
    assert plain.interval("rank1") is not None
    assert evaluate_features(*call, bootstrap=None).interval("mAP") is None
    assert "[" in str(plain).split(",")[0]
    # Options say what was done, and change the scores.
    found = evaluate_features(*call, flipped=(query_features + 1, gallery_features + 1), expansion=True, roc=True, metric="euclidean", max_rank=7)
    assert "mirror images taken in; query expansion (k 5, alpha 3)" in str(found)
    assert found.mAP != plain.mAP
    assert len(found.cmc) == 7
    row = found.row()
    assert row["metric"] == "euclidean"
    assert 0 <= row["TPR@FPR=1e-02"] <= row["TPR@FPR=1e-01"] <= 1
    assert "rank10" not in row
    with pytest.raises(ValueError, match="flipped gallery features"):
        evaluate_features(*call, flipped=(query_features, gallery_features * np.nan))
    # Tiles of distances change nothing.
    monkeypatch.setattr(protocol, "_TILE_PAIRS", 1)
    again = evaluate_features(*call, flipped=(query_features + 1, gallery_features + 1), expansion=True, roc=True, metric="euclidean", max_rank=7)
    assert again.row() == row
    assert evaluate_features(*call, single_gallery_shot=True).cmc.shape == (50,)


def test_one_image_a_person_makes_single_gallery_shot_the_ordinary_curve() -> None:
    generator = np.random.default_rng(5)
    call = generator.normal(size=(20, 3)), generator.normal(size=(25, 3)), np.arange(20), np.arange(25)
    plain, shot = evaluate_features(*call), evaluate_features(*call, single_gallery_shot=True)
    np.testing.assert_allclose(shot.cmc, plain.cmc, atol=1e-12)
    assert "one gallery image a person" in str(shot)


def test_reranking_is_fed_and_ranked_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    query_features, gallery_features, query, gallery = random_set()
    given: dict[str, Any] = {}

    def stand_in(query_features: np.ndarray, gallery_features: np.ndarray, **options: object) -> Iterator[tuple[slice, np.ndarray]]:
        given.update(options, features=query_features)
        for start in range(0, len(query_features), 5):
            rows = slice(start, min(start + 5, len(query_features)))
            yield rows, -distances(query_features[rows], gallery_features).astype(np.float32)

    module = ModuleType("personmae.evaluation.reranking")
    module.reranked_distances = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "personmae.evaluation.reranking", module)
    call = (query_features, gallery_features, query.people, gallery.people, query.cameras, gallery.cameras)
    found = evaluate_features(*call, rerank=True, convention="transreid")
    assert {key: given[key] for key in ("definition", "k1", "k2", "weight")} == {"definition": "classic", "k1": 50, "k2": 15, "weight": 0.3}
    assert (given["metric"], given["resquare"]) == ("cosine", False)
    np.testing.assert_array_equal(given["features"], query_features)
    expected = score_tiles(
        [(slice(0, 23), -distances(query_features, gallery_features).astype(np.float32))],
        query,
        gallery,
        metric="cosine",
        scoring=ScoringConfig(convention=CONVENTIONS["transreid"]),
    )
    assert (found.mAP, found.mINP, found.cmc.tolist()) == (expected.mAP, expected.mINP, expected.cmc.tolist())
    assert "re-ranked (classic, k1 50, k2 15, weight 0.3)" in str(found)
    evaluate_features(*call, rerank=Reranking(definition="fast-reid", k1=7), metric="euclidean")
    assert (given["definition"], given["k1"]) == ("fast-reid", 7)
    assert "squared again" in str(evaluate_features(*call, rerank=True, convention="torchreid"))
    evaluate_features(*call, rerank=Reranking(), metric="euclidean")
    assert given["metric"] == "sqeuclidean"


def test_what_was_left_out_and_what_was_tied_is_counted() -> None:
    query = Labels(np.array([1, 2]), np.array([1, 1]))
    gallery = Labels(np.array([1, 1, 2, 3]), np.array([1, 2, 2, 2]))
    scores = score(np.eye(2, 3), np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]), query, gallery)
    assert scores.num_left_out == 1
    # Query 2 is as far from its own match as from everybody else; query 1 is alone with its match.
    assert scores.num_tied == 1
    assert scores.plain()["left_out"] == {"queries_without_a_match": 0, "they_are": "left out", "pairs_of_same_person_and_camera": 1}


def test_sets_without_cameras_and_of_single_shots_are_scored_as_such(tmp_path: Path) -> None:
    for folder in ("query", "bounding_box_test"):
        (tmp_path / folder).mkdir()
        for person, colour in {1: (200, 30, 30), 2: (30, 200, 30)}.items():
            for shot in range(2 if folder == "bounding_box_test" else 1):
                Image.new("RGB", (9, 17), colour).save(tmp_path / folder / f"{person:04d}_c1s1_000000_0{shot}.png")
    reid_set = read_market_layout(tmp_path)

    def describe(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"colour": batch.to(torch.float32).mean(dim=(1, 2))}

    with pytest.raises(UserError, match="if the set has no cameras, give none"):
        evaluate(describe, reid_set, size=(16, 8))
    without = dataclasses.replace(reid_set, has_cameras=False, single_gallery_shot=True)
    scores = evaluate(describe, without, size=(16, 8)).scores["colour"]
    assert scores.mAP == 1
    assert scores.convention.single_gallery_shot
    assert scores.notes == ("no cameras, nothing left out", "CMC of one gallery image a person")
    assert scores.names == [str(image.path) for image in reid_set.query]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(CONVENTIONS)), tile=st.integers(1, 4))
def test_all_scores_equal_an_oracle_in_plain_loops(data: st.DataObject, name: str, tile: int) -> None:
    """From a matrix of distances with many ties to every score, under each convention."""
    image = st.tuples(st.integers(0, 3), st.integers(1, 2))
    query = data.draw(st.lists(image, min_size=1, max_size=5))
    gallery = data.draw(st.lists(image, min_size=1, max_size=8))
    rows = [data.draw(st.lists(st.integers(0, 3), min_size=len(gallery), max_size=len(gallery))) for _ in query]
    parts = [Labels(np.array([p for p, _ in part]), np.array([c for _, c in part])) for part in (query, gallery)]
    distance = np.array(rows, np.float64)
    tiles = [(slice(start, min(start + tile, len(query))), distance[start : start + tile]) for start in range(0, len(query), tile)]
    convention = CONVENTIONS[name]
    scoring = ScoringConfig(convention=convention, max_rank=9, bootstrap=None)
    precision: list[float] = []
    penalty: list[float] = []
    hits: list[list[bool]] = []
    for row, own in zip(rows, query, strict=True):
        order = sorted(range(len(gallery)), key=lambda g: (row[g], g if convention.ties == "by index" else -g))
        order = [g for g in order if gallery[g] != own]
        found = [gallery[g][0] == own[0] for g in order]
        ranks = [rank for rank, hit in enumerate(found, start=1) if hit]
        if not ranks:
            if convention.unmatched == "zero":
                precision, penalty, hits = [*precision, 0.0], [*penalty, 0.0], [*hits, [False] * 9]
            continue
        if convention.average_precision == "ties pooled":
            seen = [sum(row[other] <= row[g] for other in order) for g in order if gallery[g][0] == own[0]]
            right = [sum(row[other] <= row[g] for other in order if gallery[other][0] == own[0]) for g in order if gallery[g][0] == own[0]]
            parts_of = [a / b for a, b in zip(right, seen, strict=True)]
        else:
            parts_of = [number / rank for number, rank in enumerate(ranks, start=1)]
            if convention.average_precision == "trapezoid":
                earlier = [(number - 1) / (rank - 1) if rank > 1 else 1.0 for number, rank in enumerate(ranks, start=1)]
                parts_of = [(a + b) / 2 for a, b in zip(parts_of, earlier, strict=True)]
        precision.append(sum(parts_of) / len(ranks))
        penalty.append(len(ranks) / ranks[-1])
        hits.append([ranks[0] <= k for k in range(1, 10)])
    if not any(map(any, hits)):
        with pytest.raises(UserError, match="nothing to score"):
            score_tiles(tiles, *parts, metric="cosine", scoring=scoring)
        return
    scores = score_tiles(tiles, *parts, metric="cosine", scoring=scoring)
    assert scores.mAP == pytest.approx(np.mean(precision), abs=1e-12)
    assert scores.mINP == pytest.approx(np.mean(penalty), abs=1e-12)
    np.testing.assert_allclose(scores.cmc, np.mean(hits, axis=0), atol=1e-12)
    assert scores.num_scored == len(precision)
