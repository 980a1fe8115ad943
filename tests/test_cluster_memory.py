"""The memory of clusters: its loss and its updates against the sample-by-sample code in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.training.cluster_memory import ClusterMemory, MemoryConfig, cluster_means


def unit(rng, *shape) -> torch.Tensor:
    return F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=-1)


def by_loop(vectors, features, labels, config):
    """What the published code does, in float64: sample after sample, or one sample of each cluster."""
    vectors = vectors.double().clone()
    if config.update == "all":
        chosen = list(zip(labels.tolist(), features, strict=True))
    else:
        chosen = []
        for cluster in sorted(set(labels.tolist())):
            own = features[labels == cluster]
            if config.update == "hard":
                chosen.append((cluster, own[int((own @ vectors[cluster]).argmin())]))
            else:
                chosen.append((cluster, own.mean(0)))
    for cluster, feature in chosen:
        moved = config.momentum * vectors[cluster] + (1 - config.momentum) * feature
        vectors[cluster] = moved / moved.norm()
    return vectors


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_clusters=st.integers(1, 9),
    batch=st.integers(1, 40),
    width=st.integers(1, 17),
    update=st.sampled_from(["all", "hard", "mean"]),
    momentum=st.sampled_from([0.0, 0.1, 0.2, 0.9]),
)
def test_updates_are_those_of_the_loop(seed, num_clusters, batch, width, update, momentum):
    rng = np.random.default_rng(seed)
    config = MemoryConfig(update=update, momentum=momentum)
    vectors, features, labels = unit(rng, num_clusters, width), unit(rng, batch, width), rng.integers(0, num_clusters, batch)
    memory = ClusterMemory(vectors.float(), config)
    memory.update(features.float(), labels)
    expected = by_loop(vectors, features, labels, config)
    # With little width, opposite vectors may nearly cancel, where the direction hangs on the last bits.
    stable = torch.ones(num_clusters, dtype=torch.bool)
    if width < 4:
        stable = (memory.vectors.double() - expected).norm(dim=1) < 1e-2
        assert stable.double().mean() >= 0.3 or num_clusters < 4
    assert torch.allclose(memory.vectors[stable].double(), expected[stable], atol=2e-4 if width < 4 else 2e-5)
    untouched = np.setdiff1d(np.arange(num_clusters), labels)
    assert torch.equal(memory.vectors[untouched], vectors.float()[untouched])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_the_formula(autocast):
    rng = np.random.default_rng(0)
    vectors, raw, labels = unit(rng, 7, 12), torch.from_numpy(rng.standard_normal((5, 12))), torch.tensor([0, 6, 6, 2, 3])
    memory = ClusterMemory(vectors.float(), MemoryConfig(temperature=0.07))
    given_ = raw.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, accuracy = memory(F.normalize(given_.float(), dim=1), labels)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = raw.clone().requires_grad_()
    logits = F.normalize(exact, dim=1) @ vectors.t() / 0.07
    expected = (torch.logsumexp(logits, 1) - logits[torch.arange(5), labels]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(given_.grad.double(), exact.grad, atol=1e-5)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert not memory.vectors.requires_grad


def test_means_of_clusters():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((20, 6)).astype(np.float32)
    labels = np.array([0, 1, 2, -1] * 5)
    means = cluster_means(features, labels)
    assert means.dtype == torch.float32
    for cluster in range(3):
        mean = features[labels == cluster].astype(np.float64).mean(0)
        assert np.allclose(means[cluster].numpy(), mean / np.linalg.norm(mean), atol=1e-6)


def test_mistakes():
    memory = ClusterMemory(torch.eye(3), MemoryConfig())
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="there are 3 clusters"):
            memory.update(torch.eye(3)[:2], np.array(wrong))
    memory.update(torch.zeros(0, 3), np.zeros(0, dtype=np.int64))
    assert torch.equal(memory.vectors, torch.eye(3))
    for wrong in ({"temperature": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            MemoryConfig(**wrong)
