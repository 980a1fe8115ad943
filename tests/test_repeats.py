"""Repeated sampling: several pairs of regions of one decoded image, in the plan, in both loaders and in the masks."""

import dataclasses

import numpy as np
import pytest
import torch

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.loaders import RegionBatch
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig
from personmae.pretrain import to_inputs
from personmae.recipes.pretraining import vit_nano
from personmae_kernels.sample_random import Stream, sample_seeds
from tests.bad_images import spoil, write_people
from tests.test_loaders import COLOURED, SIZE, assert_equal_batches, batches, both_loaders, config_of, index_of

FIELDS = ("samples", "boxes", "flips", "colour", "blur_sigma", "erase_fractions")


def plan_of(index: ImageIndex, repeats: int, batch_size: int = 12, regions: RegionConfig = COLOURED) -> Plan:
    return Plan(index.heights, index.widths, batch_size, 1, regions, repeats=repeats)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> ImageIndex:
    return index_of(write_people(tmp_path_factory.mktemp("data") / "people", 30))


def test_seeds_of_copies():
    samples = np.arange(1000)
    for stream in (Stream.MASK, Stream.REGIONS):
        usual = sample_seeds(3, 1, samples, stream)
        assert np.array_equal(sample_seeds(3, 1, samples, stream, np.zeros(1000, np.int64)), usual)
        everything = np.concatenate([sample_seeds(3, 1, samples, stream, np.full(1000, copy)) for copy in range(5)])
        assert len(np.unique(everything)) == 5000
        # The words of the formula in plain integers.
        assert sample_seeds(3, 1, samples, stream, np.full(1000, 2))[7] == sample_seeds(3, 1, [7 + 2 * 2**40], stream)[0]


def test_copies_stand_side_by_side_and_the_first_is_the_usual_draw(people):
    plan, usual = plan_of(people, 3), plan_of(people, 1, 4)
    assert plan.steps_per_epoch == usual.steps_per_epoch == 7
    for step in range(9):
        batch, once = plan.batch(step, 0, 1), usual.batch(step, 0, 1)
        assert np.array_equal(plan.step_samples(step), batch.samples)
        assert np.array_equal(batch.samples, np.repeat(once.samples, 3))
        assert batch.copies.tolist() == [0, 1, 2] * 4
        for name in FIELDS:
            assert np.array_equal(getattr(batch, name)[::3], getattr(once, name)), name
    many = plan.for_samples(0, np.arange(30).repeat(2), np.tile([0, 2], 30))
    for name in FIELDS[1:]:
        values = getattr(many, name).reshape(30, 2, -1)
        assert (values[:, 0] != values[:, 1]).any(axis=1).mean() > (0.3 if name == "flips" else 0.5), name


def test_an_epoch_shows_each_image_so_many_times(people):
    plan = plan_of(people, 2, 10)
    seen = np.concatenate([plan.step_samples(step) for step in range(plan.steps_per_epoch)])
    assert np.array_equal(np.bincount(seen, minlength=30), np.full(30, 2))


def test_parts_keep_the_copies_together(people):
    plan = plan_of(people, 3)
    whole = plan.batch(2, 0, 1)
    parts = [plan.batch(2, part, 2) for part in (0, 1)]
    for name in (*FIELDS, "copies"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)), name
    with pytest.raises(UserError, match=r"12 / 3 = 4\) is no multiple of repeats \(3\).*a batch that is a multiple of 9"):
        plan.batch(0, 0, 3)
    with pytest.raises(UserError, match=r"batch \(12\) is no multiple of repeats \(5\)"):
        plan_of(people, 5)
    with pytest.raises(UserError, match="at least 1"):
        plan_of(people, 0)
    with pytest.raises(UserError, match=r"30 images, 2 pairs of each\): use a batch of at most 60"):
        plan_of(people, 2, 62)


@both_loaders
@pytest.mark.parametrize("regions", [RegionConfig(independent_flips=True), COLOURED], ids=["plain", "coloured"])
def test_a_repeated_batch_is_put_together_of_single_ones(kind, regions, people, monkeypatch):
    """Each copy as a loader gives it whose plan has that copy alone; and one read serves all copies."""
    reads = []
    original = ImageIndex.read
    monkeypatch.setattr(ImageIndex, "read", lambda self, sample: (reads.append(sample), original(self, sample))[1])
    got = batches(people, plan_of(people, 3, regions=regions), config_of(kind), last=4)
    assert sorted(reads) == sorted(np.concatenate([batch.samples[::3].numpy() for batch in got]).tolist())

    class OneCopy(Plan):
        """Draws one chosen copy of each image."""

        copy = 0

        def for_samples(self, epoch, samples, copies=None):
            return super().for_samples(epoch, samples, np.full(len(samples), self.copy))

    for copy in range(3):
        plan = OneCopy(people.heights, people.widths, 4, 1, regions)
        plan.copy = copy
        for whole, alone in zip(got, batches(people, plan, config_of(kind), last=4), strict=True):
            assert whole.region_a.is_contiguous()
            for name in ("region_a", "region_b", "boxes", "flips", "samples", "planned", "copies"):
                assert torch.equal(getattr(whole, name)[copy::3], getattr(alone, name)), name


@both_loaders
def test_processes_share_repeated_batches(kind, people):
    plan = plan_of(people, 2)
    whole = batches(people, plan, config_of(kind), last=2)
    split = [batches(people, plan, config_of(kind), last=2, rank=rank, world_size=2, accumulation=3) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [split[rank][step * 3 + micro] for micro in range(3) for rank in range(2)]
        for name in ("region_a", "region_b", "boxes", "flips", "samples", "copies"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


@both_loaders
def test_copies_of_an_unreadable_image_are_replaced_together(kind, tmp_path):
    index = index_of(write_people(tmp_path / "people", 30))
    plan = plan_of(index, 3)
    bad = plan.step_samples(1)[[0, 6]].tolist()
    spoil([index.path(sample) for sample in bad])
    got = batches(index, plan, config_of(kind, max_bad_ratio=0.2), last=3)
    for batch in got:
        drawn = plan.for_samples(batch.epoch, batch.samples.numpy(), batch.copies.numpy())
        assert np.array_equal(batch.boxes.numpy(), drawn.boxes)
        for planned, samples in zip(batch.planned.reshape(-1, 3), batch.samples.reshape(-1, 3), strict=True):
            assert len(set(samples.tolist())) == 1
            assert (int(samples[0]) != int(planned[0])) == (int(planned[0]) in bad)
    # Copies of a replacement differ too.
    row = bad.index(bad[0]) * 6
    assert not torch.equal(got[1].region_a[row], got[1].region_a[row + 1])
    assert_equal_batches(got[2:], batches(index, plan, config_of(kind, max_bad_ratio=0.2), first=2, last=3))


def test_masks_of_copies(people):
    config = vit_nano()
    size = config.model.encoder.image_size
    (batch,) = batches(people, plan_of(people, 3), config_of("threads"), last=1, size=size)
    masks = to_inputs(batch, config, torch.device("cpu")).mask.reshape(4, 3, -1)
    assert (masks[:, 0] != masks[:, 1]).any(1).all()
    assert (masks[:, 1] != masks[:, 2]).any(1).all()
    rest = (getattr(batch, name)[::3] for name in ("boxes", "flips", "samples", "planned"))
    first = RegionBatch(tuple(region[::3] for region in batch.regions), *rest, 0, 0, 0)
    assert torch.equal(to_inputs(first, config, torch.device("cpu")).mask, masks[:, 0])
    assert torch.equal(to_inputs(dataclasses.replace(first, copies=batch.copies[::3]), config, torch.device("cpu")).mask, masks[:, 0])


def test_region_batch_size(people):
    (batch,) = batches(people, plan_of(people, 4), config_of("threads"), last=1)
    assert batch.region_a.shape == (12, *SIZE, 3)
