"""The benchmark of ranking: on a few images, that it refuses wrong results, and that it skips what does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _ranking_cases, ranking_speed
from benchmarks._ranking_cases import check, draw, size_of
from personmae.evaluation import memory

ROOT = Path(__file__).resolve().parent.parent


def test_it_runs_and_says_what_it_found(tmp_path):
    options = ["--size", "400", "--num-turns", "2", "--cluster", "300", "--rerank", "300", "--output", str(tmp_path / "r.json")]
    command = [sys.executable, str(ROOT / "benchmarks" / "ranking_speed.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    jaccard, rows = rows[len(ranking_speed.CASES) :], rows[: len(ranking_speed.CASES)]
    assert [row["case"] for row in rows] == list(ranking_speed.CASES)
    assert [(row["case"], row["way"]) for row in jaccard] == [("cluster 300", "sparse"), ("cluster 300", "dense"), ("rerank", "reranking")]
    assert jaccard[0]["same_labels"]
    assert jaccard[1]["same_labels"]
    ran = [row for row in rows if "skipped" not in row]
    assert len(ran) >= 3
    for row in ran:
        assert row["num_gallery"] == 400
        assert row["seconds"]["num"] == 2
        assert row["seconds"]["median"] > 0
        assert 0.05 < row["peak_gib"]["median"] < 4
        assert row["mAP"] == pytest.approx(ran[0]["mAP"], abs=1e-3)


def test_it_refuses_what_differs(monkeypatch):
    check(size_of("300"), 2.0)
    ours = _ranking_cases.match_ranks

    def wrong(*arguments):
        ranks = ours(*arguments)
        ranks.closer[0] += 1
        return ranks

    monkeypatch.setattr(_ranking_cases, "match_ranks", wrong)
    with pytest.raises(AssertionError, match="differ"):
        check(size_of("300"), 2.0)


def test_what_does_not_fit_is_skipped_with_the_estimate(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 * 2**30)
    case = next(case for name, case in ranking_speed.CASES.items() if "TransReID" in name)
    assert ranking_speed.why_not(case, size_of("market")) == ""
    assert "needs about 19.8 GiB, and 8.0 GiB are free" in ranking_speed.why_not(case, size_of("msmt17"))


def test_the_drawn_sets_have_the_counts_of_their_namesakes():
    with pytest.raises(ValueError, match="'duke' is no size"):
        size_of("duke")
    drawn = draw(size_of("market")._replace(num_gallery=5000), 1.0)
    assert (drawn.gallery.people == 0).sum() == 2798
    assert (drawn.query.people > 0).all()
    assert len(np.unique(drawn.query.cameras)) == 6
