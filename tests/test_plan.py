"""Order, boxes, flips and colour: their geometry and statistics, and that they hang on (seed, epoch, sample) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.plan import Plan
from personmae.data.region_draws import BOX_DRAWS, MIN_BOX_PX, RegionConfig, colour_matrices, draw_boxes
from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms

COLOURED = RegionConfig(brightness=0.4, contrast=0.4, saturation=0.3, hue=0.1, grey_prob=0.2, blur_prob=0.3, erasing_prob=0.4, independent_flips=True)

GOLDEN_ORDER = [2, 1]
GOLDEN_BOXES = [
    [[4, 1, 156, 59], [14, 0, 104, 57]],
    [[12, 9, 120, 58], [28, 6, 126, 48]],
    [[89, 10, 253, 80], [41, 0, 244, 78]],
    [[0, 4, 128, 83], [0, 167, 128, 247]],
]
GOLDEN_FLIPS = [True, True, True, False]
GOLDEN_REPLACEMENTS = [1, 0, 1, 0]


def make_plan(num: int = 103, batch_size: int = 12, seed: int = 5, regions: RegionConfig | None = None) -> Plan:
    generator = np.random.default_rng(0)
    return Plan(generator.integers(60, 400, num), generator.integers(30, 200, num), batch_size, seed, regions or RegionConfig())


def assert_equal_plans(left, right):
    assert left.epoch == right.epoch
    for name in ("samples", "boxes", "flips", "colour", "blur_sigma", "erase_fractions"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    common = sides.clip(0).prod(axis=1)
    return common / ((a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - common)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    aspect=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)).map(sorted).map(tuple),
    seed=st.integers(0, 2**64 - 1),
)
def test_boxes_of_any_image(height, width, scale, aspect, seed):
    seeds = sample_seeds(seed, 0, np.arange(16), Stream.REGIONS)
    drawn = draw_boxes(np.full(16, height), np.full(16, width), seeds, RegionConfig(crop_scale=scale, crop_aspect=aspect))
    y0, x0, y1, x1 = drawn.boxes.T.astype(np.float64)
    assert drawn.boxes.dtype == np.int32
    assert (y0 >= 0).all()
    assert (x0 >= 0).all()
    assert (y1 <= height).all()
    assert (x1 <= width).all()
    assert (y1 - y0 >= min(MIN_BOX_PX, height)).all()
    assert (x1 - x0 >= min(MIN_BOX_PX, width)).all()
    # Both edges are rounded, so the exact box is half a pixel larger or smaller; the least box and tiny images aside.
    exact = (y1 - y0 > MIN_BOX_PX) & (x1 - x0 > MIN_BOX_PX)
    assert ((x1 - x0 + 0.5)[exact] / (y1 - y0 - 0.5)[exact] >= aspect[0]).all()
    assert ((x1 - x0 - 0.5)[exact] / (y1 - y0 + 0.5)[exact] <= aspect[1]).all()
    assert ((y1 - y0 - 0.5) * (x1 - x0 - 0.5) <= scale[1] * height * width + 1e-6)[exact].all()
    kept = exact & ~drawn.clamped
    assert ((y1 - y0 + 0.5) * (x1 - x0 + 0.5) >= scale[0] * height * width)[kept].all()
    # Where the area gave way, it did so as little as possible: the box touches two opposite edges.
    touching = (y1 - y0 == height) | (x1 - x0 == width)
    assert touching[drawn.clamped & exact].all()


@pytest.mark.parametrize(("height", "width"), [(160, 60), (128, 64), (256, 128), (384, 128), (300, 80), (128, 128), (120, 100), (110, 120), (16, 16)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.2, 1.0)])
def test_the_two_regions_differ(height, width, scale):
    """torchvision's draw gives both regions the same box on these: every image of 160 x 60 falls back to one central crop."""
    num = 4000
    plan = Plan(np.full(num, height), np.full(num, width), num, 0, RegionConfig(crop_scale=scale))
    boxes = plan.for_samples(0, np.arange(num)).boxes
    assert intersection_over_union(boxes[:, 0], boxes[:, 1]).mean() < 0.9
    seeds = sample_seeds(0, 0, np.arange(num), Stream.REGIONS)
    drawn = draw_boxes(np.full(num, height), np.full(num, width), seeds, plan.regions)
    assert np.array_equal(drawn.boxes, boxes[:, 0])
    assert drawn.clamped.mean() < 0.01


@pytest.mark.parametrize(("height", "width"), [(128, 256), (100, 400), (600, 60), (160, 60), (128, 128)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.8, 1.0)])
def test_the_two_regions_differ_even_where_no_box_fits(height, width, scale):
    plan = Plan(np.full(2000, height), np.full(2000, width), 1, 0, RegionConfig(crop_scale=scale))
    boxes = plan.for_samples(0, np.arange(2000)).boxes
    assert intersection_over_union(boxes[:, 0], boxes[:, 1]).mean() < 0.9
    assert (boxes[:, 0] == boxes[:, 1]).all(axis=1).mean() < 0.01


def test_areas_aspects_and_places_have_their_distributions():
    """On an image that every box fits."""
    num = 40_000
    regions = RegionConfig(crop_scale=(0.2, 0.5), crop_aspect=(0.375, 0.667))
    seeds = sample_seeds(3, 0, np.arange(num), Stream.REGIONS)
    y0, x0, y1, x1 = draw_boxes(np.full(num, 4000), np.full(num, 2000), seeds, regions).boxes.T.astype(np.float64)
    area = (y1 - y0) * (x1 - x0) / 8e6
    logarithm = np.log((x1 - x0) / (y1 - y0))
    low, high = np.log(0.375), np.log(0.667)
    across, down = x0 / (2000 - (x1 - x0)), y0 / (4000 - (y1 - y0))
    for values, least, most in ((area, 0.2, 0.5), (logarithm, low, high), (across, 0, 1), (down, 0, 1)):
        shares = np.histogram(values, bins=8, range=(least, most))[0] / num
        assert np.abs(shares - 1 / 8).max() < 0.01
    assert np.abs(np.corrcoef([area, logarithm, across, down]) - np.eye(4)).max() < 0.03


def test_region_b_has_draws_of_its_own():
    plan = make_plan()
    samples = np.arange(50)
    seeds = sample_seeds(plan.seed, 4, samples, Stream.REGIONS)
    later = draws(seeds, 4, first=BOX_DRAWS)
    expected = uniforms(later[:, 0]) * 0.6 + 0.4
    boxes = plan.for_samples(4, samples).boxes[:, 1].astype(np.float64)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (plan.heights[samples] * plan.widths[samples])
    # Those whose first try fitted.
    assert (np.abs(area - expected) < 0.02).mean() > 0.3


@pytest.mark.parametrize("regions", [RegionConfig(), COLOURED], ids=["plain", "coloured"])
def test_a_sample_hangs_on_seed_epoch_and_number_alone(regions):
    plan = make_plan(regions=regions)
    batch = plan.batch(20, 0, 1)
    assert_equal_plans(batch, make_plan(regions=regions).batch(20, 0, 1))
    for row in (0, 5, 11):
        alone = plan.for_samples(batch.epoch, batch.samples[row : row + 1])
        assert np.array_equal(alone.boxes[0], batch.boxes[row])
        assert np.array_equal(alone.flips[0], batch.flips[row])
        if regions is COLOURED:
            assert np.array_equal(alone.colour[0], batch.colour[row])
            assert np.array_equal(alone.blur_sigma[0], batch.blur_sigma[row])
            assert np.array_equal(alone.erase_fractions[0], batch.erase_fractions[row])
    everything = np.arange(plan.num_samples)
    here = plan.for_samples(1, everything)
    assert (plan.for_samples(2, everything).boxes != here.boxes).any(axis=(1, 2)).mean() > 0.95
    assert (make_plan(seed=6, regions=regions).for_samples(1, everything).boxes != here.boxes).any(axis=(1, 2)).mean() > 0.95


def test_the_draws_never_change():
    """The values are part of a run's identity: a checkpoint of last year must go on with the same boxes."""
    plan = Plan([160, 128, 300, 128], [60, 64, 80, 256], 2, 7, RegionConfig())
    batch = plan.for_samples(3, [0, 1, 2, 3])
    assert plan.step_samples(6).tolist() == GOLDEN_ORDER
    assert batch.boxes.tolist() == GOLDEN_BOXES
    assert batch.flips[:, 0].tolist() == GOLDEN_FLIPS
    assert [plan.replacement(3, sample, 1) for sample in range(4)] == GOLDEN_REPLACEMENTS


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 60), batch=st.integers(1, 60), parts=st.integers(1, 6), seed=st.integers(0, 1000))
def test_an_epoch_shows_every_sample_at_most_once(num, batch, parts, seed):
    batch = min(batch - batch % parts or parts, num - num % parts)
    if batch == 0:
        return
    plan = make_plan(num, batch, seed)
    assert plan.steps_per_epoch == num // batch
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = []
        for step in steps:
            pieces = [plan.batch(step, part, parts) for part in range(parts)]
            assert {piece.epoch for piece in pieces} == {epoch}
            joined = np.concatenate([piece.samples for piece in pieces])
            assert np.array_equal(joined, plan.step_samples(step))
            assert np.array_equal(np.concatenate([piece.boxes for piece in pieces]), plan.batch(step, 0, 1).boxes)
            seen += joined.tolist()
        assert len(seen) == len(set(seen)) == plan.steps_per_epoch * batch
        assert set(seen) <= set(range(num))


def test_epochs_come_in_different_order():
    plan = make_plan(1000, 1000)
    orders = [plan.step_samples(step) for step in range(3)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert np.abs(np.corrcoef([*orders, np.arange(1000)]) - np.eye(4)).max() < 0.12


@pytest.mark.parametrize("independent", [False, True])
def test_flips(independent):
    flips = make_plan(regions=RegionConfig(flip_prob=0.3, independent_flips=independent)).for_samples(0, np.arange(103).repeat(1)).flips
    assert flips.shape == (103, 2)
    many = Plan(np.full(20_000, 9), np.full(20_000, 9), 1, 0, RegionConfig(flip_prob=0.3, independent_flips=independent))
    flips = many.for_samples(0, np.arange(20_000)).flips
    assert np.abs(flips.mean(axis=0) - 0.3).max() < 0.02
    assert abs((flips[:, 0] == flips[:, 1]).mean() - (0.58 if independent else 1)) < 0.02
    assert not make_plan(regions=RegionConfig(flip_prob=0)).for_samples(0, np.arange(103)).flips.any()
    assert make_plan(regions=RegionConfig(flip_prob=1)).for_samples(0, np.arange(103)).flips.all()


def test_replacements():
    plan = make_plan(50)
    chosen = np.array([[plan.replacement(2, sample, attempt) for attempt in range(1, 9)] for sample in range(50)])
    assert ((chosen >= 0) & (chosen < 50)).all()
    assert (chosen != np.arange(50)[:, None]).all()
    assert len(np.unique(chosen)) > 45
    assert all(len(set(row)) > 4 for row in chosen.tolist())
    assert plan.replacement(2, 7, 3) == make_plan(50).replacement(2, 7, 3)
    assert [plan.replacement(3, sample, 1) for sample in range(50)] != chosen[:, 0].tolist()
    assert Plan([50], [30], 1, 0, RegionConfig()).replacement(0, 0, 1) == 0


def test_nothing_is_drawn_for_options_that_are_off():
    batch = make_plan().batch(0, 0, 1)
    assert batch.colour is batch.blur_sigma is batch.erase_fractions is None
    assert batch.erase_boxes((256, 128)) is None


def test_colour_options():
    num = 20_000
    plan = Plan(np.full(num, 100), np.full(num, 50), 1, 0, COLOURED)
    batch = plan.for_samples(0, np.arange(num))
    assert (batch.colour[:, 0] == batch.colour[:, 1]).all()
    # A grey matrix has three equal rows.
    grey = (np.ptp(batch.colour[:, 0], axis=1) < 1e-6).all(axis=1)
    assert abs(grey.mean() - 0.2) < 0.01
    untouched = (np.abs(batch.colour[:, 0] - np.eye(3, 4)) < 1e-5).all(axis=(1, 2))
    assert abs(untouched.mean() - 0.2 * 0.8) < 0.01
    assert np.abs((batch.blur_sigma > 0).mean(axis=0) - 0.3).max() < 0.01
    assert batch.blur_sigma[batch.blur_sigma > 0].min() >= 0.1
    assert batch.blur_sigma.max() <= 2
    boxes = batch.erase_boxes((256, 128))
    assert boxes.dtype == np.int32
    assert (boxes >= 0).all()
    assert (boxes <= [256, 128, 256, 128]).all()
    areas = (boxes[:, :, 2] - boxes[:, :, 0]) * (boxes[:, :, 3] - boxes[:, :, 1]) / (256 * 128)
    assert np.abs((areas > 0).mean(axis=0) - 0.4).max() < 0.01
    assert 0.015 < areas[areas > 0].min() < areas.max() < 0.21
    assert (np.abs(np.corrcoef(areas.T) - np.eye(2)) < 0.03).all()


def test_colour_on_the_input_region_only():
    regions = RegionConfig(brightness=0.4, blur_prob=1, erasing_prob=1, colour_on="a")
    batch = make_plan(regions=regions).for_samples(0, np.arange(103))
    assert (batch.colour[:, 1] == np.eye(3, 4)).all()
    assert (batch.blur_sigma[:, 1] == 0).all()
    assert (batch.erase_fractions[:, 1] == 0).all()
    assert (batch.blur_sigma[:, 0] > 0).all()
    assert (batch.erase_fractions[:, 0, 2:] > 0).all()
    assert (batch.colour[:, 0] != np.eye(3, 4)).any(axis=(1, 2)).mean() > 0.6


def test_colour_matrices_are_the_five_steps_in_turn():
    config = RegionConfig(brightness=0.5, contrast=0.6, saturation=0.7, hue=0.2, colour_jitter_prob=1, grey_prob=0)
    generator = np.random.default_rng(0)
    values = generator.random((20, 6))
    levels = generator.uniform(0, 255, (7, 3))
    luma = np.array([0.299, 0.587, 0.114])
    to_yiq = np.array([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    for row, matrix in zip(values, colour_matrices(config, values), strict=True):
        brightness, contrast, saturation, hue = (1 + (2 * row[1:5] - 1) * [0.5, 0.6, 0.7, 0.2]) - [0, 0, 0, 1]
        expected = levels * brightness
        expected = 127.5 + contrast * (expected - 127.5)
        grey = (expected @ luma)[:, None]
        expected = grey + saturation * (expected - grey)
        yiq = expected @ to_yiq.T
        turned = (yiq[:, 1] + 1j * yiq[:, 2]) * np.exp(2j * np.pi * hue)
        expected = np.stack([yiq[:, 0], turned.real, turned.imag], axis=1) @ np.linalg.inv(to_yiq).T
        assert np.abs(levels @ matrix[:, :3].T + matrix[:, 3] - expected).max() < 0.05
    grey_config = RegionConfig(colour_jitter_prob=0, grey_prob=1)
    (matrix,) = colour_matrices(grey_config, values[:1])
    assert np.abs(matrix[:, :3] - luma).max() < 1e-6
    assert (matrix[:, 3] == 0).all()


def test_rows_can_be_replaced():
    plan = make_plan(regions=COLOURED)
    batch = plan.batch(0, 0, 1)
    rows, others = np.array([1, 7]), np.array([99, 4])
    merged = batch.with_rows(rows, plan.for_samples(0, others))
    expected = batch.samples.copy()
    expected[rows] = others
    assert_equal_plans(merged, plan.for_samples(0, expected))
    assert_equal_plans(batch, plan.batch(0, 0, 1))


def test_the_users_mistakes():
    with pytest.raises(UserError, match=r"batch \(12\) is larger than the data set \(5 images\)"):
        make_plan(5, 12)
    with pytest.raises(UserError, match="at least 1"):
        make_plan(5, 0)
    with pytest.raises(UserError, match=r"batch \(12\) cannot be cut into 5 equal parts"):
        make_plan().batch(0, 0, 5)
    for options in ({"crop_scale": (0, 1)}, {"crop_scale": (0.5, 0.4)}, {"crop_scale": (0.5, 1.1)}, {"crop_aspect": (-1, 1)}):
        with pytest.raises(UserError, match=next(iter(options))):
            RegionConfig(**options)
    for options in ({"flip_prob": 1.1}, {"hue": 0.6}, {"brightness": -0.1}, {"colour_on": "b"}, {"erasing_scale": (0.1, 2)}):
        with pytest.raises(UserError, match=next(iter(options))):
            RegionConfig(**options)
