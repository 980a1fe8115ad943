"""The benchmark of loading: every way that can run here gives batches, and its figures are what they say."""

import json

import pytest

from benchmarks import loading
from benchmarks._loading_ways import WAYS, why_not
from personmae.data.loaders import has_dali


def test_every_way_is_timed_or_says_why_not(tmp_path, capsys):
    flags = ["--num-images", "40", "--num-batches", "2", "--num-turns", "1", "--batch-size", "8", "--size", "64", "32", "--num-cores", "1"]
    assert loading.main([*flags, "--device", "cpu", "--output", str(tmp_path / "loading.json")]) == 0
    record = json.loads((tmp_path / "loading.json").read_text())
    rows = {row["way"]: row for row in record["results"] if "stage" not in row}
    assert set(rows) == set(WAYS)
    usual = rows["usual"]["pairs_per_second"]["median"]
    for way, row in rows.items():
        if way.startswith("dali") and not (has_dali() and way == "dali, cpu"):
            assert row["left_out"]
            continue
        assert row["pairs_per_second"]["median"] > 0
        assert way == "usual" or row["times_as_fast_as_usual"] == pytest.approx(row["pairs_per_second"]["median"] / usual)
    for way in ("threads", "usual"):
        shares = [row["share"] for row in record["results"] if row["way"] == way and "stage" in row]
        assert len(shares) >= 3
        assert sum(shares) == pytest.approx(1)
    said = capsys.readouterr().out
    assert "times as fast as the usual one" in said
    assert "dali, mixed        left out: " in said


def test_cores_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        loading.main(["--num-cores", "0"])
    assert "--num-cores is 0; this machine has" in capsys.readouterr().err


def test_what_needs_a_gpu_says_so():
    import torch

    assert why_not("threads", torch.device("cpu")) is None
    assert why_not("dali, mixed", torch.device("cpu"))
