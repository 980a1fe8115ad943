"""What is written of scores can be read again and says the same."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from personmae.evaluation.protocol import evaluate_features
from personmae.evaluation.score_files import QUERY_COLUMNS, query_rows, score_table, write_query_table, write_scores


@pytest.fixture(scope="module")
def scores():
    generator = np.random.default_rng(0)
    people, cameras = generator.integers(0, 6, 50), generator.integers(1, 3, 50)
    # The first query's person is not in the gallery.
    people[0] = 9
    features = generator.normal(size=(50, 4))
    names = [f"folder, with comma/{q}.jpg" for q in range(15)]
    call = (features[:15], features[15:], people[:15], people[15:], cameras[:15], cameras[15:])
    return {"plain": evaluate_features(*call, query_names=names), "roc": evaluate_features(*call, roc=True, convention="layumi", bootstrap=None)}


def test_scores_are_written_whole(scores, tmp_path):
    path = tmp_path / "scores.json"
    write_scores(path, scores, set="somewhere", size=np.int64(3), checkpoint=tmp_path)
    content = json.loads(path.read_text())
    assert (content["set"], content["size"], content["checkpoint"]) == ("somewhere", 3, str(tmp_path))
    plain, roc = content["scores"]["plain"], content["scores"]["roc"]
    assert plain["mAP"] == scores["plain"].mAP
    assert plain["intervals"]["rank1"] == list(scores["plain"].interval("rank1"))
    assert plain["bootstrap"] == {"num_resamples": 1000, "level": 0.95, "seed": 0, "num_people": len(np.unique(scores["plain"].query.people[1:]))}
    assert (plain["num_queries"], plain["num_valid"], plain["num_gallery"], plain["num_scored"]) == (15, 14, 35, 14)
    assert plain["left_out"]["queries_without_a_match"] == 1
    assert plain["left_out"]["pairs_of_same_person_and_camera"] > 0
    assert len(plain["cmc"]) == 50
    assert roc["convention"]["average_precision"] == "trapezoid"
    assert (roc["num_scored"], roc["left_out"]["they_are"]) == (15, "zero")
    assert "intervals" not in roc
    assert roc["pairs"]["same"] + roc["pairs"]["different"] + roc["left_out"]["pairs_of_same_person_and_camera"] == 15 * 35
    assert 0 <= roc["TPR@FPR=1e-01"] <= 1
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    with pytest.raises(TypeError, match="cannot stand in a JSON file"):
        write_scores(path, scores, what=object())


def test_queries_are_written_as_csv_and_json(scores, tmp_path):
    found = scores["plain"]
    write_query_table(tmp_path / "queries.csv", found)
    write_query_table(tmp_path / "queries.json", found)
    with (tmp_path / "queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == QUERY_COLUMNS
    assert len(rows) == 15
    assert json.loads((tmp_path / "queries.json").read_text()) == query_rows(found)
    assert (rows[0]["query"], rows[0]["average_precision"], rows[0]["first_match_rank"], rows[0]["num_matches"]) == (found.names[0], "", "", "0")
    precision = [float(row["average_precision"]) for row in rows if row["average_precision"]]
    assert np.mean(precision) == pytest.approx(found.mAP)
    first = [int(row["first_match_rank"]) for row in rows if row["first_match_rank"]]
    assert np.mean(np.array(first) <= 5) == pytest.approx(found.rank(5))
    assert [row["query"] for row in query_rows(scores["roc"])] == list(range(15))


def test_the_table_has_a_line_for_each(scores):
    table = score_table({("market1501", "class token"): scores["plain"], ("a set of long name", "mean"): scores["roc"]}).splitlines()
    assert len(table) == 5
    assert table[0].split() == ["set", "feature", "mAP", "mINP", "rank-1", "rank-5", "rank-10", "rank-20", "queries", "gallery", "rules"]
    assert f"{100 * scores['plain'].mAP:.2f} [" in table[2]
    assert "14 of 15" in table[2]
    assert "layumi, " in table[3]
    assert "95% confidence interval" in table[4]
    assert table[0].index("mAP") == table[2].index(f"{100 * scores['plain'].mAP:.2f}")
