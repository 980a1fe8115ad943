"""The operators of the neighbour search and the Jaccard distance: C++ and plain torch agree to the bit, and both are the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from personmae_kernels import compiled, jaccard, launching
from personmae_kernels.jaccard import Rows, by_column, mean_rows, min_sum_pairs, min_sums, reciprocal_sets
from personmae_kernels.neighbours import select_nearest_, squared_distances

FORMS = ["reference", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing()))]


@pytest.fixture(params=FORMS)
def form(request):
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


@pytest.fixture(params=[1, 1 << 22])
def pieces(request, monkeypatch):
    monkeypatch.setitem(jaccard.PLAIN_ELEMENTS, "cpu", request.param)


def random_ranks(N: int, W: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([generator.permutation(N)[:W] for _ in range(N)]).astype(np.int32))


def random_rows(N: int, M: int, seed: int = 0) -> tuple[Rows, np.ndarray]:
    generator = np.random.default_rng(seed)
    dense = generator.integers(1, 50, (N, M)) * (generator.random((N, M)) < 0.3)
    row, column = np.nonzero(dense)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=N))])
    parts = offsets.astype(np.int64), column.astype(np.int32), dense[row, column].astype(np.int32)
    return Rows(*map(torch.from_numpy, parts)), dense


def dense_of(rows: Rows, M: int) -> np.ndarray:
    dense = np.zeros((len(rows.offsets) - 1, M), np.int64)
    dense[rows.row.numpy(), rows.columns.numpy()] = rows.units.numpy()
    assert all((np.diff(part.numpy()) > 0).all() for part in rows.columns.split(rows.offsets.diff().tolist()))
    return dense


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("N", "W", "num_half"), [(1, 1, 1), (2, 2, 1), (40, 7, 4), (40, 40, 40), (300, 9, 5)])
def test_reciprocal_sets(N, W, num_half, form):
    ranks = random_ranks(N, W)
    near, nearer = [set(row) for row in ranks.tolist()], [set(row[:num_half]) for row in ranks.tolist()]
    own = [{j for j in near[i] if i in near[j]} for i in range(N)]
    half = [{j for j in nearer[i] if i in nearer[j]} for i in range(N)]
    expected = [sorted(own[i].union(*(half[j] for j in own[i] if 3 * len(half[j] & own[i]) > 2 * len(half[j])))) for i in range(N)]
    offsets, columns = reciprocal_sets(ranks, num_half)
    assert [part.tolist() for part in columns.split(offsets.diff().tolist())] == expected
    assert (offsets.dtype, columns.dtype) == (torch.int64, torch.int32)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("N", "K"), [(1, 1), (30, 1), (30, 6), (300, 5)])
def test_mean_rows(N, K, form):
    rows, dense = random_rows(N, N)
    ranks = random_ranks(N, K)
    expected = (dense[ranks.numpy()].sum(axis=1) + K // 2) // K
    np.testing.assert_array_equal(dense_of(mean_rows(rows, ranks), N), expected)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("N", "M"), [(1, 1), (20, 33), (300, 40)])
def test_min_sums(N, M, form):
    rows, dense = random_rows(N, M)
    expected = np.minimum(dense[:, None], dense[None]).sum(axis=2)
    for first, last in ((0, N), (N // 3, N // 2), (0, 0)):
        found = min_sums(rows, by_column(rows, M), N, first, last)
        np.testing.assert_array_equal(found.numpy(), expected[first:last])
        for least in (1, 60, 10**9):
            pairs = dense_of(min_sum_pairs(rows, by_column(rows, M), N, first, last, least), N)
            np.testing.assert_array_equal(pairs, np.where(expected >= least, expected, 0)[first:last])
    start = N // 2
    found = min_sums(rows, by_column(rows, M, start), N - start, 0, N)
    np.testing.assert_array_equal(found.numpy(), expected[:, start:])


def test_select_nearest(form):
    scores = torch.from_numpy(np.random.default_rng(0).permutation(30 * 101).reshape(30, 101).astype(np.float32))
    best, indices = torch.full((30, 7), -torch.inf), torch.full((30, 7), -1, dtype=torch.int32)
    lowest = torch.full((30,), torch.inf)
    for first in range(0, 101, 37):
        select_nearest_(scores[:, first : first + 37], first, best, indices, lowest)
    expected = scores.topk(7, dim=1)
    order = best.argsort(dim=1, descending=True)
    torch.testing.assert_close(best.gather(1, order), expected.values)
    torch.testing.assert_close(indices.gather(1, order).long(), expected.indices)
    torch.testing.assert_close(lowest, scores.amin(dim=1))


@pytest.mark.parametrize("D", [1, 15, 16, 100])
def test_squared_distances(D, form):
    left, right = torch.randn(20, D, generator=torch.Generator().manual_seed(0)), torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    rows, columns = torch.arange(20).repeat_interleave(30).int(), torch.arange(30).repeat(20).int()
    expected = torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist").square().float().flatten()
    torch.testing.assert_close(squared_distances(left, right, rows, columns), expected, rtol=2e-7, atol=0)
    assert (squared_distances(left, left, rows[::30], rows[::30]) == 0).all()


def test_what_is_wrong_is_named(form):
    ranks = random_ranks(10, 4)
    with pytest.raises(ValueError, match="num_half: 1 to 4"):
        reciprocal_sets(ranks, 5)
    with pytest.raises(TypeError, match="ranks: int32"):
        reciprocal_sets(ranks.long(), 2)
    rows, _ = random_rows(10, 10)
    with pytest.raises(ValueError, match="first, last: 0 to 10"):
        min_sums(rows, by_column(rows, 10), 10, 3, 11)
    with pytest.raises(ValueError, match="least"):
        min_sum_pairs(rows, by_column(rows, 10), 10, 0, 10, 0)
    with pytest.raises(ValueError, match="ranks: 10 rows"):
        mean_rows(rows, random_ranks(9, 2))


@pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())
def test_the_compiled_operators_index_nothing_that_is_not_there():
    operators = torch.ops.personmae
    rows, _ = random_rows(10, 10)
    with pytest.raises(RuntimeError, match="ranks: must be 0 to 9"):
        operators.reciprocal_sets(torch.full((10, 2), 10, dtype=torch.int32), 1)
    with pytest.raises(RuntimeError, match="columns must be 0 to 4"):
        operators.min_sums(*rows, *by_column(rows, 10), 5, 0, 10)
    with pytest.raises(RuntimeError, match="do not belong together"):
        operators.min_sums(rows.offsets + 1, rows.columns, rows.units, *by_column(rows, 10), 10, 0, 10)
    with pytest.raises(RuntimeError, match="positive"):
        operators.min_sums(rows.offsets, rows.columns, rows.units * 0, *by_column(rows, 10), 10, 0, 10)
