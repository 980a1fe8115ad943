"""Ranked lists: which queries are chosen, and that each frame and mark says the truth."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personmae.data.records import PersonImage
from personmae.visuals.ranked_lists import GAP_PX, LABEL_PX, RIGHT, WRONG, choose_queries, ranked_list_picture

SIZE = (64, 32)


@settings(max_examples=100, deadline=None)
@given(
    precision=st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), st.floats(0, 1)), max_size=30),
    num_queries=st.integers(1, 9),
)
def test_chosen_queries_are_spread_and_scored(precision: list[float], num_queries: int) -> None:
    chosen = choose_queries(precision, num_queries)
    scored = [index for index, value in enumerate(precision) if not np.isnan(value)]
    assert len(chosen) == len(set(chosen)) == min(num_queries, len(scored))
    assert set(chosen) <= set(scored)
    values = [precision[index] for index in chosen]
    assert values == sorted(values)
    # The middles of as many equal parts of the sorted scores.
    ranks = [sorted(scored, key=lambda index: (precision[index], index)).index(query) for query in chosen]
    for number, rank in enumerate(ranks):
        assert rank <= Fraction(2 * number + 1, 2 * len(chosen)) * len(scored) < rank + 1


def test_choice_of_worked_example() -> None:
    assert choose_queries([0.9, 0.1, float("nan"), 0.5, 0.3], 2) == [4, 0]
    with pytest.raises(ValueError, match="num_queries is 0"):
        choose_queries([0.5], 0)


@pytest.fixture
def people(tmp_path: Path) -> tuple[list[PersonImage], list[PersonImage]]:
    def image(name: str, person: int, camera: int, grey: int) -> PersonImage:
        Image.new("RGB", (20, 40), (grey, grey, grey)).save(tmp_path / name)
        return PersonImage(tmp_path / name, person, camera)

    query = [image("q0.png", 1, 1, 10), image("q1.png", 2, 1, 20)]
    gallery = [
        image("g0.png", 1, 1, 100),  # left out for query 0: its own camera
        image("g1.png", 1, 2, 120),
        image("g2.png", 2, 2, 140),
        image("g3.png", 0, 3, 160),
    ]
    return query, gallery


def test_frames_and_marks_follow_the_ranking(people: tuple[list[PersonImage], list[PersonImage]]) -> None:
    query, gallery = people
    query_features = np.array([[0.0], [10.0]])
    gallery_features = np.array([[0.0], [3.0], [12.0], [1.0]])
    picture = ranked_list_picture(
        query, gallery, query_features, gallery_features, chosen=[0, 1], num_nearest=4, size=SIZE, metric="euclidean"
    )
    sheet = np.asarray(picture)
    first_x = LABEL_PX + SIZE[1] + 3 * GAP_PX
    # The grey of the middle says which image it is, the frame whether it is right. The last rank of query 0 is empty.
    expected: list[list[tuple[int, tuple[int, int, int]] | None]] = [
        [(160, WRONG), (120, RIGHT), (140, WRONG), None],
        [(140, RIGHT), (120, WRONG), (160, WRONG), (100, WRONG)],
    ]
    bottom = sheet.shape[0] - GAP_PX
    for row, ranks in enumerate(expected):
        y = bottom - (2 - row) * (SIZE[0] + GAP_PX)
        assert abs(int(sheet[y + SIZE[0] // 2, LABEL_PX + SIZE[1] // 2, 0]) - (10, 20)[row]) <= 1
        for rank, seen in enumerate(ranks):
            x = first_x + rank * (SIZE[1] + GAP_PX)
            middle, edge = sheet[y + SIZE[0] // 2, x + SIZE[1] // 2], sheet[y + SIZE[0] - 2, x + 1]
            if seen is None:
                assert middle.tolist() == edge.tolist() == [255, 255, 255]
                continue
            assert abs(int(middle[0]) - seen[0]) <= 1
            assert edge.tolist() == list(seen[1])
            # The badge is told without colour: a tick leaves the upper left of the badge plain, a cross strikes it.
            badge = sheet[y : y + 19, x + SIZE[1] - 19 : x + SIZE[1]]
            assert (badge[5, 5] == 255).all() == (seen[1] == WRONG)
            assert (badge == 255).all(axis=-1).sum() > 10


def test_by_default_queries_are_chosen_by_these_features(people: tuple[list[PersonImage], list[PersonImage]]) -> None:
    query, gallery = people
    features = np.eye(4)
    # Query 0 finds its match first (the match ties with others and has the smallest index), query 1 third.
    default = ranked_list_picture(query, gallery, features[:2], features, num_queries=1, size=SIZE)
    best = ranked_list_picture(query, gallery, features[:2], features, chosen=[0], size=SIZE)
    both = ranked_list_picture(query, gallery, features[:2], features, num_queries=2, size=SIZE)
    worst_first = ranked_list_picture(query, gallery, features[:2], features, chosen=[1, 0], size=SIZE)
    assert default == best
    assert both == worst_first


def test_no_query_gives_a_sheet_with_the_caption_alone(people: tuple[list[PersonImage], list[PersonImage]]) -> None:
    query, gallery = people
    assert ranked_list_picture(query, gallery, np.eye(4)[:2], np.eye(4), chosen=[], size=SIZE).height < 200
    with pytest.raises(ValueError, match="3 query features"):
        ranked_list_picture(query, gallery, np.eye(4)[:3], np.eye(4), size=SIZE)
