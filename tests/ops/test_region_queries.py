"""region_queries in both forms against float64, cell by cell: odd grids, flips, both integer formats, autocast; its codes far from home; and the sum
of the projections with its gradients."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import launching, reference
from personmae_kernels.region_queries import _add_codes, _add_codes_backward, _region_codes, region_queries


def exact_values(boxes, flips, grid):
    """(y of each row, x of each column, the two ratios), float64: each centre of B is followed to its place in the image, and from there to A."""
    rows, columns = grid
    ys, xs, ratios = [], [], []
    for (a, b), (flip_a, flip_b) in zip(boxes.tolist(), flips.tolist(), strict=True):
        ys.append([])
        xs.append([])
        for r in range(rows):
            image_y = b[0] + (r + 0.5) * (b[2] - b[0]) / rows
            ys[-1].append((image_y - a[0]) * rows / (a[2] - a[0]) - 0.5)
        for c in range(columns):
            seen = columns - c - 0.5 if flip_b else c + 0.5  # counted from the left of the unflipped image
            image_x = b[1] + seen * (b[3] - b[1]) / columns
            place = (image_x - a[1]) * columns / (a[3] - a[1])
            xs[-1].append((columns - place if flip_a else place) - 0.5)
        ratios.append([10 * math.log((b[2] - b[0]) / (a[2] - a[0])), 10 * math.log((b[3] - b[1]) / (a[3] - a[1]))])
    return (
        torch.tensor(ys, dtype=torch.float64).reshape(-1, rows),
        torch.tensor(xs, dtype=torch.float64).reshape(-1, columns),
        torch.tensor(ratios, dtype=torch.float64).reshape(-1, 2),
    )


def exact_code(values, width):  # [..., n] -> [..., n, D / 2]
    angles = values[..., None] / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    return torch.cat([angles.sin(), angles.cos()], -1)


def whole_code(boxes, flips, grid, width):
    """[B, L, 2 D] float64: what the operator never writes."""
    y, x, ratios = (exact_code(values, width) for values in exact_values(boxes, flips, grid))
    B, (R, C) = len(boxes), grid
    parts = (y[:, :, None].expand(B, R, C, -1), x[:, None].expand(B, R, C, -1), ratios.flatten(1)[:, None, None].expand(B, R, C, width))
    return torch.cat(parts, -1).flatten(1, 2)


def example(B=4, grid=(5, 3), D=24, dtype=torch.float32, indices=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.stack([torch.randint(0, 60, (B, 2), generator=generator), torch.randint(0, 30, (B, 2), generator=generator)], -1)
    size = torch.stack([torch.randint(40, 120, (B, 2), generator=generator), torch.randint(20, 60, (B, 2), generator=generator)], -1)
    parameters = {
        "mask_token": torch.randn(D, generator=generator),
        "weight": (torch.randn(D, 2 * D, generator=generator) / (2 * D) ** 0.5).to(dtype),
        "bias": torch.randn(D, generator=generator).to(dtype),
    }
    return {
        "boxes": torch.cat([corner, corner + size], -1).to(indices).to(DEVICE),
        "flips": (torch.rand(B, 2, generator=generator) < 0.5).to(DEVICE),
        **{name: tensor.to(DEVICE).requires_grad_() for name, tensor in parameters.items()},
    }


def run(inputs, grid, autocast=False):
    """(of the operator in the form at hand, exact, of plain PyTorch in the same formats)"""
    upstream = {"queries": torch.randn(len(inputs["boxes"]), grid[0] * grid[1], len(inputs["bias"]), generator=torch.Generator().manual_seed(9))}
    upstream = {"queries": upstream["queries"].to(DEVICE)}
    code = whole_code(inputs["boxes"], inputs["flips"], grid, len(inputs["bias"]))
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()

    def ours(**arguments):
        with context:
            return {"queries": region_queries(**arguments, grid=grid)}

    def linear(boxes, flips, mask_token, weight, bias):
        with context if weight.dtype != torch.float64 else contextlib.nullcontext():
            projected = F.linear(code.to(weight), weight, bias)
        return {"queries": (projected.to(mask_token.dtype) + mask_token).to(projected.dtype)}

    exact = outputs_and_gradients(linear, inputs, upstream, torch.float64)
    return outputs_and_gradients(ours, inputs, upstream), exact, outputs_and_gradients(linear, inputs, upstream)


# The reference takes the coordinates in several float32 steps, the kernel in one.
def floor(form):
    return 3e-6 if form == "reference" else 1e-6


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize(("B", "grid", "D"), [(1, (1, 1), 4), (4, (5, 3), 24), (3, (16, 8), 64), (2, (7, 9), 132), (5, (3, 17), 12)])
def test_it_is_the_linear_map_of_the_whole_code(form, B, grid, D, indices):
    ours, exact, _ = run(example(B, grid, D, indices=indices), grid)
    assert ours["queries"].dtype == torch.float32
    assert_close(ours, exact, floor=floor(form))


@pytest.mark.parametrize("flips", [(False, False), (False, True), (True, False), (True, True)])
def test_each_flip(form, flips):
    inputs = example(3, (4, 6), 32)
    inputs["flips"] = torch.tensor([flips] * 3, device=DEVICE)
    ours, exact, _ = run(inputs, (4, 6))
    assert_close(ours, exact, floor=floor(form))


@pytest.mark.parametrize("grid", [(5, 3), (16, 8)])
def test_autocast_gives_the_format_of_the_projections(form, grid):
    inputs = example(4, grid, 64)
    ours, exact, plain = run(inputs, grid, autocast=True)
    assert ours["queries"].dtype == torch.bfloat16
    assert {name: value.dtype for name, value in ours.items() if name != "queries"} == dict.fromkeys(list(ours)[1:], torch.float32)
    assert_close(ours, exact, plain)


def test_parameters_in_bfloat16(form):
    inputs = example(4, (5, 3), 64, torch.bfloat16)
    ours, exact, plain = run(inputs, (5, 3))
    assert ours["queries"].dtype == torch.bfloat16
    assert ours["gradient of mask_token"].dtype == torch.float32
    assert_close(ours, exact, plain)


def test_the_same_region_has_codes_of_its_own_grid(triton_form):
    inputs = example(6, (16, 8), 32)
    boxes, flips = inputs["boxes"][:, :1].repeat(1, 2, 1), inputs["flips"][:, :1].repeat(1, 2)
    rows, columns, scale = _region_codes(boxes, flips, 16, 8, 32, torch.float32)
    assert torch.equal(scale.unflatten(1, (2, 2, 8))[:, :, 0], torch.zeros(6, 2, 8, device=DEVICE))
    assert torch.equal(scale.unflatten(1, (2, 2, 8))[:, :, 1], torch.ones(6, 2, 8, device=DEVICE))
    assert torch.allclose(rows.double().cpu(), exact_code(torch.arange(16.0), 32).expand(6, -1, -1), atol=5e-6, rtol=0)
    assert torch.allclose(columns.double().cpu(), exact_code(torch.arange(8.0), 32).expand(6, -1, -1), atol=3e-6, rtol=0)


def test_codes_far_from_home_keep_the_accuracy_that_is_promised(triton_form):
    """Coordinates of hundreds of cells and ratios up to a hundred: A is small, B far away or large."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.randint(0, 300, (40, 2, 2), generator=generator)
    size = torch.randint(300, 1000, (40, 2, 2), generator=generator)
    size[:, 0] = torch.randint(8, 40, (40, 2), generator=generator)
    boxes, flips = torch.cat([corner, corner + size], -1), torch.rand(40, 2, generator=generator) < 0.5
    width = 64
    codes = _region_codes(boxes.to(DEVICE), flips.to(DEVICE), 16, 8, width, torch.float32)
    values = exact_values(boxes, flips, (16, 8))
    assert max(value.abs().max() for value in values) > 300
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    for name, code, value in zip(("rows", "columns", "scale"), codes, values, strict=True):
        error = (code.double().cpu().reshape(*value.shape, 2, -1) - exact_code(value, width).unflatten(-1, (2, -1))).abs()
        # A logarithm's error is that of its argument, absolute: ten times 2**-24 and the rounding of the result.
        slack = 1e-6 if name == "scale" else 0
        allowed = 1.2e-7 + (1.8e-7 * value.abs() + slack)[..., None, None] * frequencies
        assert (error <= allowed).all(), (name, (error / allowed).max())


def test_both_forms_have_the_same_codes(triton_form):
    inputs = example(6, (16, 8), 32)
    ours = _region_codes(inputs["boxes"], inputs["flips"], 16, 8, 32, torch.float32)
    theirs = reference.region_codes(inputs["boxes"], inputs["flips"], (16, 8), 32)
    for name, code in theirs._asdict().items():
        assert torch.allclose(getattr(reference.RegionCodes(*ours), name), code, atol=1e-5, rtol=0), name


def parts(B=3, grid=(5, 7), D=31, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {"rows": (B, grid[0], D), "columns": (B, grid[1], D), "scale": (B, D), "mask_token": (D,)}
    made = {name: torch.randn(shape, generator=generator).to(torch.float32 if name == "mask_token" else dtype) for name, shape in shapes.items()}
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "grid", "D"), [(3, (5, 7), 31), (1, (1, 1), 65), (2, (3, 8), 300), (2, (4, 33), 127)])
def test_add_codes_and_its_gradients(triton_form, B, grid, D, dtype):
    inputs = parts(B, grid, D, dtype)
    upstream = torch.randn(B, grid[0] * grid[1], D, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)

    def ours(rows, columns, scale, mask_token):
        return {"queries": _add_codes(rows, columns, scale, mask_token)}

    def by_cell(rows, columns, scale, mask_token):
        cells = [rows[:, r] + columns[:, c] + scale + mask_token for r in range(grid[0]) for c in range(grid[1])]
        return {"queries": torch.stack(cells, 1)}

    actual = outputs_and_gradients(ours, inputs, {"queries": upstream})
    exact = outputs_and_gradients(by_cell, inputs, {"queries": upstream}, torch.float64)
    assert actual["queries"].dtype == actual["gradient of scale"].dtype == dtype
    assert actual["gradient of mask_token"].dtype == torch.float32
    assert_close(actual, exact, {name: value.to(actual[name].dtype) for name, value in exact.items()}, floor=1e-6 if dtype == torch.float32 else None)


def test_a_gradient_inside_a_longer_sequence_is_read_where_it_lies(triton_form):
    longer = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    part = longer[:, -35:]
    with launching.recorded() as launches:
        sums = _add_codes_backward(part, 5)
    assert launches[0].arguments[0].data_ptr() == part.data_ptr()
    for ours, other in zip(sums, _add_codes_backward(part.contiguous(), 5), strict=True):
        assert torch.equal(ours, other)
    # Any other order is copied.
    assert torch.equal(_add_codes_backward(part.transpose(1, 2).contiguous().transpose(1, 2), 5)[0], sums[0])


def test_non_contiguous_inputs(form):
    inputs = example(4, (5, 3), 24)
    odd = {
        "boxes": inputs["boxes"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "flips": inputs["flips"].t().contiguous().t(),
        "mask_token": inputs["mask_token"].detach().repeat_interleave(2)[::2].requires_grad_(),
        "weight": inputs["weight"].detach().t().contiguous().t().requires_grad_(),
        "bias": inputs["bias"].detach().repeat_interleave(2)[::2].requires_grad_(),
    }
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    ours, exact, _ = run(odd, (5, 3))
    assert_close(ours, exact, floor=floor(form))


def test_an_empty_batch(form):
    inputs = example(B=0)
    queries = region_queries(**inputs, grid=(5, 3))
    assert queries.shape == (0, 15, 24)
    queries.sum().backward()
    assert not inputs["weight"].grad.any()
    assert not inputs["mask_token"].grad.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"boxes": lambda t: t.float()}, TypeError, "boxes: int32 or int64"),
        ({"boxes": lambda t: t[:, 0]}, ValueError, r"boxes: \[B, 2, 4\] is needed"),
        ({"boxes": lambda t: t[..., :3]}, ValueError, r"boxes: \[B, 2, 4\] is needed"),
        ({"flips": lambda t: t.int()}, TypeError, "flips: bool"),
        ({"flips": lambda t: t[:3]}, ValueError, r"flips: axis B of \[B, 2\] is 3, but 4 in boxes"),
        ({"flips": lambda t: t.to("meta")}, ValueError, "flips: is on meta"),
        ({"mask_token": lambda t: t.half()}, TypeError, "mask_token: float32 or bfloat16"),
        ({"mask_token": lambda t: t[None]}, ValueError, r"mask_token: \[D\] is needed"),
        ({"weight": lambda t: t[:, :47]}, ValueError, r"weight: \[D, 2 D\] = \[24, 48\] is needed, got shape \[24, 47\]"),
        ({"weight": lambda t: t[:23]}, ValueError, r"weight: axis D of \[D, E\] is 23, but 24 in mask_token"),
        ({"weight": lambda t: [1.0]}, TypeError, "weight: a tensor"),
        ({"bias": lambda t: t.bfloat16()}, TypeError, "bias: float32 is needed, got bfloat16"),
        ({"grid": lambda t: (0, 3)}, ValueError, r"grid: .*got \(0, 3\)"),
        ({"grid": lambda t: (2000, 100)}, ValueError, "grid: .*together at most 2046"),
        (
            {"mask_token": lambda t: t[:22], "weight": lambda t: t[:22, :44], "bias": lambda t: t[:22]},
            ValueError,
            "mask_token: a width that is a multiple of 4 is needed, got 22",
        ),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    inputs = {**example(), "grid": (5, 3)}
    with pytest.raises(error, match=words):
        region_queries(**{**inputs, **{name: spoil(inputs[name]) for name, spoil in change.items()}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(triton_form, dtype):
    inputs = example()
    torch.library.opcheck(_region_codes.registered, (inputs["boxes"], inputs["flips"], 5, 3, 24, dtype))
    torch.library.opcheck(_add_codes.registered, tuple(parts(dtype=dtype).values()))
    torch.library.opcheck(_add_codes_backward.registered, (torch.randn(3, 35, 31, device=DEVICE).to(dtype), 5))


@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_into_one_graph(triton_form, autocast):
    inputs, other = example(), example()
    context = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
    with context:
        compiled = torch.compile(region_queries, backend="aot_eager", fullgraph=True)(**inputs, grid=(5, 3))
        plain = region_queries(**other, grid=(5, 3))
    assert compiled.dtype == plain.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(compiled, plain)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
    compiled.backward(upstream)
    plain.backward(upstream)
    for name in ("mask_token", "weight", "bias"):
        assert torch.equal(inputs[name].grad, other[name].grad), name


def test_the_kernels_are_launched(triton_form):
    with launching.recorded() as launches:
        region_queries(**example(), grid=(5, 3)).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["region_codes_kernel", "add_codes_kernel", "add_codes_backward_kernel"]
