"""The built-in data set: ray casting against brute force, pictures that depend on nothing but their number, and the layout on disk."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from personmae.configs import UserError
from personmae.data.mannequins import MannequinsConfig, dataset, draw_mannequins, picture_pixels, plan_pictures
from personmae.data.mannequins.camera import Light, camera_of
from personmae.data.mannequins.paints import plain
from personmae.data.mannequins.raycast import Window, cast, projected_bounds
from personmae.data.mannequins.shading import shade
from personmae.data.mannequins.shapes import Eye, Shapes
from personmae.data.records import PersonImage
from personmae.data.reid import read_market_layout
from personmae.evaluation.colour_histogram import stripe_histograms
from personmae.evaluation.protocol import score
from personmae.evaluation.ranking import labels_of

EYE = Eye(height_m=2.5, pitch=0.2)
WINDOW = Window(-0.3, -0.25, 0.55, 0.6, 61, 43)
SMALL = MannequinsConfig(
    size_px=(64, 32), num_train_ids=2, num_test_ids=3, num_occluded_train_ids=1, num_occluded_test_ids=2, num_unlabelled=11, num_cameras=3,
    pictures_per_camera=(1, 2), distractor_ratio=0.2, junk_ratio=0.2,
)  # fmt: skip


def rays_in_world() -> tuple[np.ndarray, np.ndarray]:
    """The eye [3] and the directions [rows, columns, 3] whose multiples are depths."""
    us, vs = np.meshgrid(WINDOW.us(), WINDOW.vs())
    directions = np.stack([us, vs, np.ones_like(us)], -1) @ EYE.rotation()
    return np.array([0.0, EYE.height_m, 0.0]), directions


def ball_depth(centre: np.ndarray, radius: float) -> np.ndarray:
    """Depth of the first hit of a ball by the textbook formula, inf where there is none."""
    eye, directions = rays_in_world()
    a = (directions**2).sum(-1)
    b = directions @ (eye - centre)
    c = ((eye - centre) ** 2).sum() - radius**2
    inside = b * b - a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)


def test_ball_is_exact() -> None:
    shapes = Shapes()
    shapes.begin_group((0.4, 6.0))
    shapes.ellipsoid((0.1, 1.2, 0.3), (0.7, 0.7, 0.7), shapes.add_paint(plain((1, 1, 1))))
    hits = cast(shapes.solids(EYE).primitives, WINDOW)
    expected = ball_depth(np.array([0.5, 1.2, 6.3]), 0.7)
    assert 100 < np.isfinite(expected).sum() < expected.size
    np.testing.assert_allclose(hits.depth, expected, rtol=1e-12)
    assert np.array_equal(hits.index >= 0, np.isfinite(expected))


@pytest.mark.parametrize("seed", range(8))
def test_tapered_capsule_is_a_chain_of_balls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, end = rng.uniform((-0.8, 0.2, 4.0), (0.8, 2.0, 7.0), (2, 3))
    if seed == 0:
        # Towards the eye, with a taper: the ray lies within the cone's opening angle, where the quadratic form is negative.
        start, end = np.array([0.1, 1.5, 6.0]), np.array([0.08, 1.9, 4.2])
    r0, r1 = rng.uniform(0.1, 0.7, 2)
    shapes = Shapes()
    shapes.begin_group((0.0, 0.0))
    shapes.capsule(tuple(start), tuple(end), r0, r1, shapes.add_paint(plain((1, 1, 1))), forward=(0.3, 0.2, 0.9))
    hits = cast(shapes.solids(EYE).primitives, WINDOW)
    expected = np.full(hits.depth.shape, np.inf)
    for k in np.linspace(0.0, 1.0, 1500):
        np.minimum(expected, ball_depth(start + k * (end - start), r0 + k * (r1 - r0)), out=expected)
    seen = np.isfinite(hits.depth) & np.isfinite(expected)
    assert seen.sum() > 50
    # A chain of balls lies inside the capsule, by less than a hair.
    assert (np.isfinite(hits.depth) != np.isfinite(expected)).sum() <= 2
    assert (hits.depth[seen] <= expected[seen] + 1e-9).all()
    assert np.abs(hits.depth[seen] - expected[seen]).max() < 0.02
    assert np.abs(hits.depth[seen] - expected[seen]).mean() < 1e-4


def test_flattened_turned_parts_against_marching() -> None:
    """Ellipsoid, box and open cone in a turned group, against the first point along the ray that is inside by definition."""
    heading, place = 0.7, np.array([0.3, 0.0, 5.5])
    turn = np.array([[np.cos(heading), 0, np.sin(heading)], [0, 1, 0], [-np.sin(heading), 0, np.cos(heading)]])
    eye, directions = rays_in_world()
    depths = np.linspace(3.0, 8.0, 2501)
    points = (eye + depths[:, None, None, None] * directions - place) @ turn

    def first(inside: np.ndarray) -> np.ndarray:
        return np.where(inside.any(0), depths[inside.argmax(0)], np.inf)

    def shapes_at_place() -> tuple[Shapes, int]:
        shapes = Shapes()
        shapes.begin_group((place[0], place[2]), heading)
        return shapes, shapes.add_paint(plain((1, 1, 1)))

    ellipsoid, paint = shapes_at_place()
    ellipsoid.ellipsoid((0.1, 1.4, 0.0), (0.3, 0.8, 0.5), paint)
    box, paint = shapes_at_place()
    box.box((-0.2, 1.2, 0.1), (0.4, 0.6, 0.2), paint)
    skirt, paint = shapes_at_place()
    skirt.capsule((0.0, 1.6, 0.0), (0.0, 0.6, 0.0), 0.4, 0.4, paint, depth=0.5, closed=(False, False))
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    # The lateral surface of the open tube is where a ray crosses it from outside, so marching looks for that crossing.
    ring = x**2 + (z / 0.5) ** 2 < 0.16
    crossing = ring & ~np.concatenate([ring[:1], ring[:-1]]) & (y > 0.6) & (y < 1.6)
    expected = {
        "ellipsoid": first(((x - 0.1) / 0.3) ** 2 + ((y - 1.4) / 0.8) ** 2 + (z / 0.5) ** 2 < 1),
        "box": first((np.abs(x + 0.2) < 0.4) & (np.abs(y - 1.2) < 0.6) & (np.abs(z - 0.1) < 0.2)),
        "skirt": first(crossing),
    }
    for name, shapes in (("ellipsoid", ellipsoid), ("box", box), ("skirt", skirt)):
        hits = cast(shapes.solids(EYE).primitives, WINDOW)
        both = np.isfinite(hits.depth) & np.isfinite(expected[name])
        assert both.sum() > 100, name
        assert (np.isfinite(hits.depth) != np.isfinite(expected[name])).mean() < 0.01, name
        assert np.abs(hits.depth[both] - expected[name][both]).max() < 0.0021, name


def figure_shapes() -> Shapes:
    shapes = Shapes()
    shapes.begin_group((0.2, 5.0), 0.5)
    paint = shapes.add_paint(plain((1, 1, 1)))
    shapes.capsule((0.0, 0.3, 0.0), (0.3, 1.2, 0.2), 0.3, 0.1, paint, depth=0.6)
    shapes.ellipsoid((-0.3, 1.2, 0.0), (0.2, 0.4, 0.3), paint, up=(0.2, 1.0, 0.1))
    shapes.box((0.1, 0.3, -0.4), (0.2, 0.2, 0.1), paint, up=(0.0, 1.0, 0.3))
    return shapes


def test_normals_are_those_of_the_depth_picture() -> None:
    fine = Window(-0.1, -0.1, 0.3, 0.4, 401, 301)
    solids = figure_shapes().solids(EYE)
    hits = cast(solids.primitives, fine)
    us, vs = np.meshgrid(fine.us(), fine.vs())
    points = hits.depth[..., None] * np.stack([us, vs, np.ones_like(us)], -1)
    with np.errstate(invalid="ignore"):
        cross = np.cross(points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2])
        cross /= np.linalg.norm(cross, axis=-1, keepdims=True)
    same = np.ones_like(hits.index[1:-1, 1:-1], dtype=bool)
    for rows, columns in (
        (slice(2, None), slice(1, -1)),
        (slice(None, -2), slice(1, -1)),
        (slice(1, -1), slice(2, None)),
        (slice(1, -1), slice(None, -2)),
    ):
        same &= hits.index[rows, columns] == hits.index[1:-1, 1:-1]
    same &= hits.index[1:-1, 1:-1] >= 0
    # Three suns along the axes of the world, white paint and no sky give the three components back.
    for axis in range(3):
        for sign in (-1.0, 1.0):
            direction = [0.0, 0.0, 0.0]
            direction[axis] = sign
            light = Light((direction[0], direction[1], direction[2]), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
            shaded = shade(solids, hits, fine, EYE, light, 0.0)
            seen = np.zeros(hits.depth.shape)
            seen[shaded.rows, shaded.columns] = shaded.colours[:, 0]
            expected = np.maximum(0.0, (cross @ EYE.rotation() @ np.array(direction) + 0.25) * 0.8)
            error = np.abs(seen[1:-1, 1:-1] - expected)[same]
            # Edges of the box and seams of the capsule are the only places where differences of neighbours fail.
            assert len(error) > 5000
            assert np.quantile(error, 0.97) < 0.01


def test_bounds_hold_every_hit_and_touch_the_outermost() -> None:
    primitives = figure_shapes().solids(EYE).primitives
    fine = Window(-0.2, -0.2, 0.5, 0.6, 600, 500)
    rows, columns = np.nonzero(cast(primitives, fine, cull=False).index >= 0)
    left, right, top, bottom = projected_bounds(primitives)
    assert left == pytest.approx(fine.us()[columns.min()], abs=0.0011)
    assert right == pytest.approx(fine.us()[columns.max()], abs=0.0011)
    assert top == pytest.approx(fine.vs()[rows.min()], abs=0.0011)
    assert bottom == pytest.approx(fine.vs()[rows.max()], abs=0.0011)


def test_culling_changes_no_pixel() -> None:
    plan = [picture for picture in plan_pictures(SMALL) if picture.kind == "person"]
    pictures = [next(picture for picture in plan if picture.occlusion == "strong"), *plan[:5]]
    for picture in pictures:
        assert np.array_equal(picture_pixels(SMALL, picture), picture_pixels(SMALL, picture, cull=False))


def test_a_picture_depends_on_nothing_drawn_before() -> None:
    plan = plan_pictures(SMALL)
    alone = picture_pixels(SMALL, plan[7])
    for picture in plan[:6]:
        picture_pixels(SMALL, picture)
    again = picture_pixels(SMALL, plan[7])
    assert np.array_equal(alone, again)
    assert alone.shape == (64, 32, 3)
    assert alone.dtype == np.uint8
    assert alone.std() > 5


def test_plan_keeps_people_apart_and_queries_answerable() -> None:
    config = replace(SMALL, num_train_ids=20, num_test_ids=30, num_occluded_train_ids=10, num_occluded_test_ids=10, num_unlabelled=200)
    plan = plan_pictures(config)
    assert len({picture.path for picture in plan}) == len(plan)
    assert [picture.number for picture in plan] == list(range(len(plan)))
    people = {}
    for part in ("bounding_box_train/", "query/", "occluded/bounding_box_train/", "occluded/query/", "unlabelled/"):
        people[part] = {picture.person for picture in plan if picture.path.startswith(part)}
        assert people[part], part
    parts = list(people)
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert not people[one] & people[other], (one, other)
    for prefix in ("", "occluded/"):
        gallery = [picture for picture in plan if picture.path.startswith(prefix + "bounding_box_test/")]
        for query in [picture for picture in plan if picture.path.startswith(prefix + "query/")]:
            assert any(picture.person == query.person and picture.camera != query.camera for picture in gallery)
    assert {picture.person for picture in plan if "bounding_box_test" in picture.path and picture.kind == "person"} == people["query/"] | people[
        "occluded/query/"
    ]
    assert len([picture for picture in plan if picture.path.startswith("unlabelled/")]) == 200
    assert all(picture.occlusion == "strong" for picture in plan if picture.path.startswith("occluded/query/"))


def test_occluded_queries_are_hidden_in_part() -> None:
    config = replace(SMALL, size_px=(128, 64), num_occluded_test_ids=6)
    plan = [picture for picture in plan_pictures(config) if picture.path.startswith("occluded/query/")]
    changed = []
    for picture in plan:
        hidden = picture_pixels(config, picture).astype(int)
        free = picture_pixels(config, replace(picture, occlusion="none")).astype(int)
        # The middle of the picture is where the person is. But for the occluder the two pictures are the same.
        changed.append((np.abs(hidden - free).max(2) > 12)[10:118, 16:48].mean())
    assert len(plan) >= 12
    assert min(changed) > 0.08
    assert 0.2 < float(np.mean(changed)) < 0.8


def test_cities_and_seeds_differ() -> None:
    here, there, later = SMALL, replace(SMALL, city="highfield"), replace(SMALL, seed=1)
    assert len({config.draw_seed for config in (here, there, later)}) == 3
    pixels = [[picture_pixels(config, picture) for picture in plan_pictures(config)[:40]] for config in (here, there, later)]
    assert not np.array_equal(pixels[0][0], pixels[2][0])
    warmth = [np.mean([image[..., 0].mean() - image[..., 2].mean() for image in images]) for images in pixels]
    brightness = [np.mean([image.mean() for image in images]) for images in pixels]
    # Highfield lies in a dim, warm light.
    assert warmth[1] > warmth[0] + 1.0
    assert brightness[1] < 0.8 * brightness[0]
    heights = [np.mean([camera_of(config.draw_seed, config.city, number).eye.height_m for number in range(1, 7)]) for config in (here, there)]
    assert heights[1] > heights[0]


def test_colours_alone_help_but_do_not_solve() -> None:
    config = MannequinsConfig(size_px=(64, 32), num_train_ids=0, num_test_ids=30, num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=0)
    plan = [picture for picture in plan_pictures(config) if picture.kind == "person"]
    queries = [picture for picture in plan if picture.path.startswith("query/")]
    gallery = [picture for picture in plan if picture.path.startswith("bounding_box_test/")][::2]
    features = [stripe_histograms(np.stack([picture_pixels(config, picture) for picture in part])) for part in (queries, gallery)]
    labels = [labels_of([PersonImage(Path(picture.path), picture.person, picture.camera) for picture in part]) for part in (queries, gallery)]
    # At random it would be 1 in 30; with 120 or 250 people the figure is 5 to 20 %.
    assert 0.12 < score(features[0], features[1], labels[0], labels[1]).mAP < 0.5


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mannequins") / "set"
    draw_mannequins(root, SMALL, num_workers=1, progress=False)
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout_is_market_and_duke(drawn: Path) -> None:
    market = read_market_layout(drawn)
    assert len({image.person for image in market.train}) == 2
    assert {image.person for image in market.query} | {0} == {image.person for image in market.gallery}
    assert not {image.person for image in market.query} & {image.person for image in market.train}
    assert market.num_junk > 0
    assert any(image.person == 0 for image in market.gallery)
    assert {image.camera for image in market.query} <= {1, 2, 3}
    assert all("s" in image.path.name.split("_")[1] for image in market.query)
    duke = read_market_layout(drawn / "occluded")
    assert all(image.path.name.split("_")[2].startswith("f") for image in duke.query + duke.gallery + duke.train)
    assert len({image.person for image in duke.query}) == 2
    assert len(list((drawn / "unlabelled").glob("*.jpg"))) == 11
    # A label is a person: the pictures of one label have one person's number in the plan, and another label another.
    plan = {picture.path: picture.person for picture in plan_pictures(SMALL)}
    labels = {(image.person, plan[str(image.path.relative_to(drawn))]) for image in market.query + market.train}
    assert len(labels) == len({label for label, _ in labels}) == len({number for _, number in labels})


def test_workers_give_the_same_bytes_from_any_program(drawn: Path, tmp_path: Path) -> None:
    # No main guard, and a package that only sys.path knows of.
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "from pathlib import Path\nfrom personmae.configs import from_plain\n"
        "from personmae.data.mannequins import MannequinsConfig, draw_mannequins\n"
        f"import json\nconfig = from_plain(MannequinsConfig, json.loads(Path({str(drawn / 'manifest.json')!r}).read_text())['config'])\n"
        f"draw_mannequins(Path({str(tmp_path / 'set')!r}), config, num_workers=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"of {len(plan_pictures(SMALL))} pictures" in done.stderr
    assert files_of(tmp_path / "set") == files_of(drawn)


def test_a_finished_set_is_left_alone(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    layout = draw_mannequins(drawn, SMALL)
    assert "holds this data set already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before
    assert layout.unlabelled == drawn / "unlabelled"
    manifest = json.loads(layout.manifest.read_text())
    assert manifest["pictures"]["unlabelled"] == 11
    assert sum(manifest["pictures"].values()) == len(plan_pictures(SMALL))


def test_an_interrupted_drawing_is_taken_up(drawn: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    config = replace(SMALL, num_occluded_train_ids=0, num_occluded_test_ids=0)
    draw_mannequins(root, config, num_workers=1, progress=False)
    whole = files_of(root)
    (root / "manifest.json").rename(root / "unfinished.json")
    half, empty, *there = sorted((root / "query").iterdir())
    half.rename(half.with_name(half.name + ".partial")).write_bytes(b"half a pict")
    empty.write_bytes(b"")
    before = [path.stat().st_mtime_ns for path in there]
    draw_mannequins(root, config, num_workers=1, progress=False)
    assert files_of(root) == whole
    assert [path.stat().st_mtime_ns for path in there] == before
    assert not (root / "occluded").exists()


def test_an_end_at_any_moment_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a kill, after each change to the file system in its turn."""
    config = replace(SMALL, num_train_ids=0, num_test_ids=0, num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=1)
    left = 0

    class Killed(BaseException):
        pass

    def counted(original):
        def call(*arguments, **options):
            nonlocal left
            result = original(*arguments, **options)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return call

    num_kills = 0
    while num_kills == 0 or left <= 0:
        root = tmp_path / f"set{num_kills}"
        left = num_kills + 1
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "mkdir"), (os, "replace"), (Path, "write_bytes"), (Path, "write_text"), (os, "fsync")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            # Who is killed does not tidy up.
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with contextlib.suppress(Killed):
                draw_mannequins(root, config, num_workers=1, progress=False)
        draw_mannequins(root, config, num_workers=1, progress=False)
        assert files_of(root).keys() == {"manifest.json", "unlabelled/000000.jpg"}
        num_kills += 1
    # Five folders, the marker, a picture and the manifest, the latter three in two or three steps each.
    assert num_kills >= 10


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_the_system_refuses_is_told_with_its_cure(num_workers: int, tmp_path: Path) -> None:
    # A folder where a picture should be: refused to every user, unlike a missing right.
    root = tmp_path / "set"
    draw_mannequins(root, SMALL, num_workers=1, progress=False)
    (root / "manifest.json").rename(root / "unfinished.json")
    (root / "unlabelled" / "000003.jpg").unlink()
    (root / "unlabelled" / "000003.jpg").mkdir()
    with pytest.raises(UserError, match=rf"^cannot draw into {root}: Is a directory; .*make room and call again: what is drawn is kept$"):
        draw_mannequins(root, SMALL, num_workers=num_workers, progress=False)


@pytest.mark.timeout(120)
def test_workers_may_say_more_than_a_pipe_holds(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every import is told on standard error: several times 64 KB.
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    draw_mannequins(tmp_path / "set", SMALL, num_workers=2, progress=False)
    assert files_of(tmp_path / "set") == files_of(drawn)


def test_workers_look_for_packages_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert dataset.worker_environment()["PYTHONPATH"] == f"{tmp_path}:/elsewhere"


def test_other_content_is_never_touched(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seed: 0 -> 5.*another folder"):
        draw_mannequins(drawn, replace(SMALL, seed=5), progress=False)
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "beach.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        draw_mannequins(foreign, SMALL, progress=False)
    assert [path.name for path in foreign.iterdir()] == ["beach.jpg"]
    with pytest.raises(UserError, match="not a folder"):
        draw_mannequins(foreign / "beach.jpg", SMALL, progress=False)
    with pytest.raises(UserError, match="cannot draw into"):
        draw_mannequins(foreign / "beach.jpg" / "set", SMALL, progress=False)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        draw_mannequins(broken, SMALL, progress=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"size_px": (8, 64)},
        {"num_cameras": 1},
        {"num_cameras": 100},
        {"pictures_per_camera": (3, 2)},
        {"city": "atlantis"},
        {"num_unlabelled": -1},
        {"junk_ratio": -0.1},
    ],
)
def test_bad_settings_are_named(bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(UserError, match=name if name != "num_unlabelled" else "numbers of people"):
        replace(SMALL, **bad)  # type: ignore[arg-type]
