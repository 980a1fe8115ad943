"""An index kept with its run."""

import numpy as np
import pytest
from crops import draw_crops

from personmae.configs import UserError
from personmae.data.image_index import build_index
from personmae.data.kept_index import keep_index, read_kept_index


def test_what_is_kept_is_read_back_whatever_became_of_the_files(tmp_path):
    source = draw_crops(tmp_path / "crops", num_images=5)
    (source / "broken.jpg").write_bytes(b"no image")
    index = build_index(source, tmp_path / "cache", progress=False)
    keep_index(source, index, tmp_path / "index.npz")
    for path in source.rglob("*.jpg"):
        path.unlink()
    kept = read_kept_index(tmp_path / "index.npz")
    assert kept.source == source
    assert kept.index.digest() == index.digest()
    assert [kept.index.path(n) for n in range(5)] == [index.path(n) for n in range(5)]
    assert kept.index.rejected == index.rejected
    assert all(np.array_equal(getattr(kept.index, name), getattr(index, name)) for name in ("heights", "widths", "num_bytes", "plain"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "crops", "index.npz"]


def test_missing_damaged_and_refused_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"index\.npz"):
        read_kept_index(tmp_path / "index.npz")
    source = draw_crops(tmp_path / "crops", num_images=2)
    index = build_index(source, tmp_path / "cache", progress=False)
    keep_index(source, index, tmp_path / "index.npz")
    whole = (tmp_path / "index.npz").read_bytes()
    (tmp_path / "index.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"index\.npz"):
        read_kept_index(tmp_path / "index.npz")
    with pytest.raises(UserError, match=r"cannot write .*index\.npz"):
        keep_index(source, index, tmp_path / "gone" / "index.npz")
