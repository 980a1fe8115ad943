"""Batches of P people with K images each, their views, and who is held out: what the sampler promises, and what both loaders make of it."""

from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.identity_plan import IdentityPlan, ViewConfig
from personmae.data.image_index import ImageIndex
from personmae.data.images import ERASED_COLOUR, resize
from personmae.data.labelled import LabelledImages, hold_out, open_labelled
from personmae.data.loaders import LoaderConfig, open_loader
from personmae.data.records import GALLERY_CAMERA, QUERY_CAMERA, PersonImage
from personmae.data.reid.sets import ReidSet
from tests.bad_images import spoil, write_people
from tests.test_loaders import both_loaders

SIZE = (160, 96)  # larger than the images: linear sampling, in which both loaders agree
PLAIN = ViewConfig(flip_prob=0, pad_px=0, erasing_prob=0)


def labelled(counts: list[int], num_cameras: int = 3) -> LabelledImages:
    """People with so many images each, without files; cameras in turn, samples in mixed order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    index = SimpleNamespace(heights=np.full(len(labels), 64), widths=np.full(len(labels), 32))
    cameras = np.arange(len(labels)) % num_cameras
    return LabelledImages(cast(ImageIndex, index), labels, cameras, np.arange(len(counts)), np.arange(num_cameras))


def epoch_of(plan: IdentityPlan, epoch: int = 0) -> np.ndarray:  # -> [steps, P, K]
    steps = plan.steps_per_epoch
    samples = [plan.batch(epoch * steps + step, 0, 1).samples for step in range(steps)]
    return np.array(samples).reshape(steps, plan.num_people, plan.images_each)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 23), min_size=2, max_size=12).filter(lambda counts: max(counts) > 1),
    num_people=st.integers(2, 5),
    images_each=st.integers(2, 5),
    seed=st.integers(0, 2**40),
    cross=st.booleans(),
)
def test_each_batch_has_p_people_with_k_images(counts, num_people, images_each, seed, cross):
    images = labelled(counts)
    if len(counts) < num_people:
        with pytest.raises(UserError, match="set --num-people"):
            IdentityPlan(images, num_people, images_each, seed, PLAIN)
        return
    plan = IdentityPlan(images, num_people, images_each, seed, PLAIN, cross_camera=cross)
    assert plan.steps_per_epoch == max(1, len(images) // (num_people * images_each))
    for batch in epoch_of(plan, epoch=seed % 3):
        people = images.labels[batch]
        assert (people == people[:, :1]).all(), "a row is one person"
        assert len(set(people[:, 0])) == num_people
        for row in batch:
            # Repeated only by who has fewer than K, and then each as often as can be.
            times = Counter(row.tolist())
            assert len(times) == min(images_each, counts[int(images.labels[row[0]])])
            assert max(times.values()) - min(times.values()) <= 1


def test_no_image_comes_twice_before_the_others_have_come():
    images = labelled([8] * 12)
    samples = epoch_of(IdentityPlan(images, 4, 4, 3, PLAIN))
    # 96 images, 6 batches of 16: with people of equal numbers nearly everything is shown, nothing twice.
    assert samples.shape == (6, 4, 4)
    assert Counter(samples.ravel().tolist()).most_common(1)[0][1] == 1
    many = IdentityPlan(labelled([5, 9, 14, 20, 33, 7, 11, 18]), 3, 4, 0, PLAIN)
    shown = np.concatenate([epoch_of(many, epoch).ravel() for epoch in range(40)])
    assert (np.bincount(shown, minlength=117) > 0).all(), "everything is shown some day"


def test_epochs_and_seeds_differ_and_nothing_else_does():
    images = labelled([6] * 9)
    plan = IdentityPlan(images, 3, 2, 5, PLAIN)
    again = IdentityPlan(images, 3, 2, 5, PLAIN)
    # In any order of asking.
    assert np.array_equal(epoch_of(plan, 1), epoch_of(again, 1))
    assert np.array_equal(epoch_of(plan, 0), epoch_of(again, 0))
    assert not np.array_equal(epoch_of(plan, 0), epoch_of(plan, 1))
    assert not np.array_equal(epoch_of(plan, 0), epoch_of(IdentityPlan(images, 3, 2, 6, PLAIN), 0))


def test_cameras_are_spread():
    labels = np.repeat(np.arange(6), 12)
    index = SimpleNamespace(heights=np.full(72, 64), widths=np.full(72, 32))
    cameras = np.tile(np.repeat([0, 1, 2], [8, 2, 2]), 6)
    images = LabelledImages(cast(ImageIndex, index), labels, cameras, np.arange(6), np.arange(3))

    def mean_cameras(cross: bool) -> float:
        plan = IdentityPlan(images, 3, 3, 0, PLAIN, cross_camera=cross)
        groups = np.concatenate([epoch_of(plan, epoch).reshape(-1, 3) for epoch in range(20)])
        return float(np.mean([len(set(cameras[group])) for group in groups]))

    # Each person: groups (0 1 2), (0 1 2), (0 0 0), (0 0 0).
    assert mean_cameras(True) == pytest.approx(2.0, abs=0.2)
    assert mean_cameras(False) < 1.9


def test_halves_and_outliers():
    """Two kinds of people, each with its half of every batch; samples of nobody stay out."""
    labels = np.repeat([-1, 0, 1, 2, 3, 4, 5], [5, 4, 4, 9, 4, 4, 4])
    index = SimpleNamespace(heights=np.full(34, 64), widths=np.full(34, 32))
    images = LabelledImages(cast(ImageIndex, index), labels, np.zeros(34, int), np.arange(6), np.arange(1))
    first = np.array([True, False, True, False, True, False])
    plan = IdentityPlan(images, 4, 2, 0, PLAIN, steps=25, first_half=first)
    assert plan.steps_per_epoch == 25
    for batch in epoch_of(plan, 3):
        people = labels[batch[:, 0]]
        assert (people >= 0).all()
        assert first[people].tolist() == [True, True, False, False]
    shown = np.unique(epoch_of(plan, 1))
    assert set(shown) == set(range(5, 34))
    with pytest.raises(UserError, match="half of 4 people come from each set, and one has 1; set --num-people 2 or lower"):
        IdentityPlan(images, 4, 2, 0, PLAIN, first_half=np.arange(6) == 2)


def test_parts_are_of_whole_people():
    plan = IdentityPlan(labelled([6] * 9), 6, 2, 5, ViewConfig())
    whole = plan.batch(1, 0, 1)
    parts = [plan.batch(1, part, 3) for part in range(3)]
    for name in ("samples", "boxes", "flips", "shifts", "erase_fractions"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)), name
    with pytest.raises(UserError, match="6 people cannot be shared among 4 equal parts"):
        plan.batch(0, 0, 4)


def test_repeated_images_are_shown_in_other_ways():
    images = labelled([2, 2, 2])
    views = IdentityPlan(images, 3, 8, 0, ViewConfig(pad_px=20)).batch(0, 0, 1)
    assert views.copies.reshape(3, 8).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3
    rows = np.concatenate([views.samples[:, None], views.shifts[:, 0]], axis=1)
    assert len(np.unique(rows, axis=0)) == 24


def test_views():
    plan = IdentityPlan(labelled([4] * 50), 50, 4, 0, ViewConfig(pad_px=3, erasing_prob=0.5, erasing_scale=(0.1, 0.3)))
    views = plan.batch(0, 0, 1)
    assert views.boxes.shape == (200, 1, 4)
    assert (views.boxes == [0, 0, 64, 32]).all()
    assert views.flips.shape == (200, 1)
    assert 0.4 < views.flips.mean() < 0.6
    assert views.shifts.shape == (200, 1, 2)
    assert set(np.unique(views.shifts)) == set(range(-3, 4))
    assert not np.array_equal(views.shifts[:, 0, 0], views.shifts[:, 0, 1])
    erased = views.erase_fractions[:, 0]
    areas = (erased[:, 2] - erased[:, 0]) * (erased[:, 3] - erased[:, 1])
    assert 0.4 < (areas > 0).mean() < 0.6
    assert IdentityPlan(labelled([4] * 9), 3, 4, 0, PLAIN).batch(0, 0, 1).shifts is None


def test_mistakes():
    with pytest.raises(UserError, match="one image alone"):
        IdentityPlan(labelled([1] * 9), 3, 2, 0, PLAIN)
    with pytest.raises(UserError, match="holds no triplets"):
        IdentityPlan(labelled([4] * 9), 3, 1, 0, PLAIN)
    with pytest.raises(UserError, match="pad_px is -1"):
        ViewConfig(pad_px=-1)
    with pytest.raises(UserError, match="erasing_prob is 2"):
        ViewConfig(erasing_prob=2)


def write_labelled(folder: Path, num_people: int = 6, each: int = 4) -> list[PersonImage]:
    files = sorted(write_people(folder, num_people * each).rglob("*.jpg"))
    return [PersonImage(path, 10 * (number // each), 1 + number % 2) for number, path in enumerate(files)]


def test_labels_follow_the_index(tmp_path):
    images = write_labelled(tmp_path / "people")
    spoil([images[3].path])
    said: list[str] = []
    found = open_labelled(list(reversed(images)), tmp_path / "run" / "train.txt", said.append)
    assert len(found) == 23
    assert "1 left out" in said[0]
    assert found.people.tolist() == [0, 10, 20, 30, 40, 50]
    assert found.camera_names.tolist() == [1, 2]
    records = {image.path: image for image in images}
    for sample in range(23):
        record = records[Path(found.index.path(sample))]
        assert found.people[found.labels[sample]] == record.person
        assert found.camera_names[found.cameras[sample]] == record.camera
    assert found.describe() == "23 images of 6 people from 2 cameras"
    with pytest.raises(UserError, match="stands twice"):
        open_labelled([images[0], images[0]], tmp_path / "run" / "train.txt", said.append)
    with pytest.raises(UserError, match="no training images"):
        open_labelled([], tmp_path / "run" / "train.txt", said.append)


def loaded(images: LabelledImages, plan: IdentityPlan, kind: Any, steps: int = 3, **options: Any) -> list[Any]:
    config = LoaderConfig(kind=kind, retries=0, max_bad_ratio=1.0)
    with open_loader(
        images.index, plan, config, size=SIZE, device=torch.device("cpu"), first_step=0, last_step=steps, announce=lambda _: None, **options
    ) as loader:
        return list(loader)


@both_loaders
def test_the_loaders_show_what_the_plan_says(tmp_path, kind):
    images = open_labelled(write_labelled(tmp_path / "people"), tmp_path / "train.txt", lambda _: None)
    plan = IdentityPlan(images, 3, 2, 7, ViewConfig(pad_px=4, erasing_prob=0.6))
    for step, batch in enumerate(loaded(images, plan, kind)):
        planned = plan.batch(step, 0, 1)
        assert len(batch.regions) == 1
        assert batch.region_a.shape == (6, *SIZE, 3)
        assert np.array_equal(batch.samples.numpy(), planned.samples)
        boxes = planned.erase_boxes(SIZE)
        for row, sample in enumerate(planned.samples.tolist()):
            wanted = resize(images.index.image(sample), SIZE)
            if planned.flips[row, 0]:
                wanted = wanted[:, ::-1]
            # Padding and cutting, as others write it.
            padded = cv2.copyMakeBorder(np.ascontiguousarray(wanted), 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(0, 0, 0))
            down, right = planned.shifts[row, 0].tolist()
            wanted = padded[4 - down : 164 - down, 4 - right : 100 - right].copy()
            y0, x0, y1, x1 = boxes[row, 0].tolist()
            wanted[y0:y1, x0:x1] = ERASED_COLOUR
            difference = np.abs(batch.region_a[row].numpy().astype(int) - wanted)
            assert difference.max() <= (0 if kind == "threads" else 2)


@both_loaders
def test_an_unreadable_image_is_replaced_by_another_of_the_person(tmp_path, kind):
    records = write_labelled(tmp_path / "people")
    images = open_labelled(records, tmp_path / "train.txt", lambda _: None)
    bad = [0, 9]
    for sample in bad:
        Path(images.index.path(sample)).unlink()
    plan = IdentityPlan(images, 6, 4, 7, PLAIN)
    (batch,) = loaded(images, plan, kind, steps=1)
    assert set(batch.planned.tolist()) == set(range(24))
    assert not set(batch.samples.tolist()) & set(bad)
    assert np.array_equal(images.labels[batch.samples], images.labels[batch.planned])


def person_images(people: dict[int, list[int]]) -> list[PersonImage]:
    seen = [(person, number, camera) for person, cameras in people.items() for number, camera in enumerate(cameras)]
    return [PersonImage(Path(f"{person}-{number}.jpg"), person, camera) for person, number, camera in seen]


def test_held_out_people():
    train = person_images({person: [0, 0, 1, 2, 2] for person in range(20)} | {50: [1, 1]})
    whole = ReidSet("market1501", train, [], [], num_junk=3)
    held = hold_out(whole, 0.25, seed=4)
    assert held.name == "market1501 held out"
    tested = {image.person for image in held.query}
    assert len(tested) == 5
    assert 50 not in tested, "a person of one camera cannot be looked for"
    assert {image.person for image in held.gallery} == tested
    assert not {image.person for image in held.train} & tested
    assert len(held.train) == 15 * 5 + 2
    by_person = defaultdict(list)
    for image in held.query:
        by_person[image.person].append(image.camera)
    assert all(sorted(cameras) == [0, 1, 2] for cameras in by_person.values())
    assert len(held.gallery) == 25
    assert hold_out(whole, 0.25, seed=4) == held
    assert {image.person for image in hold_out(whole, 0.25, seed=5).query} != tested
    # Who it is does not hang on the order of the list.
    assert {image.person for image in hold_out(ReidSet("x", train[::-1], [], []), 0.25, seed=4).query} == tested


def test_held_out_people_without_cameras():
    train = person_images({person: [0, 0, 0] for person in range(10)})
    held = hold_out(ReidSet("partial", train, [], [], has_cameras=False), 0.3, seed=0)
    assert (len(held.query), len(held.gallery)) == (3, 6)
    assert {image.camera for image in held.query} == {QUERY_CAMERA}
    assert {image.camera for image in held.gallery} == {GALLERY_CAMERA}


def test_too_few_to_hold_out():
    one_camera = ReidSet("x", person_images({person: [3, 3] for person in range(10)}), [], [])
    with pytest.raises(UserError, match=r"0 of the 10 training people are seen by two cameras: .*set hold_out 0"):
        hold_out(one_camera, 0.2, seed=0)
    few = ReidSet("x", person_images({person: [0, 1] for person in range(3)}), [], [])
    with pytest.raises(UserError, match="too few"):
        hold_out(few, 0.2, seed=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        hold_out(few, 1.0, seed=0)
