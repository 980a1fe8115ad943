"""The page of ranked lists: what it is told, what it may cost, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import test_report
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.evaluation.measures import measure_queries
from personmae.evaluation.ranking import Labels, labels_of, match_ranks, nearest_gallery
from personmae.visuals.ranked_lists import RIGHT, WRONG
from personmae.visuals.ranked_page import RankedLists, rank_queries, write_ranked_page

chromium = test_report.chromium

NUM_QUERIES, NUM_GALLERY = 23, 40


def people(folder: Path, part: str, number: int) -> list[PersonImage]:
    (folder / part).mkdir(parents=True)
    found = []
    for index in range(number):
        path = folder / part / f"{index:03d}.png"
        Image.new("RGB", (12, 24), ((index * 37) % 256, (index * 11) % 256, 200 if part == "query" else 40)).save(path)
        found.append(PersonImage(path, index % 5, index // 5 % 3))
    return found


Set = tuple[list[PersonImage], list[PersonImage], RankedLists]


@pytest.fixture
def ranked(tmp_path: Path) -> Set:
    query, gallery = people(tmp_path / "set", "query", NUM_QUERIES), people(tmp_path / "set", "gallery", NUM_GALLERY)
    gallery = [image if image.person != 4 else PersonImage(image.path, 9, image.camera) for image in gallery]
    random = np.random.default_rng(0)
    lists = rank_queries(random.standard_normal((NUM_QUERIES, 4)), random.standard_normal((NUM_GALLERY, 4)), labels_of(query), labels_of(gallery))
    return query, gallery, lists


def content_of(page: Path) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def even_maps(paths: Sequence[Path]) -> np.ndarray:
    maps = np.full((len(paths), 4, 2), 1 / 8, np.float32)
    maps[:, 1, 0], maps[:, 2, 1] = 2 / 8, 0
    return maps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_nearest=st.integers(1, 12))
def test_lists_are_those_of_the_evaluation(seed: int, num_nearest: int) -> None:
    random = np.random.default_rng(seed)
    query, gallery = (Labels(random.integers(0, 4, count), random.integers(0, 3, count)) for count in (7, 20))
    # Few values, so that there are many ties.
    one, other = (random.integers(0, 3, (count, 2)).astype(np.float64) for count in (7, 20))
    lists = rank_queries(one, other, query, gallery, metric="euclidean", num_nearest=num_nearest)
    scores = measure_queries(match_ranks(one, other, query, gallery, "euclidean"))
    np.testing.assert_allclose(lists.average_precision, scores.average_precision, rtol=1e-12)
    np.testing.assert_array_equal(lists.first_match, scores.first_match)
    expected = nearest_gallery(one, other, query, gallery, num_nearest, "euclidean")
    assert lists.match_ranks is not None
    for row in range(7):
        found = lists.nearest[row][lists.nearest[row] >= 0]
        own = (gallery.people[found] == query.people[row]) & (gallery.cameras[found] == query.cameras[row])
        assert found[~own].tolist() == [index for index in expected[row].tolist() if index >= 0]
        distance = np.linalg.norm(one[row] - other, axis=1)
        np.testing.assert_allclose(lists.distance[row, : len(found)], distance[found], rtol=1e-12)
        assert found.tolist() == np.argsort(distance, kind="stable")[: len(found)].tolist()
        assert len(lists.match_ranks[row]) == ((gallery.people == query.people[row]) & (gallery.cameras != query.cameras[row])).sum()


def test_the_page_is_told_the_lists(ranked: Set, tmp_path: Path) -> None:
    query, gallery, lists = ranked
    page = write_ranked_page(tmp_path / "page", query, gallery, lists, title="A set", subtitle="mAP 12.3 %", num_shown=4)
    assert page == tmp_path / "page" / "index.html"
    content = content_of(page)
    assert (content["width"], content["height"], content["shown"], content["maps"]) == (80, 160, 4, None)
    assert len(content["queries"]) == NUM_QUERIES
    for number, (image, precision, first, nearest, distances, ranks, count) in enumerate(content["queries"]):
        assert content["images"][image] == [f"query/{number:03d}.png", query[number].person, query[number].camera]
        scored = lists.average_precision[number]
        assert precision is None if np.isnan(scored) else precision == pytest.approx(scored, abs=1e-5)
        assert first == lists.first_match[number] + 1
        shown = [gallery[index] for index in lists.nearest[number, : len(nearest)]]
        assert [content["images"][other] for other in nearest] == [[f"gallery/{image.path.name}", image.person, image.camera] for image in shown]
        assert sum((image.person, image.camera) != (query[number].person, query[number].camera) for image in shown) == 4
        np.testing.assert_allclose(distances, lists.distance[number, : len(nearest)], atol=1e-5)
        assert lists.match_ranks is not None
        assert (ranks, count) == (lists.match_ranks[number][:12].tolist(), len(lists.match_ranks[number]))
    thumbnails = sorted((tmp_path / "page" / "images").rglob("*.jpg"))
    assert [path.name for path in thumbnails] == [f"{number:06d}.jpg" for number in range(len(content["images"]))]
    # Each picture once, and each the one that its entry names.
    assert len({entry[0] for entry in content["images"]}) == len(thumbnails)
    for path, (name, _, _) in zip(thumbnails, content["images"], strict=True):
        with Image.open(path) as thumbnail, Image.open(tmp_path / "set" / name) as original:
            assert thumbnail.size == (80, 160)
            assert np.abs(np.asarray(thumbnail, int)[80, 40] - np.asarray(original, int)[0, 0]).max() < 8


def test_text_is_escaped_and_nothing_is_requested(ranked: Set, tmp_path: Path) -> None:
    query, gallery, lists = ranked
    odd = tmp_path / "set" / "query" / "<\udce9>"
    odd.mkdir()
    nasty = odd / "script><script>alert(1)<!--'\".png"
    shutil.copy(query[0].path, nasty)
    query = [PersonImage(nasty, query[0].person, query[0].camera), *query[1:]]
    title = "</title><script>document.title = 'taken over'</script>\udce9"
    page = write_ranked_page(tmp_path / "page", query, gallery, lists, title=title, subtitle="<b>", notes=["<i>"])
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2
    assert "<b>" not in text
    assert "<i>" not in text.replace('make("i")', "")
    assert "<!--" not in text
    assert any(name.endswith("alert(1)<!--'\".png") for name, _, _ in content_of(page)["images"])
    addresses = re.findall(r'(?:src|href|srcset|action|data)\s*=\s*"([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert addresses == ["data:,"]
    assert re.findall(r"https?:", text) == []
    assert "default-src 'none'; img-src 'self' data:; script-src 'sha256-" in text


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("maps", [None, even_maps])
def test_the_size_is_bounded_and_the_worst_queries_stay(ranked: Set, tmp_path: Path, maps: Any) -> None:
    query, gallery, lists = ranked
    whole = size_of(write_ranked_page(tmp_path / "whole", query, gallery, lists, title="t", maps=maps).parent)
    bound = 0.8 * whole / 2**20
    page = write_ranked_page(tmp_path / "page", query, gallery, lists, title="t", maps=maps, max_mib=bound)
    assert 0.5 * whole < size_of(page.parent) <= bound * 2**20
    kept = {int(content_of(page)["images"][row[0]][0][-7:-4]) for row in content_of(page)["queries"]}
    assert 0 < len(kept) < NUM_QUERIES
    assert kept == set(np.argsort(lists.average_precision, kind="stable")[: len(kept)].tolist())
    assert f"{NUM_QUERIES - len(kept)} of {NUM_QUERIES} queries, those of best average precision, are not on this page" in page.read_text()
    with pytest.raises(UserError, match="raise max_mib"):
        write_ranked_page(tmp_path / "none", query, gallery, lists, title="t", max_mib=0.03)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "set", "whole"]


def test_a_page_is_replaced_whole_and_nothing_else_is(ranked: Set, tmp_path: Path) -> None:
    query, gallery, lists = ranked
    folder = tmp_path / "page"
    folder.mkdir()
    write_ranked_page(folder, query, gallery, lists, title="old")
    old = content_of(folder / "index.html")
    write_ranked_page(folder, query[:3], gallery, RankedLists(*(getattr(lists, name)[:3] for name in lists.__dataclass_fields__)), title="new")
    assert len(content_of(folder / "index.html")["queries"]) == 3
    assert len(list(folder.rglob("*.jpg"))) == len(content_of(folder / "index.html")["images"]) < len(old["images"])
    before = (folder / "index.html").read_text()
    gallery[7].path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"007\.png"):
        write_ranked_page(folder, query, gallery, lists, title="broken")
    assert (folder / "index.html").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("<p>somebody's page</p>")
    with pytest.raises(UserError, match="something else than a page of ranked lists"):
        write_ranked_page(tmp_path / "other", query, gallery, lists, title="t")
    with pytest.raises(UserError, match="is a file"):
        write_ranked_page(query[0].path, query, gallery, lists, title="t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "page", "set"]


def test_lists_that_do_not_fit_are_refused(ranked: Set, tmp_path: Path) -> None:
    query, gallery, lists = ranked
    fields = {name: getattr(lists, name) for name in lists.__dataclass_fields__}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"nearest": lists.nearest[:, :3]}, "must both be"),
        ({"nearest": lists.nearest + 5}, "indices"),
        ({"distance": lists.distance * np.nan}, "not finite"),
        ({"average_precision": lists.average_precision[:2]}, "average_precision has 2 entries"),
        ({"match_ranks": []}, "match_ranks has 0 entries"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            write_ranked_page(tmp_path / "page", query, gallery, RankedLists(**{**fields, **change}), title="t")
    with pytest.raises(UserError, match="no query"):
        write_ranked_page(tmp_path / "page", [], gallery, lists, title="t")
    with pytest.raises(ValueError, match=r"\[\d+, rows, columns\]"):
        write_ranked_page(tmp_path / "page", query, gallery, lists, title="t", maps=lambda paths: np.zeros((2, 3, 4), np.float32))
    write_ranked_page(tmp_path / "page", query, gallery, RankedLists(**{**fields, "match_ranks": None}), title="t")


class View:
    """What a browser has made of the page."""

    def __init__(self, dom: str) -> None:
        self.dom = dom
        self.queries = [(int(person), int(camera)) for person, camera in re.findall(r"<h3>Person (\d+) · camera (\d+)</h3>", dom)]
        self.scores = re.findall(r'class="score">(?:AP )?([^<]*)', dom)
        self.kinds = [re.findall(r'<li class="(\w+)"', article) for article in re.findall(r"<article>.*?</article>", dom, re.DOTALL)]
        status = re.search(r'id="status"[^>]*>([^<]*)', dom)
        assert status is not None
        self.status = status[1]


@pytest.mark.chromium
def test_a_browser_sorts_filters_and_turns(ranked: Set, tmp_path: Path, chromium: Callable[..., str]) -> None:
    query, gallery, lists = ranked
    page = write_ranked_page(tmp_path / "page #1", query, gallery, lists, title="A <set>", num_shown=4, maps=even_maps)

    class Address:
        def __init__(self, view: str) -> None:
            self.view = view

        def as_uri(self) -> str:
            return f"{page.as_uri()}#{self.view}"

    def see(view: str) -> View:
        return View(chromium(Address(view), "--dump-dom"))

    def told(order: npt.ArrayLike) -> list[tuple[int, int]]:
        return [(query[number].person, query[number].camera) for number in np.asarray(order).tolist()]

    precision, first = lists.average_precision, lists.first_match.astype(float)
    unscored = int(np.isnan(precision).sum())
    assert 0 < unscored < 10
    worst = np.argsort(precision, kind="stable")
    default = see("")
    assert "<title>A &lt;set&gt; - ranked lists</title>" in default.dom
    assert default.queries == told(worst[:10])
    assert default.status == "queries 1 to 10 of 23"
    assert default.scores == [f"{100 * precision[number]:.1f} %" for number in worst[:10]]
    expected_kinds = []
    for number in worst[:10].tolist():
        near = [gallery[index] for index in lists.nearest[number] if index >= 0]
        near = [image for image in near if (image.person, image.camera) != (query[number].person, query[number].camera)][:4]
        expected_kinds.append(["right" if image.person == query[number].person else "wrong" for image in near])
    assert default.kinds == expected_kinds
    assert "<canvas" not in default.dom

    # Unscored queries come last in every order but the set's own.
    assert see("page=3").queries == told(worst[20:])
    assert see("sort=ap-best").queries == told(np.argsort(-precision, kind="stable")[:10])
    ordered = np.where(first >= 0, first, np.nan)
    assert see("sort=first-worst&per=25").queries == told(np.argsort(-ordered, kind="stable"))
    assert see("sort=first-best&per=25").queries == told(np.argsort(ordered, kind="stable"))
    assert see("sort=set&per=5&page=2").queries == told(range(5, 10))

    assert set(see("person=3&per=50").queries) == {(3, camera) for camera in range(3)}
    filtered = see("person=3&camera=1&sort=set")
    assert filtered.queries == [pair for pair in told(range(NUM_QUERIES)) if pair == (3, 1)]
    assert filtered.status.endswith(f"of {len(filtered.queries)} (of 23)")
    assert see("person=77").status == "no query fits these filters (of 23)"
    assert len(see("outcome=none&per=50").queries) == unscored
    assert len(see("outcome=wrong&per=50").queries) == (lists.first_match > 0).sum()
    # What an address says that cannot be is passed over.
    assert see("sort=__proto__&page=x&per=7").queries == default.queries
    assert see("page=99").status == "queries 21 to 23 of 23"

    with_own = see("own=1&map=1")
    assert sum(kinds.count("own") for kinds in with_own.kinds) > 0
    assert [[kind for kind in kinds if kind != "own"] for kinds in with_own.kinds] == expected_kinds
    assert with_own.dom.count("<canvas") == sum(map(len, with_own.kinds)) + 10


PROBE = """<script>addEventListener("load", () => {
  const found = document.body.dataset, status = () => document.getElementById("status").textContent;
  found.broken = [...document.images].filter(image => !(image.complete && image.naturalWidth)).length;
  found.images = document.images.length;
  found.overflow = document.documentElement.scrollWidth - innerWidth;
  const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  press("ArrowRight"); found.right = status();
  press("ArrowLeft"); press("ArrowLeft"); found.left = status();
  const person = document.getElementById("person");
  person.value = "2"; person.dispatchEvent(new Event("input")); found.person = status();
  person.focus(); person.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})); found.typing = status();
  document.getElementById("reset").click(); found.reset = status() + location.hash;
  document.querySelector(".next").click(); found.next = status() + location.hash;
  const frame = document.querySelector("li .frame");
  frame.focus(); found.focus = document.activeElement === frame;
  frame.click();
  found.open = document.getElementById("details").open;
  found.details = document.getElementById("details-list").textContent;
  document.querySelector("#details button").click(); found.closed = !document.getElementById("details").open;
  const unnamed = [...document.querySelectorAll("button, input, select")].filter(part =>
    !(part.textContent.trim() || part.getAttribute("aria-label") || part.closest("label")));
  found.unnamed = unnamed.length;
})</script></body>"""


@pytest.mark.chromium
def test_a_browser_obeys_the_keys_and_shows_every_picture(ranked: Set, tmp_path: Path, chromium: Callable[..., str]) -> None:
    query, gallery, lists = ranked
    page = write_ranked_page(tmp_path / "page", query, gallery, lists, title="A set", maps=even_maps)
    # The page itself runs no script but its own; a copy that may tells what the browser has made of it, on a narrow screen.
    text, num_policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    assert num_policies == 1
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("</body>", PROBE))
    dom = chromium(probed, "--window-size=500,900", "--dump-dom")
    body = re.search(r"<body([^>]*)>", dom)
    assert body is not None
    found = dict(re.findall(r'data-([\w-]+)="([^"]*)"', body[1]))
    details = found.pop("details")
    assert found == {
        "broken": "0",
        "images": str(10 * 11),
        "overflow": "0",
        "right": "queries 11 to 20 of 23",
        "left": "queries 1 to 10 of 23",
        "person": "queries 1 to 5 of 5 (of 23)",
        "typing": "queries 1 to 5 of 5 (of 23)",
        "reset": "queries 1 to 10 of 23",
        "next": "queries 11 to 20 of 23#page=2",
        "focus": "true",
        "open": "true",
        "closed": "true",
        "unnamed": "0",
    }
    assert re.fullmatch(r"filegallery/\d+\.pngperson\d+camera\drank 1, (same|another) person, distance \d\.\d+", details)


@pytest.mark.chromium
def test_a_screenshot_shows_frames_pictures_and_maps(ranked: Set, tmp_path: Path, chromium: Callable[..., str]) -> None:
    query, gallery, lists = ranked
    page = write_ranked_page(tmp_path / "page", query, gallery, lists, title="A set", maps=even_maps)
    pixels = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        chromium(page, "--window-size=1300,2600", f"--blink-settings=preferredColorScheme={number}", f"--screenshot={shot}")
        pixels[scheme] = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert pixels[scheme].shape == (2600, 1300, 3)
        for colour in (RIGHT, WRONG):
            assert (pixels[scheme] == colour).all(axis=-1).sum() > 5000
        # The gallery's pictures are told from all else by their blue of 40.
        picture = np.abs(pixels[scheme][..., 2] - 40) <= 2
        assert picture.sum() > 40 * 80 * 160
    assert pixels["light"][5, 5].min() > 200
    assert pixels["dark"][5, 5].max() < 60


@pytest.mark.chromium
def test_thousands_of_queries_do_not_choke_the_browser(ranked: Set, tmp_path: Path, chromium: Callable[..., str]) -> None:
    few, gallery, lists = ranked
    places = np.arange(4000) % NUM_QUERIES
    columns = {name: getattr(lists, name) for name in ("nearest", "distance", "average_precision", "first_match")}
    many = RankedLists(**{name: column[places] for name, column in columns.items()})
    page = write_ranked_page(tmp_path / "page", [few[place] for place in places], gallery, many, title="Many")
    view = View(chromium(page, "--dump-dom"))
    assert view.status == "queries 1 to 10 of 4,000"
    assert len(view.dom) < 2_000_000
