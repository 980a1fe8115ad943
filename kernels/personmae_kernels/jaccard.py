"""k-reciprocal sets, query expansion and sums of minima, over sparse rows (Zhong et al., "Re-ranking person re-identification with k-reciprocal
encoding", CVPR 2017). N images, each with a list of its W nearest, itself among them:

    reciprocal_sets   R(i) = {j in the list of i : i in the list of j};  H(j) the same of lists cut to num_half
                      R*(i) = R(i) with every H(j), j in R(i), of which more than two thirds lie in R(i)
    mean_rows         the mean of the rows of the first neighbours of i (query expansion)
    min_sums, min_sum_pairs   S(i, k) = sum over c of min(V[i, c], V[k, c]), dense for some rows, or as pairs of at least some sum

Weights are integers, `ONE` standing for 1 (so a row's weights add up to about ONE, and a sum fits into int32): integer sums do not depend on their
order, so C++ and plain torch, CPU and CUDA, and any size of tile agree to the bit, and S is exactly symmetric. A unit is 2^-30, which a float32
near 1 does not resolve.

On a CPU all are C++ where that is built; on CUDA plain torch. `Rows` is a sparse matrix by rows: offsets int64 [N + 1], columns int32 [E] rising in
each row, units int32 [E].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from personmae_kernels.checks import axis_sizes, check_dtype
from personmae_kernels.launching import runs_compiled

ONE = 1 << 30
# Bounds what plain torch holds at once: so many elements of a few int64 arrays.
PLAIN_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


class Rows(NamedTuple):
    """A sparse matrix of integer weights by rows; see the head of the file."""

    offsets: Tensor  # int64 [N + 1]
    columns: Tensor  # int32 [E]
    units: Tensor  # int32 [E], positive

    @property
    def row(self) -> Tensor:
        """int64 [E], the row of each entry."""
        lengths = self.offsets.diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(self.columns))


def by_column(rows: Rows, num_columns: int, first_row: int = 0) -> Rows:
    """The transpose of the rows from first_row on, which count from 0 then: for each of num_columns columns the rows that have it."""
    start = int(rows.offsets[first_row])
    columns, units = rows.columns[start:], rows.units[start:]
    order = columns.sort(stable=True).indices
    offsets = columns.new_zeros(num_columns + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(columns, minlength=num_columns), 0, out=offsets[1:])
    return Rows(offsets, (rows.row[start:] - first_row).int()[order], units[order])


def reciprocal_sets(ranks: Tensor, num_half: int) -> tuple[Tensor, Tensor]:
    """The expanded k-reciprocal sets of all images. ranks: int32 [N, W], nearest first, no image twice in a row. num_half: 1 to W.

    Returns (offsets int64 [N + 1], columns int32 [E]), columns rising in each row. Raises TypeError or ValueError for what does not fit.
    """
    N, W = axis_sizes(ranks=(ranks, "N W")).values()
    check_dtype(torch.int32, ranks=ranks)
    if not 1 <= num_half <= W:
        raise ValueError(f"num_half: 1 to {W} is needed, got {num_half}")
    if runs_compiled(ranks):
        return torch.ops.personmae.reciprocal_sets(ranks.contiguous(), num_half)
    halves = _reciprocal(ranks[:, :num_half], torch.arange(N, device=ranks.device))
    step = max(1, _at_once(ranks) // (W * W * num_half))
    lengths, columns = [], []
    for start in range(0, N, step):
        here = torch.arange(start, min(N, start + step), device=ranks.device)
        own = _reciprocal(ranks, here)  # [n, W], N in place of what is not reciprocal
        half = torch.where((own < N)[:, :, None], halves[own.clamp(max=N - 1)], N)  # [n, W, num_half]
        inside = (half[..., None] == own[:, None, None, :]).any(dim=3) & (half < N)
        taken = 3 * inside.sum(dim=2) > 2 * (half < N).sum(dim=2)
        half = torch.where(taken[:, :, None], half, N)
        found = torch.cat([own, half.flatten(1)], dim=1).sort(dim=1).values
        new = found < N
        new[:, 1:] &= found[:, 1:] != found[:, :-1]
        lengths.append(new.sum(dim=1))
        columns.append(found[new].int())
    return _offsets(torch.cat(lengths)), torch.cat(columns)


def _reciprocal(ranks: Tensor, here: Tensor) -> Tensor:
    """The lists of rows `here`, int64 [n, W], N in place of those whose list does not name the row."""
    lists = ranks[here].long()
    named = (ranks[lists] == here[:, None, None]).any(dim=2)
    return torch.where(named, lists, len(ranks))


def mean_rows(rows: Rows, ranks: Tensor) -> Rows:
    """For each image the mean of the rows of `ranks` int32 [N, K]: (sum + K // 2) // K of the units; zeros are left out."""
    N, K = axis_sizes(ranks=(ranks, "N K")).values()
    check_dtype(torch.int32, ranks=ranks, columns=rows.columns, units=rows.units)
    if len(rows.offsets) != N + 1:
        raise ValueError(f"ranks: {len(rows.offsets) - 1} rows are needed, as in rows, got {N}")
    if runs_compiled(ranks):
        return Rows(*torch.ops.personmae.mean_rows(*rows, ranks.contiguous()))
    lengths = rows.offsets.diff()
    step = max(1, _at_once(ranks) // max(1, K * int(lengths.max())))
    counts, columns, units = [], [], []
    for start in range(0, N, step):
        here = ranks[start : start + step].long()
        entries, owner = _entries(rows.offsets[:-1][here.flatten()], lengths[here.flatten()])
        key = owner // K * N + rows.columns[entries]
        # One key for each entry of the result: those that are equal add up.
        unique, place = key.unique(return_inverse=True)
        sums = torch.zeros_like(unique).index_add_(0, place, rows.units[entries].long())
        mean = (sums + K // 2) // K
        unique, mean = unique[mean > 0], mean[mean > 0]
        counts.append(torch.bincount(unique // N, minlength=len(here)))
        columns.append((unique % N).int())
        units.append(mean.int())
    return Rows(_offsets(torch.cat(counts)), torch.cat(columns), torch.cat(units))


def min_sums(rows: Rows, others: Rows, num_others: int, first: int, last: int) -> Tensor:
    """S of rows first to last with all others: int32 [last - first, num_others]. others: `by_column` of the num_others rows."""
    _check(rows, others, first, last)
    if runs_compiled(rows.units):
        return torch.ops.personmae.min_sums(*rows, *others, num_others, first, last)
    sums = rows.units.new_zeros((last - first) * num_others)
    begin, end = int(rows.offsets[first]), int(rows.offsets[last])
    columns = rows.columns[begin:end].long()
    row = torch.arange(last - first, device=columns.device).repeat_interleave(rows.offsets[first : last + 1].diff(), output_size=end - begin)
    lengths = others.offsets.diff()[columns]
    for part in _pieces(lengths, _at_once(sums)):
        entries, owner = _entries(others.offsets[columns[part]], lengths[part])
        smaller = torch.minimum(rows.units[begin:end][part][owner], others.units[entries])
        sums.index_add_(0, row[part][owner] * num_others + others.columns[entries], smaller)
    return sums.view(last - first, num_others)


def min_sum_pairs(rows: Rows, others: Rows, num_others: int, first: int, last: int, least: int) -> Rows:
    """Those of `min_sums` that are at least `least` > 0, as rows whose units are the sums."""
    _check(rows, others, first, last)
    if least < 1:
        raise ValueError(f"least: a positive number of units is needed, got {least}")
    if runs_compiled(rows.units):
        return Rows(*torch.ops.personmae.min_sum_pairs(*rows, *others, num_others, first, last, least))
    step = max(1, 4 * _at_once(rows.units) // num_others)
    counts, columns, sums = [rows.offsets.new_zeros(0)], [rows.columns[:0]], [rows.units[:0]]
    for start in range(first, last, step):
        dense = min_sums(rows, others, num_others, start, min(last, start + step))
        kept = dense >= least
        counts.append(kept.sum(dim=1))
        columns.append(kept.nonzero()[:, 1].int())
        sums.append(dense[kept])
    return Rows(_offsets(torch.cat(counts)), torch.cat(columns), torch.cat(sums))


def _check(rows: Rows, others: Rows, first: int, last: int) -> None:
    if not 0 <= first <= last < len(rows.offsets):
        raise ValueError(f"first, last: 0 to {len(rows.offsets) - 1} is needed, got {first} and {last}")
    check_dtype(torch.int32, columns=rows.columns, units=rows.units, others_columns=others.columns, others_units=others.units)


def _at_once(tensor: Tensor) -> int:
    return PLAIN_ELEMENTS.get(tensor.device.type, PLAIN_ELEMENTS["cpu"])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _entries(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers starts[i] .. starts[i] + lengths[i] - 1 of all i, one after the other, and the i of each."""
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return torch.arange(len(owner), device=lengths.device) - (before - starts)[owner], owner


def _pieces(lengths: Tensor, at_once: int) -> Iterator[slice]:
    """Slices of lengths, each of one element or of at most `at_once` in sum."""
    ends = lengths.cumsum(0)
    start, before, total = 0, 0, int(ends[-1]) if len(ends) else 0
    while before < total:
        stop = max(start + 1, int(torch.searchsorted(ends, before + at_once, right=True)))
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])
