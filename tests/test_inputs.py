"""Features and ids from other code bases: what is taken, and that what is not is named with its row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from personmae.configs import UserError
from personmae.evaluation.inputs import count_zero_rows, feature_tensor, id_array, labels_from
from personmae.evaluation.protocol import evaluate_features


def call(num_queries=2, num_gallery=3, **changes):
    values = {
        "query_features": np.eye(num_queries, 4),
        "gallery_features": np.eye(num_gallery, 4),
        "query_people": np.arange(num_queries),
        "gallery_people": np.arange(num_gallery),
        "query_cameras": np.full(num_queries, 1),
        "gallery_cameras": np.full(num_gallery, 2),
    }
    return evaluate_features(**{**values, **changes})


def test_features_of_any_kind_are_taken():
    expected = call().mAP
    eye = np.eye(2, 4)
    kinds = eye.tolist(), eye.astype(np.float16), eye.astype(np.int64), torch.from_numpy(eye).requires_grad_(), torch.eye(2, 4, dtype=torch.bfloat16)
    for features in kinds:
        assert call(query_features=features).mAP == expected
    assert feature_tensor("query", torch.eye(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert feature_tensor("query", np.eye(2)).dtype == torch.float64
    assert feature_tensor("query", np.eye(2, dtype=np.int64)).dtype == torch.float64
    assert feature_tensor("query", np.eye(4)[:, ::2]).is_contiguous()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[1, 2], [np.nan, 0], [0, np.inf]]), r"query features hold NaN or infinity in 2 of 3 rows: 1, 2$"),
        (np.full((9, 2), np.nan), r"9 of 9 rows: 0, 1, 2, 3, 4, \.\.\."),
        (torch.full((2, 2), torch.inf), "NaN or infinity in 2 of 2"),
        (np.ones(3), r"shape \(3,\); \[N, D\] is wanted"),
        (np.ones((0, 3)), "the query is empty"),
        (np.ones((3, 0)), "no dimension"),
        ([[1, 2], [3]], "no array"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        call(query_features=features)


@pytest.mark.parametrize("features", [np.ones((2, 2), complex), [["a", "b"]], np.ones((2, 2), bool), None, torch.ones(2, 2, dtype=torch.bool)])
def test_features_of_no_number(features):
    with pytest.raises(TypeError, match="real numbers are wanted"):
        feature_tensor("query", features)


def test_large_features_are_finite_though_their_sum_is_not():
    assert feature_tensor("query", np.full((1, 2), 3e38, np.float32)).tolist() == [[np.float32(3e38)] * 2]


def test_nothing_is_copied_or_changed():
    features = np.eye(3, dtype=np.float32)
    features.flags.writeable = False
    assert feature_tensor("query", features).data_ptr() == features.ctypes.data


def test_ids_of_any_kind_are_taken():
    for ids in ([1, 2], (1, 2), np.array([1, 2], np.uint8), torch.tensor([1, 2]), np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([[1], [2]])):
        found = id_array("query people", ids, 2)
        assert found.tolist() == [1, 2]
        assert found.dtype == np.int64
    huge = np.array([2**62, 2**62 + 1])
    scores = call(query_people=huge, gallery_people=np.append(huge, 5))
    assert scores.mAP == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], r"query people: shape \(3,\), but there are features of 2 images"),
        (np.array([1.0, 2.5]), "2.5 in row 1 is no whole number"),
        (np.array([np.nan, 2.0]), "nan in row 0"),
        (np.array([1.0, np.inf]), "inf in row 1"),
        (np.array([1, 2**24 + 2], np.float32), "row 1 is no whole number that float32 can hold"),
        (np.array([1, 2**63], np.uint64), "beyond 63 bits"),
        (np.array([[1, 2], [3, 4]]), r"shape \(2, 2\)"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        call(query_people=ids)


@pytest.mark.parametrize("ids", [["a", "b"], [True, False], [10**30, 1], [None, 1]])
def test_ids_of_no_integer(ids):
    with pytest.raises(TypeError, match=r"numpy\.unique"):
        call(query_people=ids)


def test_junk_is_refused_with_advice_or_dropped_with_a_count():
    people = np.array([0, -1, 1])
    with pytest.raises(ValueError, match=r"1 gallery images are of person -1, first image 1: .*junk='drop'"):
        call(gallery_people=people)
    # The junk image looks like the second query; dropped, it does no harm.
    features = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0]])
    scores = call(gallery_people=people, gallery_features=features, junk="drop")
    assert (scores.mAP, scores.num_gallery) == (1, 2)
    assert "1 junk images dropped" in str(scores)
    with pytest.raises(ValueError, match="a query cannot be junk"):
        call(query_people=[0, -1], junk="drop")
    with pytest.raises(ValueError, match=r"gallery image 2 is of person -5 \(1 such images\): people are numbered from 0"):
        call(gallery_people=[0, 1, -5], junk="drop")
    with pytest.raises(ValueError, match="all 3 gallery images are junk"):
        call(gallery_people=[-1, -1, -1], junk="drop")
    with pytest.raises(ValueError, match="junk is 'keep'; allowed: refuse, drop"):
        call(junk="keep")
    # Cameras may have any number.
    assert call(query_cameras=[-1, -7], gallery_cameras=[-2, -1, 10**15]).mAP == 1


def test_dimensions_and_lengths_have_to_agree():
    with pytest.raises(ValueError, match="query features have 4 dimensions, gallery features 5"):
        call(gallery_features=np.eye(3, 5))
    with pytest.raises(ValueError, match="gallery cameras: shape"):
        call(gallery_cameras=[1, 2])
    with pytest.raises(ValueError, match="cameras are given of one part only"):
        call(query_cameras=None)
    with pytest.raises(ValueError, match="names of 1 queries"):
        call(query_names=["a.jpg"])


def test_a_gallery_of_one_and_one_of_one_camera():
    alone = call(1, 1)
    assert (alone.mAP, alone.rank(50), alone.num_gallery) == (1, 1, 1)
    with pytest.raises(UserError, match=r"none of the 2 queries .* 2 have one from their own camera, .* if the set has no cameras, give none"):
        call(gallery_cameras=[1, 1, 1])
    with pytest.raises(UserError, match="numbered alike"):
        call(query_people=[7, 8])
    without = call(query_cameras=None, gallery_cameras=None)
    assert without.mAP == 1
    assert without.num_left_out == 0
    assert "no cameras, nothing left out" in str(without)


def test_rows_of_zeros_are_counted_and_said():
    scores = call(gallery_features=np.vstack([np.eye(2, 4), np.zeros(4)]))
    assert "features of length zero: 0 of the queries, 1 of the gallery" in str(scores)
    assert count_zero_rows(torch.zeros(3, 2)) == 3
    assert "length zero" not in str(call())


def test_labels_keep_their_order():
    query, gallery, kept = labels_from([4, 5], [5, -1, 4], [1, 2], [3, 4, 5], (2, 3), "drop")
    assert (query.people.tolist(), gallery.people.tolist(), gallery.cameras.tolist()) == ([4, 5], [5, 4], [3, 5])
    assert kept.tolist() == [True, False, True]
