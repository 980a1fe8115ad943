"""Features kept on disk: found again by content, never stale, safe beside other writers and damaged files, bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from personmae.evaluation import features as features_file
from personmae.evaluation.colour_histogram import describe_colours
from personmae.evaluation.feature_cache import FeatureCache, default_folder
from personmae.evaluation.features import describer_identity, extract_features, normalised
from personmae.models.vit import VisionTransformer, VitConfig, initialise

SIZE = (8, 4)


class Counting:
    """A describer that counts the images it was shown."""

    def __init__(self) -> None:
        self.num_images = 0

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        self.num_images += len(batch)
        return {"mean": batch.float().mean(dim=(1, 2)), "first": batch[:, 0, 0].float()}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    found = [tmp_path / "images" / f"{number}.bmp" for number in range(11)]
    for number, path in enumerate(found):
        Image.new("RGB", (5, 12), (number * 20, 7, 255 - number)).save(path)
    return found


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def extract(paths: list[Path], cache: FeatureCache | None, identity: str = "counting", **settings) -> tuple[dict[str, np.ndarray], int]:
    """The features, and how many images had to be described for them."""
    describe = Counting()
    found = extract_features(describe, paths, size=settings.pop("size", SIZE), batch_size=4, cache=cache, identity=identity, **settings)
    return found, describe.num_images


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def segments(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.npz"))


def test_a_second_extraction_describes_nothing(paths: list[Path], cache: FeatureCache) -> None:
    plain, _ = extract(paths, None)
    first, num_first = extract(paths, cache)
    second, num_second = extract(paths, cache)
    assert (num_first, num_second) == (11, 0)
    assert_equal(first, plain)
    assert_equal(second, plain)
    # In another order, some of them twice, and under other names.
    moved = [path.rename(path.with_suffix(".moved")) for path in paths]
    chosen = [3, 3, 10, 0]
    third, num_third = extract([moved[number] for number in chosen], cache)
    assert num_third == 0
    assert_equal(third, {name: array[chosen] for name, array in plain.items()})


def test_new_images_alone_are_described(paths: list[Path], cache: FeatureCache) -> None:
    plain, _ = extract(paths, None)
    extract(paths[2:6], cache)
    mixed, num_mixed = extract(paths, cache)
    assert num_mixed == 7
    assert_equal(mixed, plain)
    assert extract(paths, cache)[1] == 0


def test_a_file_changed_in_place_is_seen_though_size_and_date_stay(paths: list[Path], cache: FeatureCache) -> None:
    extract(paths, cache)
    status = paths[5].stat()
    data = bytearray(paths[5].read_bytes())
    data[-1] ^= 255
    with open(paths[5], "r+b") as file:
        file.write(data)
    os.utime(paths[5], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (paths[5].stat().st_size, paths[5].stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    changed, num_changed = extract(paths, cache)
    assert num_changed == 1
    assert_equal(changed, extract(paths, None)[0])


def test_whatever_decides_a_feature_is_in_its_key(paths: list[Path], cache: FeatureCache) -> None:
    extract(paths, cache)
    for settings in ({"identity": "other"}, {"size": (4, 8)}, {"flip_test": "mean"}, {"flip_test": "unit-sum"}, {"precision": "bf16"}):
        found, number = extract(paths, cache, **settings)  # type: ignore[arg-type]
        assert number == 11 * (2 if "flip_test" in settings else 1), settings
        assert_equal(found, extract(paths, None, **settings)[0])  # type: ignore[arg-type]
    assert extract(paths, cache, num_threads=5)[1] == 0


def damage(kind: str, path: Path) -> None:
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bit rot":
        middle = data.index(np.float32(7).tobytes())
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        np.savez(path, digests=np.zeros((3, 16), np.uint8))


@pytest.mark.parametrize("kind", ["truncated", "empty", "bit rot", "other content"])
def test_a_damaged_file_counts_as_absent(paths: list[Path], cache: FeatureCache, kind: str) -> None:
    plain, _ = extract(paths, cache)
    extract([paths[0]], cache, identity="untouched")
    for path in segments(cache):
        if len(np.load(path)["digests"]) == 11:
            damage(kind, path)
    again, number = extract(paths, cache)
    assert number == 11
    assert_equal(again, plain)
    assert extract(paths, cache)[1] == 0
    assert len(segments(cache)) == 2


def test_writers_at_the_same_time_do_each_other_no_harm(paths: list[Path], cache: FeatureCache, tmp_path: Path) -> None:
    program = tmp_path / "writer.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom test_feature_cache import *\n"
        "paths = sorted(Path(sys.argv[2]).iterdir())\n"
        "for round in range(6):\n"
        "    for start in range(len(paths)):\n"
        "        found, _ = extract(paths[start:], FeatureCache(Path(sys.argv[3]), max_gib=4e-6))\n"
        "        assert_equal(found, extract(paths[start:], None)[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(Path(__file__).parent), str(paths[0].parent), str(cache.folder)]
    writers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [writer.communicate(timeout=300)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    assert list(cache.folder.rglob("*.partial")) == []


def test_the_oldest_goes_when_the_cache_is_full(paths: list[Path], cache: FeatureCache) -> None:
    extract(paths, cache, identity="a")
    size = segments(cache)[0].stat().st_size
    small = FeatureCache(cache.folder, max_gib=2.5 * size / 2**30)
    extract(paths, small, identity="b")
    for age, path in enumerate(sorted(segments(cache), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (time.time() - 100 + age, time.time() - 100 + age))
    assert extract(paths, small, identity="a")[1] == 0  # used just now, so that b is the oldest
    extract(paths, small, identity="c")
    assert sum(path.stat().st_size for path in segments(cache)) <= 2.5 * size
    assert [extract(paths, small, identity=identity)[1] for identity in "ac"] == [0, 0]
    assert extract(paths, small, identity="b")[1] == 11
    said: list[str] = []
    found, _ = extract(paths, FeatureCache(cache.folder, max_gib=1e-9), identity="d", announce=said.append)
    assert_equal(found, extract(paths, None)[0])
    assert len(said) == 1
    assert "more than the 1e-09 GiB" in said[0]


def test_leftovers_of_killed_writers_are_removed_in_time(paths: list[Path], cache: FeatureCache) -> None:
    extract(paths, cache)
    old, new = (segments(cache)[0].with_name(name) for name in ("old.partial", "new.partial"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    extract(paths, cache, identity="other")
    assert (old.exists(), new.exists()) == (False, True)


def test_what_was_described_before_an_error_is_kept(paths: list[Path], cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_file, "SEGMENT_IMAGES", 4)
    whole = paths[9].read_bytes()
    paths[9].write_bytes(whole[:40])
    with pytest.raises(ValueError, match=r"9\.bmp"):
        extract(paths, cache)
    paths[9].write_bytes(whole)
    found, number = extract(paths, cache)
    assert number in (3, 7)  # as many as were waiting when the error came
    assert_equal(found, extract(paths, None)[0])


def test_a_cache_that_cannot_be_written_is_said_once(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said: list[str] = []
    found, number = extract(paths, FeatureCache(tmp_path / "file"), announce=said.append)
    assert number == 11
    assert_equal(found, extract(paths, None)[0])
    assert len(said) == 1
    assert "cannot write" in said[0]


def test_a_describer_without_identity_is_not_kept(paths: list[Path], cache: FeatureCache) -> None:
    said: list[str] = []
    for _ in range(2):
        describe = Counting()
        extract_features(describe, paths, size=SIZE, cache=cache, announce=said.append)
        assert describe.num_images == 11
    assert segments(cache) == []
    assert "give it an identity" in said[0]


def test_an_identity_used_for_another_describer_is_noticed(paths: list[Path], cache: FeatureCache) -> None:
    extract(paths[:5], cache)
    with pytest.raises(ValueError, match="give it another identity"):
        extract_features(lambda batch: {"else": batch.float().mean(dim=(1, 2))}, paths, size=SIZE, cache=cache, identity="counting")


def encoder(seed: int = 0, **settings) -> VisionTransformer:
    made = VisionTransformer(VitConfig(image_size=(32, 16), patch_px=8, width=16, depth=2, num_heads=2, **settings))
    initialise(made, torch.Generator().manual_seed(seed))
    return made.eval()


def test_the_identity_of_an_encoder_changes_with_all_that_decides_its_features() -> None:
    def changed(change: Callable[[VisionTransformer], object]) -> str | None:
        made = encoder()
        change(made)
        return describer_identity(made.describe)

    same = describer_identity(encoder().describe)
    assert same is not None
    assert same == describer_identity(encoder().describe)
    others = [
        describer_identity(encoder(1).describe),
        describer_identity(encoder(std=(0.5, 0.5, 0.5)).describe),
        describer_identity(encoder().forward),  # type: ignore[arg-type]
        changed(lambda made: made.train()),
        changed(lambda made: made.norm.weight.data[3].add_(1e-6)),
        changed(lambda made: made.pos_embed[0, 2, 1].add_(1e-3)),
        changed(lambda made: setattr(made.blocks[0].attn, "num_heads", 4)),
        changed(lambda made: setattr(made.blocks[0].norm1, "eps", 1e-5)),
        changed(lambda made: made.double()),
    ]
    assert None not in others
    assert len({same, *others}) == 1 + len(others)
    # What cannot be told is not guessed.
    assert changed(lambda made: made.norm.register_forward_hook(lambda *_: None)) is None
    assert changed(lambda made: setattr(made, "scale", lambda x: x)) is None
    assert changed(lambda made: setattr(made, "thing", object())) is None


def test_other_describers() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).eval()
    one, other = normalised(module, (0.5,) * 3, (0.5,) * 3), normalised(module, (0.4,) * 3, (0.5,) * 3)
    assert len({describer_identity(one), describer_identity(other), describer_identity(describe_colours)}) == 3
    assert describer_identity(lambda batch: {}) is None
    assert describer_identity(Counting()) is None


def test_the_users_cache_is_where_the_indexes_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == FeatureCache().folder == tmp_path / "personmae" / "features"
