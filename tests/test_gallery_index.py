"""A gallery on disk: exact by brute force, kept up with its folder, compressed and still near; damaged ones are told. And the search over it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from personmae.configs import UserError
from personmae.evaluation import gallery_index
from personmae.evaluation.gallery_index import new_gallery, open_gallery
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS
from personmae.recipes.programs import SearchConfig
from personmae.tasks import searching


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, width=32, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(200, width))
    return unit(centres[rng.integers(0, 200, count)] + 0.3 * rng.normal(size=(count, width)))


def stamped(names):
    return [(name, (1, 1)) for name in names]


def brute_force(features, names, queries, k):
    order = np.argsort(-(queries.astype(np.float64) @ features.T.astype(np.float64)), axis=1, kind="stable")[:, :k]
    return [[names[place] for place in row] for row in order]


def test_flat_is_exact_through_additions_changes_and_removals(tmp_path):
    features = clustered(300)
    index = new_gallery(tmp_path / "g", "weights 1", tmp_path, "flat", 32)
    names = [f"{number}.jpg" for number in range(300)]
    index.update(stamped(names[:200]), features[:200], [])
    index.save()
    index = open_gallery(tmp_path / "g")
    added, gone = index.changes({**dict.fromkeys(names[10:], (1, 1)), "50.jpg": (2, 1)})
    assert (sorted(added), sorted(gone)) == (sorted([*names[200:], "50.jpg"]), sorted(names[:10]))
    # 50.jpg shows somebody else now.
    features[50] = -features[50]
    # An addition that was stopped before it was saved.
    open_gallery(tmp_path / "g").update(stamped(["lost"]), clustered(1, seed=9), [])
    index.update([*stamped(names[200:]), ("50.jpg", (2, 1))], np.concatenate([features[200:], features[50:51]]), gone)
    index.save()
    index = open_gallery(tmp_path / "g")
    assert len(index) == 290
    queries = clustered(7, seed=1)
    hits = index.search(queries, 5)
    assert hits.names == brute_force(features[10:], names[10:], queries, 5)
    best = [features[names.index(row[0])] @ query for row, query in zip(hits.names, queries, strict=True)]
    assert np.allclose([row[0] for row in hits.similarities], best, atol=1e-5)
    assert len(index.search(queries, 1000).names[0]) == 290


def test_compressed_lists_find_the_near_ones(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(gallery_index, "MIN_COMPRESSED", 3000)
    features = clustered(4000)
    names = [f"{number}.jpg" for number in range(4000)]
    index = new_gallery(tmp_path / "g", "weights 1", tmp_path, "ivf-pq", 32)
    with pytest.raises(UserError, match="at least 3,000"):
        new_gallery(tmp_path / "h", "weights 1", tmp_path, "ivf-pq", 32).update(stamped(names[:100]), features[:100], [])
    index.update(stamped(names[:3500]), features[:3500], [])
    index.save()
    index = open_gallery(tmp_path / "g")
    index.update(stamped(names[3500:]), features[3500:], names[:100])
    index.save()
    index = open_gallery(tmp_path / "g")
    queries = unit(features[200:240] + 0.02 * np.random.default_rng(1).normal(size=(40, 32)))
    hits = index.search(queries, 10)
    expected = brute_force(features[100:], names[100:], queries, 10)
    recall = np.mean([len(set(found) & set(wanted)) / 10 for found, wanted in zip(hits.names, expected, strict=True)])
    assert recall > 0.9
    # Similarities are of the features themselves, in order.
    for row, values, query in zip(hits.names, hits.similarities, queries, strict=True):
        assert np.allclose(values, [features[names.index(name)] @ query for name in row], atol=1e-6)
        assert values == sorted(values, reverse=True)


def test_damaged_folders_are_told(tmp_path):
    index = new_gallery(tmp_path / "g", "weights 1", tmp_path, "flat", 32)
    with pytest.raises(UserError, match="empty"):
        index.search(clustered(1), 3)
    index.update(stamped(["a"]), clustered(1), [])
    with pytest.raises(ValueError, match=r"\[1, 32\]"):
        index.update(stamped(["b"]), clustered(2), [])
    index.save()
    table = (tmp_path / "g" / "gallery.json").read_text()
    for content, word in (("{", "damaged"), (table.replace('"format": 1', '"format": 9'), "format 9"), (table.replace("[[", "[[1, 2, "), "damaged")):
        (tmp_path / "g" / "gallery.json").write_text(content)
        with pytest.raises(UserError, match=word):
            open_gallery(tmp_path / "g")
    (tmp_path / "g" / "gallery.json").write_text(table)
    (tmp_path / "g" / "features.f32").write_bytes(b"1234")
    with pytest.raises(UserError, match="cut off"):
        open_gallery(tmp_path / "g")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(UserError, match="no gallery index"):
        open_gallery(tmp_path / "other")
    assert open_gallery(tmp_path / "new") is None
    # Stopped before the first save.
    new_gallery(tmp_path / "stopped", "weights 1", tmp_path, "flat", 32).update(stamped(["a"]), clustered(1), [])
    assert open_gallery(tmp_path / "stopped") is None


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Twelve pictures: six of one colour each, and each again, darker; and a run folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "gallery").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = np.clip(rng.integers(0, 256, 3) + rng.integers(-20, 20, (128, 64, 3)), 0, 255)
        for name, scale in (("a", 1.0), ("b", 0.95)):
            Image.fromarray((pixels * scale).astype(np.uint8)).save(tmp_path / "gallery" / f"{number}{name}.png")
    encoder = VisionTransformer(ENCODERS["vit-nano"])
    initialise(encoder, torch.Generator().manual_seed(0))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    return tmp_path


def test_a_search_finds_the_other_picture_and_reads_only_what_is_new(workplace):
    said = []
    settings = {"gallery": workplace / "gallery", "checkpoint": workplace / "encoder.safetensors"}
    query = workplace / "gallery" / "3a.png"
    outputs = {"json": workplace / "found.json", "page": workplace / "found.html"}
    results = searching.main(SearchConfig(query=query, top=3, **outputs, **settings), say=said.append)
    assert "12 new or changed" in " ".join(map(str, said))
    # The query itself, which is in the gallery, is not a result.
    assert results[0]["found"][0]["name"] == "3b.png"
    assert len(results[0]["found"]) == 3
    assert "3a.png" not in [hit["name"] for hit in results[0]["found"]]
    assert json.loads((workplace / "found.json").read_text()) == results
    page = (workplace / "found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert "3b.png" in page

    (workplace / "gallery" / "0a.png").unlink()
    Image.fromarray(np.zeros((128, 64, 3), np.uint8)).save(workplace / "gallery" / "new.png")
    said.clear()
    results = searching.main(SearchConfig(query=workplace / "gallery", top=20, **settings), say=said.append)
    assert "12 pictures, 1 new or changed" in " ".join(map(str, said))
    assert [len(result["found"]) for result in results] == [11] * 12
    assert any("1.0000" in str(line) or "0.9" in str(line) for line in said)


def test_an_index_of_other_weights_or_another_kind_is_not_mixed(workplace):
    settings = {"gallery": workplace / "gallery", "query": workplace / "gallery" / "1a.png", "checkpoint": workplace / "encoder.safetensors"}
    searching.main(SearchConfig(**settings, quiet=True), say=str)
    with pytest.raises(UserError, match="other weights or settings"):
        searching.main(SearchConfig(**settings, flip=True), say=str)
    with pytest.raises(UserError, match="is flat, not ivf-pq"):
        searching.main(SearchConfig(**settings, kind="ivf-pq"), say=str)
    (workplace / "other").mkdir()
    Image.fromarray(np.zeros((128, 64, 3), np.uint8)).save(workplace / "other" / "x.png")
    with pytest.raises(UserError, match="not of"):
        searching.main(SearchConfig(**settings | {"gallery": workplace / "other", "index": workplace / "gallery-index"}), say=str)
