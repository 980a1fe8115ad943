"""Losses of supervised re-identification against loops over pairs in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.models.identity_head import HeadOutputs
from personmae.training.identity_losses import LossConfig, hard_pairs, identity_loss, triplet_loss


def brute_triplet(features, labels, config):
    """Mean over anchors of the batch-hard triplet loss, pair by pair."""
    terms = []
    points = [row.tolist() for row in features.double()]
    for i, anchor in enumerate(points):
        distances = [math.dist(anchor, other) for other in points]
        positives = [d for d, label in zip(distances, labels, strict=True) if label == labels[i]]
        negatives = [d for d, label in zip(distances, labels, strict=True) if label != labels[i]]
        if not negatives:
            terms.append(0.0)
            continue
        excess = max(positives) - min(negatives)
        terms.append(math.log1p(math.exp(excess)) if config.triplet == "soft" else max(0.0, excess + config.margin))
    return sum(terms) / len(terms)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.sampled_from(["soft", "margin"]), st.integers(0, 1000))
def test_triplets_are_those_of_the_definition(labels, kind, seed):
    config = LossConfig(triplet=kind, margin=0.7)
    features = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed))
    loss = triplet_loss(hard_pairs(features, torch.tensor(labels)), config)
    assert loss.item() == pytest.approx(brute_triplet(features, labels, config), rel=1e-5, abs=1e-6)


def test_gradients_are_those_of_float64():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    features = torch.randn(7, 6, requires_grad=True)
    wide = features.detach().double().requires_grad_()
    triplet_loss(hard_pairs(features, labels), LossConfig()).backward()
    # The chosen pairs kept, the rest by autograd.
    distances = torch.cdist(wide, wide)
    same = labels[:, None] == labels[None]
    positive = distances.masked_fill(~same, -1).max(1).values
    negative = distances.masked_fill(same, torch.inf).min(1).values
    F.softplus(positive - negative).mean().backward()
    assert torch.allclose(features.grad.double(), wide.grad, atol=1e-6)


def test_images_that_are_equal_have_finite_gradients():
    features = torch.ones(6, 4, requires_grad=True)
    triplet_loss(hard_pairs(features, torch.tensor([0, 0, 1, 1, 2, 2])), LossConfig()).backward()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_features", [1, 2, 5])
def test_half_of_each_loss_is_that_of_the_first_feature(smoothing, num_features):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 3, 3])
    features = tuple(torch.randn(6, 4 + k, generator=generator) for k in range(num_features))
    logits = tuple(torch.randn(6, 5, generator=generator) for _ in range(num_features))
    config = LossConfig(id_weight=0.7, triplet_weight=1.3, label_smoothing=smoothing)
    losses = identity_loss(HeadOutputs(logits, features), features, labels, config)

    def smoothed(values):
        total = 0.0
        for row, label in zip(values.double().tolist(), labels.tolist(), strict=True):
            norm = math.log(sum(math.exp(value) for value in row))
            total += sum(((1 - smoothing) * (k == label) + smoothing / 5) * (norm - value) for k, value in enumerate(row))
        return total / len(labels)

    def shared(values):
        return values[0] if len(values) == 1 else 0.5 * values[0] + 0.5 * sum(values[1:]) / (len(values) - 1)

    identity = shared([smoothed(values) for values in logits])
    triplet = shared([brute_triplet(values, labels.tolist(), config) for values in features])
    assert losses.id.item() == pytest.approx(identity, rel=1e-5)
    assert losses.triplet.item() == pytest.approx(triplet, rel=1e-5)
    assert losses.total.item() == pytest.approx(0.7 * identity + 1.3 * triplet, rel=1e-5)
    assert losses.accuracy.item() == pytest.approx((logits[0].argmax(1) == labels).double().mean().item())


def test_without_triplets_and_with_unit_features():
    labels = torch.tensor([0, 0, 1, 1])
    features = (torch.randn(4, 3),)
    logits = (torch.randn(4, 2),)
    none = identity_loss(HeadOutputs(logits, features), features, labels, LossConfig(triplet="none"))
    assert none.triplet.item() == 0
    assert none.total.item() == pytest.approx(F.cross_entropy(logits[0], labels).item())
    unit = identity_loss(HeadOutputs(logits, features), features, labels, LossConfig(normalise=True))
    expected = brute_triplet(F.normalize(features[0], dim=1), labels.tolist(), LossConfig())
    assert unit.triplet.item() == pytest.approx(expected, rel=1e-5)


def test_under_autocast_it_is_float32():
    labels = torch.tensor([0, 0, 1, 1])
    features, logits = (torch.randn(4, 300),), (torch.randn(4, 2),)
    with torch.autocast("cpu", torch.bfloat16):
        inside = identity_loss(HeadOutputs(logits, features), features, labels, LossConfig())
    assert torch.equal(inside.total, identity_loss(HeadOutputs(logits, features), features, labels, LossConfig()).total)


@pytest.mark.parametrize("options", [{"id_weight": -1}, {"triplet_weight": -0.5}, {"label_smoothing": 1.0}])
def test_weights_that_make_no_sense(options):
    with pytest.raises(UserError, match=next(iter(options))):
        LossConfig(**options)
