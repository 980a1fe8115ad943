"""area_resize against OpenCV, to the bit, and against averages over areas in float64."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.data.images import sample_box
from personmae_kernels import compiled, launching
from personmae_kernels.area_resize import area_resize

needs_compiled = pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())


@st.composite
def cases(draw):
    """(image, box, size of the result)"""
    H, W = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    y0, x0 = draw(st.integers(0, H - 1)), draw(st.integers(0, W - 1))
    y1, x1 = draw(st.integers(y0 + 1, H)), draw(st.integers(x0 + 1, W))
    image = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, (H, W, 3), dtype=np.uint8)
    if draw(st.booleans()):
        # Where sums round: halves, and the largest level.
        image = image // 128 * 255
    return image, (y0, x0, y1, x1), (draw(st.integers(1, y1 - y0)), draw(st.integers(1, x1 - x0)))


def shares(source, target):
    """Which share each source cell has of each target cell, float64 [target, source]."""
    edges = np.linspace(0, source, target + 1)
    cells = np.arange(source)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(overlap, 0, None) * target / source


@needs_compiled
@settings(max_examples=400, deadline=None)
@given(cases())
def test_it_is_opencv_to_the_bit_and_the_average_over_areas(case):
    image, (y0, x0, y1, x1), size = case
    out = np.full((*size, 3), 77, dtype=np.uint8)
    whole = (y1 - y0) % size[0] == 0 and (x1 - x0) % size[1] == 0
    assert area_resize(image, (y0, x0, y1, x1), out) is not whole
    if whole:
        assert (out == 77).all()
        return
    part = image[y0:y1, x0:x1]
    assert np.array_equal(out, cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA))
    exact = np.einsum("ij,jkc,lk->ilc", shares(y1 - y0, size[0]), part.astype(np.float64), shares(x1 - x0, size[1]))
    # Parts of a cell below a thousandth are left out.
    assert np.abs(out - exact).max() <= 0.5 + 255 * 4e-3


@needs_compiled
def test_regions_are_the_same_without_it():
    """Large boxes of each of the three kinds: shrunk along both axes, along one."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (400, 310, 3), dtype=np.uint8)
    for box in ((3, 5, 391, 300), (10, 20, 390, 100), (30, 2, 200, 308), (0, 0, 400, 310)):
        for flip in (False, True):
            ours = sample_box(image, box, flip, (256, 128))
            launching.use_operators("reference")
            try:
                assert np.array_equal(ours, sample_box(image, box, flip, (256, 128)))
            finally:
                launching.use_operators(None)


def test_where_it_does_not_serve_it_says_so(monkeypatch):
    image, out = np.zeros((40, 30, 3), dtype=np.uint8), np.ones((7, 7, 3), dtype=np.uint8)
    frozen = image.copy()
    frozen.flags.writeable = False
    assert not area_resize(frozen, (0, 0, 40, 30), out)
    monkeypatch.setattr(compiled, "available", lambda cuda=False: False)
    assert not area_resize(image, (0, 0, 40, 30), out)
    assert (out == 1).all()


@needs_compiled
@pytest.mark.parametrize("box", [(0, 0, 41, 30), (-1, 0, 40, 30), (5, 0, 5, 30), (0, 0, 6, 30), (0, 25, 40, 30)])
def test_boxes_that_do_not_fit(box):
    image, out = torch.zeros(40, 30, 3, dtype=torch.uint8), torch.zeros(7, 7, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="box: must"):
        torch.ops.personmae.area_resize_(out, image, *box)


@needs_compiled
def test_opcheck():
    image, out = torch.zeros(40, 30, 3, dtype=torch.uint8), torch.zeros(7, 7, 3, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.personmae.area_resize_.default, (out, image, 0, 0, 40, 30))
