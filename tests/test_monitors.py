"""Collapse monitors against float64 numpy written from their definitions, and what they say of tokens known to have collapsed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from personmae.training.monitors import collapse_monitors, effective_rank, mean_cosine, mean_token_loss, spread_tokens

Array = npt.NDArray[np.float64]


def normalised(tokens: Array) -> Array:  # [N, D]
    mean = tokens.mean(axis=1, keepdims=True)
    return (tokens - mean) / np.sqrt(tokens.var(axis=1, keepdims=True) + 1e-6)


def brute_cosine(tokens: Array) -> float:
    pairs = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    return float(np.mean(pairs))


def brute_rank(tokens: Array) -> float:
    # Singular values from the eigenvalues of the Gram matrix: another way than the one tested.
    gram = tokens.T @ tokens if tokens.shape[0] > tokens.shape[1] else tokens @ tokens.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = [share for share in values / values.sum() if share > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def brute_constant_loss(tokens: Array) -> float:
    # The least squares fit of a constant, by numpy's solver.
    ones = np.ones((len(tokens), 1))
    fitted = ones @ np.linalg.lstsq(ones, tokens, rcond=None)[0]
    return float(np.mean((tokens - fitted) ** 2))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5, 7), torch.float32), ((2, 31, 12), torch.float32), ((1, 2, 3), torch.float64), ((4, 9, 33), torch.bfloat16)]
)
def test_monitors_are_what_they_say(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    # Unequal channels and a common part, so that no monitor is at an end of its range.
    tokens = (torch.randn(shape, generator=generator) * torch.linspace(0.2, 3, shape[2]) + torch.randn(shape[2], generator=generator)).to(dtype)
    before = tokens.clone()
    expected = normalised(tokens.double().numpy().reshape(-1, shape[2]))
    found = collapse_monitors(tokens)
    assert found.std.item() == pytest.approx(expected.std(axis=0).mean(), rel=1e-5)
    assert found.cosine.item() == pytest.approx(brute_cosine(expected), abs=1e-5)
    assert found.rank.item() == pytest.approx(brute_rank(expected), rel=1e-4)
    assert found.mean_token_loss.item() == pytest.approx(brute_constant_loss(expected), rel=1e-5)
    assert torch.equal(tokens, before)
    for value in (found.std, found.cosine, found.rank, found.mean_token_loss):
        assert value.shape == ()
        assert value.dtype == torch.float32


def test_a_collapse_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(16, generator=generator).expand(4, 8, 16)
    collapsed = collapse_monitors(same)
    assert collapsed.std.item() == pytest.approx(0, abs=1e-6)
    assert collapsed.cosine.item() == pytest.approx(1, abs=1e-5)
    assert collapsed.rank.item() == pytest.approx(1, abs=1e-2)
    assert collapsed.mean_token_loss.item() == pytest.approx(0, abs=1e-6)
    # All on one line: far apart, but one direction.
    line = same * torch.randn(4, 8, 1, generator=generator).sign()
    assert collapse_monitors(line).rank.item() == pytest.approx(1, abs=1e-2)
    assert collapse_monitors(line).std.item() > 0.5
    healthy = collapse_monitors(torch.randn(16, 128, 16, generator=generator))
    assert healthy.std.item() == pytest.approx(1, abs=0.05)
    assert healthy.cosine.item() == pytest.approx(0, abs=0.01)
    assert healthy.rank.item() == pytest.approx(15, abs=0.3)


def test_the_rank_of_known_spectra() -> None:
    assert effective_rank(torch.eye(9)[:, :6]).item() == pytest.approx(6, rel=1e-5)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert math.isnan(effective_rank(torch.zeros(3, 4)).item())


def test_the_cosine_of_known_tokens() -> None:
    assert mean_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])).item() == pytest.approx(-1 / 3, rel=1e-6)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 0.0]])).item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("num_images", "num_patches", "num_columns", "max_tokens"),
    [(8, 128, 8, 64), (64, 128, 8, 1024), (512, 192, 8, 1024), (5, 21, 3, 104), (7, 11, 11, 76)],
)
def test_few_tokens_are_spread_over_images_and_places(num_images: int, num_patches: int, num_columns: int, max_tokens: int) -> None:
    numbers = torch.arange(num_images * num_patches).reshape(num_images, num_patches, 1)
    chosen = spread_tokens(numbers, max_tokens).flatten()
    assert torch.equal(chosen, spread_tokens(numbers, max_tokens).flatten())
    assert len(set(chosen.tolist())) == len(chosen) == max_tokens
    for counts, expected in (
        (torch.bincount(chosen // num_patches, minlength=num_images), max_tokens / num_images),
        # An even stride of 8 would meet only one column of 8.
        (torch.bincount(chosen % num_patches % num_columns, minlength=num_columns), max_tokens / num_columns),
    ):
        assert (counts - expected).abs().max() <= max(3, 0.35 * expected)


def test_all_tokens_are_taken_if_they_are_few() -> None:
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(spread_tokens(tokens, 6), tokens.reshape(6, 4))


def test_a_few_tokens_stand_for_all() -> None:
    tokens = torch.randn(64, 128, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 24)
    all_of_them, some = collapse_monitors(tokens, max_tokens=64 * 128), collapse_monitors(tokens)
    assert some.std.item() == pytest.approx(all_of_them.std.item(), rel=0.03)
    assert some.rank.item() == pytest.approx(all_of_them.rank.item(), rel=0.03)
    assert some.std.item() != all_of_them.std.item()


def test_the_best_constant_is_the_best() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(5, 7, 11, generator=generator) + torch.randn(11, generator=generator)
    where = torch.rand(5, 7, generator=generator) < 0.4
    flat = targets.double().numpy().reshape(-1, 11)
    assert mean_token_loss(targets).item() == pytest.approx(brute_constant_loss(flat), rel=1e-5)
    chosen = flat[where.numpy().reshape(-1)]
    assert mean_token_loss(targets, where).item() == pytest.approx(brute_constant_loss(chosen), rel=1e-5)
    other = targets.mean(dim=(0, 1)) + 0.1 * torch.randn(11, generator=generator)
    assert (targets - other).square().mean() > mean_token_loss(targets)
    assert math.isnan(mean_token_loss(targets, torch.zeros(5, 7, dtype=torch.bool)).item())


def test_wrong_shapes_are_refused() -> None:
    for shape in [(3, 4), (1, 1, 4), (2, 2, 2, 2)]:
        with pytest.raises(ValueError, match=r"expected \[B, L, D\] with at least two tokens"):
            collapse_monitors(torch.zeros(shape))
