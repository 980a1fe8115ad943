"""assemble_tokens and join_tokens in both forms against float64 loops over cells: odd sizes, nothing and everything hidden; and their gradients."""

import sys

import pytest
import torch
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import launching
from personmae_kernels.assemble_tokens import NUM_SUMS, _hidden_sum, _join_tokens, assemble_tokens, join_tokens
from personmae_kernels.gather_visible import _place_visible

SIZES = [(1, 1, 1, 1, 1), (3, 33, 31, 5, 2), (2, 128, 63, 127, 128), (3, 65, 64, 33, 31), (2, 127, 1, 256, 65), (2, 130, 129, 16, 1)]


def exact_assembly(tokens, visible, mask_token, positions):
    """From the definition, cell by cell, in float64."""
    rows = []
    for b, numbers in enumerate(visible.tolist()):
        rows.append(tokens[b, 0])
        for cell in range(len(positions)):
            rows.append((tokens[b, 1 + numbers.index(cell)] if cell in numbers else mask_token) + positions[cell])
    return {"out": torch.stack(rows).reshape(len(tokens), -1, tokens.shape[2])}


def exact_join(tokens, visible, positions, queries):
    """From the definition, token by token, in float64."""
    images = []
    for b, numbers in enumerate(visible.tolist()):
        placed = [tokens[b, 1 + v] + positions[number] for v, number in enumerate(numbers)]
        images.append(torch.stack([tokens[b, 0], *placed, *queries[b]]))
    return {"out": torch.stack(images)}


def example(B=3, L=7, V=4, D=5, dtype=torch.float32, small_dtype=torch.float32, index_dtype=torch.int32, seed=0):
    """Inputs of assemble_tokens; small_dtype: of the mask token and the positions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(B, 1 + V, D, generator=generator).to(DEVICE, dtype).requires_grad_(),
        "visible": torch.rand(B, L, generator=generator).argsort(1)[:, :V].to(DEVICE, index_dtype),
        "mask_token": torch.randn(D, generator=generator).to(DEVICE, small_dtype).requires_grad_(),
        "positions": torch.randn(L, D, generator=generator).to(DEVICE, small_dtype),
    }


def join_example(B=3, L=7, V=4, D=5, Q=6, dtype=torch.float32, query_dtype=torch.float32, index_dtype=torch.int32):
    inputs = example(B, L, V, D, dtype, index_dtype=index_dtype)
    del inputs["mask_token"]
    queries = torch.randn(B, Q, D, generator=torch.Generator().manual_seed(2))
    return inputs | {"queries": queries.to(DEVICE, query_dtype).requires_grad_()}


def check(function, exact_function, inputs, num_rows):
    B, D, dtype = len(inputs["tokens"]), inputs["tokens"].shape[2], inputs["tokens"].dtype
    gradient = {"out": torch.randn(B, num_rows, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)}
    ours = outputs_and_gradients(lambda **kw: {"out": function(**kw)}, inputs, gradient)
    exact = outputs_and_gradients(exact_function, inputs, gradient, torch.float64)
    formats = {name: inputs[name.removeprefix("gradient of ")].dtype if name != "out" else dtype for name in exact}
    assert {name: value.dtype for name, value in ours.items()} == formats
    assert_close(ours, exact, {name: value.to(formats[name]) for name, value in exact.items()}, floor=1e-6)
    assert torch.equal(ours["gradient of tokens"].double().cpu(), exact["gradient of tokens"])


FORMATS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "small_dtype"), FORMATS)
@pytest.mark.parametrize(("B", "L", "V", "D", "Q"), SIZES)
def test_assembly_is_the_definition(form, B, L, V, D, Q, dtype, small_dtype):
    check(assemble_tokens, exact_assembly, example(B, L, V, D, dtype, small_dtype), 1 + L)


@pytest.mark.parametrize(("dtype", "query_dtype"), [*FORMATS, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(("B", "L", "V", "D", "Q"), SIZES)
def test_joining_is_the_definition(form, B, L, V, D, Q, dtype, query_dtype):
    check(join_tokens, exact_join, join_example(B, L, V, D, Q, dtype, query_dtype), 1 + V + Q)


@pytest.mark.parametrize("V", [0, 7])
def test_everything_and_nothing_hidden(form, V):
    check(assemble_tokens, exact_assembly, example(V=V), 8)
    check(join_tokens, exact_join, join_example(V=V), 7 + V)
    if V == 7:
        inputs = example(V=V)
        assemble_tokens(**inputs).sum().backward()
        assert torch.equal(inputs["mask_token"].grad, torch.zeros(5, device=DEVICE))


def test_patch_numbers_of_64_bits(form):
    check(assemble_tokens, exact_assembly, example(index_dtype=torch.int64), 8)
    check(join_tokens, exact_join, join_example(index_dtype=torch.int64), 11)


def test_a_program_sums_over_several_tiles(form, monkeypatch):
    # By sys.modules: the package shows the function under the module's name.
    monkeypatch.setattr(sys.modules["personmae_kernels.assemble_tokens"], "NUM_SUMS", 5)
    check(assemble_tokens, exact_assembly, example(B=6, L=40, V=9), 41)


def strided(tensor):
    """The same values, the first two axes exchanged in memory, or the last two where `tensor` is a matrix."""
    return tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(tensor.requires_grad)


def test_non_contiguous_inputs(form):
    for make, function, exact, num_rows in ((example, assemble_tokens, exact_assembly, 8), (join_example, join_tokens, exact_join, 11)):
        inputs = {name: strided(tensor) if tensor.ndim > 1 else tensor for name, tensor in make().items()}
        assert sum(not tensor.is_contiguous() for tensor in inputs.values()) == (3 if make is example else 4)
        check(function, exact, inputs, num_rows)


def test_columns_apart_in_memory(form):
    for make, function, exact, num_rows in ((example, assemble_tokens, exact_assembly, 8), (join_example, join_tokens, exact_join, 11)):
        inputs = make()
        for name in inputs.keys() & {"tokens", "queries"}:
            inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        check(function, exact, inputs, num_rows)


def test_the_same_queries_for_all_images_are_not_copied(form):
    inputs = join_example()
    one = inputs["queries"].detach()[0].requires_grad_()
    with launching.recorded() as launches:
        out = join_tokens(**{**inputs, "queries": one.expand(3, -1, -1)})
    out.sum().backward()
    assert torch.equal(out[:, 5:], one.detach().expand(3, -1, -1))
    assert torch.equal(one.grad, torch.full_like(one, 3.0))
    assert form == "reference" or launches[0].arguments[3].data_ptr() == one.data_ptr()


def test_a_frozen_part_costs_no_launch(triton_form):
    for frozen, kernel in (("tokens", "hidden_sum_kernel"), ("mask_token", "gather_visible_kernel")):
        inputs = example()
        inputs[frozen].requires_grad_(False)
        with launching.recorded() as launches:
            assemble_tokens(**inputs).sum().backward()
        assert [launch.kernel.fn.__name__ for launch in launches] == ["place_visible_kernel", kernel]


def test_an_empty_batch(form):
    inputs = example(B=0)
    out = assemble_tokens(**inputs)
    out.sum().backward()
    assert out.shape == (0, 8, 5)
    assert torch.equal(inputs["mask_token"].grad, torch.zeros(5, device=DEVICE))
    inputs = join_example(B=0)
    out = join_tokens(**inputs)
    out.sum().backward()
    assert out.shape == (0, 11, 5)
    assert inputs["queries"].grad.shape == (0, 6, 5)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_number_off_the_grid_shows_and_touches_nothing(triton_form, index_dtype):
    inputs, joined = example(index_dtype=index_dtype), join_example(index_dtype=index_dtype)
    right = inputs["visible"]
    wrong = right.clone()
    wrong[0, 0], wrong[1, 2], wrong[2, 3] = -1, 7, torch.iinfo(index_dtype).max
    out = assemble_tokens(**{**inputs, "visible": wrong})
    left_out = [(b, right[b, v].item(), v) for b, v in ((0, 0), (1, 2), (2, 3))]
    for b, cell, _ in left_out:
        assert torch.equal(out[b, 1 + cell], inputs["mask_token"] + inputs["positions"][cell])
    assert out.isfinite().all()
    out.sum().backward()
    lost = inputs["tokens"].grad.isnan().all(2)
    assert lost.nonzero().tolist() == [[b, 1 + v] for b, _, v in left_out]
    out = join_tokens(**{**joined, "visible": wrong})
    assert out.isnan().any(2).nonzero().tolist() == [[b, 1 + v] for b, _, v in left_out]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": lambda t: t.long()}, TypeError, "tokens: float32 or bfloat16"),
        ({"tokens": lambda t: t[0]}, ValueError, r"tokens: \[B, N, D\] is needed"),
        ({"tokens": lambda t: t[:, 1:]}, ValueError, r"tokens: \[B, 5, D\] is needed for 4 visible patches"),
        ({"visible": lambda t: t.float()}, TypeError, "visible: int32 or int64"),
        ({"visible": lambda t: t[:2]}, ValueError, r"tokens: axis B of \[B, N, D\] is 3, but 2 in visible"),
        ({"visible": lambda t: t.tolist()}, TypeError, "visible: a tensor"),
        ({"positions": lambda t: t[:, :4]}, ValueError, r"positions: axis D of \[L, D\] is 4, but 5 in tokens"),
        ({"positions": lambda t: t.bfloat16()}, TypeError, "positions: float32"),
        ({"positions": lambda t: t.requires_grad_()}, ValueError, "positions: the operator has no gradient"),
        ({"positions": lambda t: t.to("meta")}, ValueError, "positions: is on meta"),
        ({"mask_token": lambda t: t[:4]}, ValueError, r"mask_token: axis D of \[D\] is 4, but 5 in tokens"),
        ({"mask_token": lambda t: t.long()}, TypeError, "mask_token: float32 or bfloat16"),
        ({"queries": lambda t: t[:2]}, ValueError, r"queries: axis B of \[B, Q, D\] is 2, but 3 in visible"),
        ({"queries": lambda t: t[0]}, ValueError, r"queries: \[B, Q, D\] is needed"),
        ({"queries": lambda t: t.long()}, TypeError, "queries: float32 or bfloat16"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    ((name, spoil),) = change.items()
    for inputs, function in ((example(), assemble_tokens), (join_example(), join_tokens)):
        if name in inputs:
            with pytest.raises(error, match=words):
                function(**{**inputs, name: spoil(inputs[name])})


def test_opcheck(triton_form):
    inputs, joined = example(), join_example()
    torch.library.opcheck(_place_visible.registered, (*inputs.values(), 1, 7))
    torch.library.opcheck(_place_visible.registered, (inputs["tokens"], inputs["visible"], None, None, 1, 7))
    torch.library.opcheck(_hidden_sum.registered, (torch.randn(3, 8, 5, device=DEVICE), inputs["visible"], 1))
    torch.library.opcheck(_join_tokens.registered, tuple(joined.values()))


@pytest.mark.parametrize(("function", "make"), [(assemble_tokens, example), (join_tokens, join_example)])
def test_it_compiles_into_one_graph(form, function, make):
    inputs, other = make(), make()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(**inputs)
    plain = function(**other)
    compiled.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(compiled, plain)
    for name in inputs:
        assert inputs[name].grad is None or torch.equal(inputs[name].grad, other[name].grad), name


def test_the_kernels_are_launched(triton_form):
    with launching.recorded() as launches:
        assemble_tokens(**example()).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["place_visible_kernel", "gather_visible_kernel", "hidden_sum_kernel"]
    assert launches[2].grid[0] <= NUM_SUMS
    with launching.recorded() as launches:
        join_tokens(**join_example()).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["join_tokens_kernel"]
