"""Reconstruction pictures: every pixel of a sheet against where it has to come from, and input that does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from personmae.visuals.reconstructions import (
    CELL_HEIGHT_PX,
    GAP_PX,
    HIDDEN_GREY,
    LABEL_PX,
    NOT_A_NUMBER,
    OUTLINE_A,
    OUTLINE_B,
    TITLE_PX,
    reconstruction_picture,
)

SCALE = 8  # 24 rows to 192


def regions(num_samples: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    a, b, predicted = generator.integers(0, 120, (3, num_samples, 24, 12, 3), dtype=np.uint8)
    return a, generator.random((num_samples, 6 * 3)) < 0.5, b, predicted


def cell(sheet: np.ndarray, row: int, column: int, top: int = 0) -> np.ndarray:
    """One cell of the sheet at the regions' own resolution: the middle of each enlarged pixel."""
    y = top + GAP_PX + row * (24 * SCALE + GAP_PX)
    x = LABEL_PX + column * (12 * SCALE + GAP_PX)
    return sheet[y : y + 24 * SCALE, x : x + 12 * SCALE][SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]


def test_rows_are_a_masked_b_and_prediction() -> None:
    assert round(CELL_HEIGHT_PX / 24) == SCALE
    a, mask, b, predicted = regions()
    sheet = np.asarray(reconstruction_picture(a, mask, b, predicted, 4))
    for number in range(3):
        seen = cell(sheet, 0, number)
        for patch in range(18):
            rows, columns = slice(patch // 3 * 4, patch // 3 * 4 + 4), slice(patch % 3 * 4, patch % 3 * 4 + 4)
            if mask[number, patch]:
                assert (seen[rows, columns] == HIDDEN_GREY).all()
            else:
                np.testing.assert_array_equal(seen[rows, columns], a[number, rows, columns])
        np.testing.assert_array_equal(cell(sheet, 1, number), b[number])
        np.testing.assert_array_equal(cell(sheet, 2, number), predicted[number])


def test_a_float_prediction_is_scaled_clipped_and_marked_where_it_is_no_number() -> None:
    a, mask, b, _ = regions(1)
    predicted = np.zeros((1, 24, 12, 3), np.float32)
    predicted[0, 0, 0], predicted[0, 0, 1], predicted[0, 0, 2, 1] = 0.5, [-3, 2, np.inf], np.nan
    found = cell(np.asarray(reconstruction_picture(a, mask, b, predicted, 4)), 2, 0)
    assert found[0, :4].tolist() == [[128] * 3, [0, 255, 255], list(NOT_A_NUMBER), [0, 0, 0]]


def test_a_title_moves_the_rows_down() -> None:
    a, mask, b, predicted = regions(1)
    sheet = np.asarray(reconstruction_picture(a, mask, b, predicted, 4, title="step 10"))
    np.testing.assert_array_equal(cell(sheet, 1, 0, TITLE_PX), b[0])


def test_boxes_add_a_row_with_both_regions_where_they_were_cut_out() -> None:
    # A is the left half of the image, B the right half: black and white, with a red left edge that a flip moves.
    a, b = np.zeros((2, 24, 12, 3), np.uint8), np.full((2, 24, 12, 3), 255, np.uint8)
    b[:, :, :4] = (255, 0, 0)
    boxes = np.array([[[0, 0, 48, 24], [0, 24, 48, 48]]] * 2)
    flips = np.array([[False, False], [False, True]])
    mask = np.zeros((2, 18), bool)
    sheet = np.asarray(reconstruction_picture(a, mask, b, b, 4, boxes=boxes, flips=flips))
    assert sheet.shape[0] > np.asarray(reconstruction_picture(a, mask, b, b, 4)).shape[0]
    for number, flipped in enumerate((False, True)):
        x = LABEL_PX + number * (12 * SCALE + GAP_PX)
        place = sheet[GAP_PX : GAP_PX + 24 * SCALE, x : x + 12 * SCALE]
        # The 48 x 48 union is as wide as the cell (96 px), so it stands in the middle of its height.
        middle = place[len(place) // 2]
        assert middle[20].tolist() == [0, 0, 0]
        near, far = middle[56].tolist(), middle[88].tolist()
        assert (near, far) == (([255, 255, 255], [255, 0, 0]) if flipped else ([255, 0, 0], [255, 255, 255]))
        for outline in (OUTLINE_A, OUTLINE_B):
            assert (place == outline).all(axis=-1).any()
        assert (place[:40] == 255).all()


def test_what_does_not_fit_is_refused() -> None:
    a, mask, b, predicted = regions()
    with pytest.raises(ValueError, match="must be of one shape"):
        reconstruction_picture(a, mask, b[:2], predicted, 4)
    with pytest.raises(ValueError, match="patches of 5 pixels"):
        reconstruction_picture(a, mask, b, predicted, 5)
    with pytest.raises(ValueError, match=r"bool \(3, 18\) is wanted"):
        reconstruction_picture(a, mask[:, :17], b, predicted, 4)
    with pytest.raises(ValueError, match="mask is int64"):
        reconstruction_picture(a, mask.astype(np.int64), b, predicted, 4)
    with pytest.raises(ValueError, match="region_a is float64"):
        reconstruction_picture(a / 255, mask, b, predicted, 4)
    with pytest.raises(ValueError, match="predicted is int64"):
        reconstruction_picture(a, mask, b, predicted.astype(np.int64), 4)
    with pytest.raises(ValueError, match="boxes"):
        reconstruction_picture(a, mask, b, predicted, 4, boxes=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="not empty"):
        reconstruction_picture(a[:0], mask[:0], b[:0], predicted[:0], 4)
