"""adamw_ema_ in all forms against float64 over several steps, and against torch.optim.AdamW: odd sizes, bfloat16 gradients, averages, copies."""

import pytest
import torch
from closeness import DEVICE, assert_close

from personmae_kernels import adamw_tables, compiled, launching
from personmae_kernels.adamw_ema import _adamw_ema, adamw_ema_, adamw_hyper

LISTS = ("parameters", "gradients", "first_moments", "second_moments", "averages", "copies", "average_copies")
# No multiple of a block, of a 16-byte word; empty; more than one block; what 16-byte words can read.
SHAPES = ((7,), (33, 65), (1,), (0,), (3, 1024), (31, 8), (2, 3, 127))
DECAYS = (0.0, 0.05, 0.0, 0.05, 0.3, 0.0, 0.05)


def example(shapes=SHAPES, half=False, averages=True, copies=True, seed=0):
    """A dict of the lists, on DEVICE; the parameters have been trained for a while."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return [torch.randn(shape, generator=generator).mul(scale).to(DEVICE) for shape in shapes]

    lists = {"parameters": draw(), "first_moments": draw(0.1), "second_moments": [moment.square() for moment in draw(0.1)]}
    lists["gradients"] = [gradient.bfloat16() for gradient in draw(0.1)] if half else draw(0.1)
    lists["averages"] = draw() if averages else []
    nan = [torch.full_like(parameter, float("nan"), dtype=torch.bfloat16) for parameter in lists["parameters"]]
    lists["copies"] = nan if copies else []
    lists["average_copies"] = [copy.clone() for copy in nan] if copies and averages else []
    return lists


def doubles(lists):
    return {name: [tensor.double().cpu() for tensor in tensors] for name, tensors in lists.items()}


def step(lists, hyper, decays=DECAYS):
    arguments = dict(lists)
    adamw_ema_(hyper=hyper, weight_decays=decays[: len(lists["parameters"])], **arguments)


def exact_step(lists, hyper, decays=DECAYS):
    """The formula, in float64, tensor by tensor."""
    rate, beta1, beta2, eps, correction1, correction2, scale, momentum = hyper.double().tolist()
    for i, (p, gradient) in enumerate(zip(lists["parameters"], lists["gradients"], strict=True)):
        m, v = lists["first_moments"][i], lists["second_moments"][i]
        g = scale * gradient
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        p.copy_(p * (1 - rate * decays[i]) - rate * (m / correction1) / ((v / correction2).sqrt() + eps))
        if lists["averages"]:
            lists["averages"][i].copy_(momentum * lists["averages"][i] + (1 - momentum) * p)


def flat(lists, names=LISTS):
    return {f"{name}[{i}]": tensor for name in names for i, tensor in enumerate(lists[name])}


def assert_equal_to_exact(ours, exact, floor=1e-6):
    names = ("parameters", "first_moments", "second_moments", "averages")
    assert_close(flat(ours, names), flat(exact, names), floor=floor)
    for copy, source in (("copies", "parameters"), ("average_copies", "averages")):
        for i, tensor in enumerate(ours[copy]):
            assert torch.equal(tensor, ours[source][i].bfloat16()), f"{copy}[{i}]"


@pytest.mark.parametrize(("averages", "copies"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("half", [False, True])
def test_it_is_the_definition(form, half, averages, copies):
    ours = example(half=half, averages=averages, copies=copies)
    exact = doubles(ours)
    for t in range(11, 14):
        hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, t, 0.7, 0.99, DEVICE)
        step(ours, hyper)
        exact_step(exact, hyper)
    assert_equal_to_exact(ours, exact)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_it_is_torch_adamw_with_an_average(form, betas):
    betas = tuple(torch.tensor(betas).tolist())  # as float32 has them
    shapes, decays = ((33, 65), (127,), (16, 64)), (0.05, 0.0, 0.05)
    ours = example(shapes)
    for moment in ours["first_moments"] + ours["second_moments"]:
        moment.zero_()
    for i, parameter in enumerate(ours["parameters"]):
        ours["averages"][i].copy_(parameter)
    theirs = [parameter.clone() for parameter in ours["parameters"]]
    averages = [parameter.clone() for parameter in theirs]
    groups = [{"params": [parameter], "weight_decay": decay} for parameter, decay in zip(theirs, decays, strict=True)]
    optimiser = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 6):
        for i, parameter in enumerate(theirs):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            ours["gradients"][i].copy_(parameter.grad)
        optimiser.step()
        torch._foreach_lerp_(averages, theirs, 1 - 0.875)
        step(ours, adamw_hyper(1e-2, betas, 1e-8, t, 1.0, 0.875, DEVICE), decays)
    states = [optimiser.state[parameter] for parameter in theirs]
    expected = {
        "parameters": theirs,
        "first_moments": [state["exp_avg"] for state in states],
        "second_moments": [state["exp_avg_sq"] for state in states],
        "averages": averages,
    }
    assert_close(flat(ours, tuple(expected)), flat(expected, tuple(expected)), floor=1e-6)


def test_clipping_scale_from_the_device(form):
    ours = example(averages=False, copies=False)
    exact = doubles(ours)
    norm = torch.stack([gradient.norm() for gradient in ours["gradients"]]).norm()
    scale = (0.5 / norm).clamp(max=1.0)
    step(ours, adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 5, scale, device=DEVICE))
    exact_step(exact, adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 5, float(scale)))
    assert_equal_to_exact(ours, exact)


@pytest.mark.parametrize("shift", [1, 2, 3, 8])
def test_views_that_no_wide_word_can_read_and_their_neighbours(form, shift):
    shapes = ((1027,), (40, 25), (5,))
    aligned = example(shapes)
    exact = doubles(aligned)
    frames = {}
    views = {}
    for name, tensors in aligned.items():
        frames[name] = [torch.full((tensor.numel() + 16,), 77.0, dtype=tensor.dtype, device=DEVICE) for tensor in tensors]
        views[name] = [frame[shift : shift + t.numel()].view(t.shape).copy_(t) for frame, t in zip(frames[name], tensors, strict=True)]
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 3, 1.0, 0.9, DEVICE)
    step(views, hyper)
    exact_step(exact, hyper)
    assert_equal_to_exact(views, exact)
    for tensors in frames.values():
        for i, frame in enumerate(tensors):
            size = aligned["parameters"][i].numel()
            assert (frame[:shift] == 77).all()
            assert (frame[shift + size :] == 77).all()


def test_mixed_gradient_formats_and_a_gradient_with_strides(form):
    ours = example(((33, 65), (24, 8)))
    ours["gradients"][1] = ours["gradients"][1].bfloat16()
    ours["gradients"][0] = ours["gradients"][0].t().contiguous().t()
    exact = doubles(ours)
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 3, 1.0, 0.9, DEVICE)
    step(ours, hyper)
    exact_step(exact, hyper)
    assert_equal_to_exact(ours, exact)


def test_nothing_to_do(form):
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 1, device=DEVICE)
    adamw_ema_([], [], [], [], hyper, [])
    empty = [torch.empty(0, 3, device=DEVICE)]
    adamw_ema_(empty, empty, empty, empty, hyper, [0.1])


def test_parameters_of_a_model(form):
    parameter = torch.nn.Parameter(torch.ones(9, device=DEVICE))
    gradient, m, v = torch.ones_like(parameter), torch.zeros(9, device=DEVICE), torch.zeros(9, device=DEVICE)
    version = parameter._version
    adamw_ema_([parameter], [gradient], [m], [v], adamw_hyper(0.25, (0.9, 0.95), 1e-8, 1, device=DEVICE), [0.0])
    assert torch.allclose(parameter, torch.full_like(parameter, 0.75), rtol=1e-6)
    assert parameter._version > version
    assert parameter.grad_fn is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gradients": lambda list: list[:1]}, ValueError, "gradients: 2 tensors are needed, as many as parameters, got 1"),
        ({"first_moments": lambda list: [list[0], list[1][:3]]}, ValueError, r"first_moments\[1\]: shape \[4, 5\] of the parameter"),
        ({"second_moments": lambda list: [list[0].bfloat16(), list[1]]}, TypeError, r"second_moments\[0\]: float32 is needed, got bfloat16"),
        ({"gradients": lambda list: [list[0].half(), list[1]]}, TypeError, r"gradients\[0\]: float32 or bfloat16"),
        ({"averages": lambda list: [list[0], list[1].to("meta")]}, ValueError, r"averages\[1\]: is on meta, but hyper is on"),
        ({"averages": lambda list: []}, ValueError, "average_copies: are copies of averages"),
        ({"copies": lambda list: [list[0], list[1].float()]}, TypeError, r"copies\[1\]: bfloat16 is needed"),
        ({"parameters": lambda list: [list[0], list[1].t().contiguous().t()]}, ValueError, r"parameters\[1\]: a contiguous tensor"),
        ({"hyper": lambda hyper: hyper[:7]}, ValueError, r"hyper: \[8\] is needed"),
        ({"hyper": lambda hyper: hyper.bfloat16()}, TypeError, "hyper: float32"),
        ({"weight_decays": lambda list: list[:1]}, ValueError, "weight_decays: 2 values are needed"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 1, device=DEVICE)
    arguments = {**example(((3,), (4, 5))), "hyper": hyper, "weight_decays": [0.0, 0.1]}
    ((name, spoil),) = change.items()
    with pytest.raises(error, match=words):
        adamw_ema_(**{**arguments, name: spoil(arguments[name])})


def test_hyper_parameters_are_computed_in_float64():
    hyper = adamw_hyper(3e-4, (0.9, 0.999), 1e-8, 7, 0.5, 0.996)
    beta1, beta2 = torch.tensor([0.9, 0.999]).double().tolist()
    expected = torch.tensor([3e-4, 0.9, 0.999, 1e-8, 1 - beta1**7, 1 - beta2**7, 0.5, 0.996], dtype=torch.float64).float()
    assert hyper.dtype == torch.float32
    assert torch.equal(hyper, expected)
    assert adamw_hyper(3e-4, (0.9, 0.999), 1e-8, 7, torch.tensor(0.25))[6] == 0.25


@pytest.mark.parametrize(("change", "words"), [({"step": 0}, "step: 1"), ({"betas": (0.9, 1.0)}, "betas"), ({"ema_momentum": 1.1}, "ema_momentum")])
def test_wrong_hyper_parameters_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        adamw_hyper(**{"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "step": 1, **change})


def test_one_launch_for_all_and_tables_are_kept(triton_form, monkeypatch):
    made = []
    make = adamw_tables.make_plan
    monkeypatch.setattr(adamw_tables, "make_plan", lambda *arguments, **others: made.append(1) or make(*arguments, **others))
    adamw_tables._plans.clear()
    ours = example(((8, 16), (3, 1024), (64,)))
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 1, device=DEVICE)
    with launching.recorded() as launches:
        step(ours, hyper)
        step(ours, hyper)
    assert [(launch.kernel.fn.__name__, launch.grid) for launch in launches] == [("adamw_ema_kernel", (5,))] * 2
    assert [launch.constants["ALIGNED"] for launch in launches] == [True, True]
    assert len(made) == 1
    for i in range(2 * adamw_tables._KEPT_PLANS):
        step({name: [tensor.clone() for tensor in tensors] for name, tensors in ours.items()}, hyper, [0.01 * i] * 3)
    assert len(adamw_tables._plans) == adamw_tables._KEPT_PLANS


def test_opcheck(triton_form):
    lists = example(((5,), (8, 16)))
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 1, device=DEVICE)
    first, last = [lists[name] for name in LISTS[:4]], [lists[name] for name in LISTS[4:]]
    torch.library.opcheck(_adamw_ema, (*first, hyper, [0.0, 0.1], *last))
    torch.library.opcheck(_adamw_ema, (*first, hyper, [0.0, 0.1], [], [], []))


def test_it_compiles_into_one_graph(form):
    ours, other = example(), example()
    hyper = adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 4, 1.0, 0.9, DEVICE)
    torch.compile(step, backend="aot_eager", fullgraph=True)(ours, hyper)
    step(other, hyper)
    for name, tensor in flat(ours).items():
        assert torch.equal(tensor, flat(other)[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_the_cuda_form_is_the_triton_form(half):
    if not compiled.available(cuda=True):
        pytest.skip(compiled.why_missing(cuda=True))
    results = {}
    shapes = SHAPES * 60 + ((1000, 999), (1024, 1024))  # more tensors than one launch takes
    for form in ("triton", "compiled"):
        lists = example(shapes, half=half)
        launching.use_operators(form)
        try:
            for t in range(1, 4):
                step(lists, adamw_hyper(1e-2, (0.9, 0.95), 1e-8, t, 0.7, 0.99, DEVICE), DECAYS * 60 + (0.1, 0.0))
        finally:
            launching.use_operators(None)
        # All of a list as one: of a tensor with a single number, which may lie near zero, the relative error says nothing.
        results[form] = {name: torch.cat([tensor.flatten() for tensor in lists[name]]) for name in LISTS[:1] + LISTS[2:5]}
        for i, copy in enumerate(lists["copies"]):
            assert torch.equal(copy, lists["parameters"][i].bfloat16())
            assert torch.equal(lists["average_copies"][i], lists["averages"][i].bfloat16())
    assert_close(results["compiled"], results["triton"], floor=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["triton", "compiled"])
def test_no_step_waits_and_a_cuda_graph_replays_it(form):
    if form == "compiled" and not compiled.available(cuda=True):
        pytest.skip(compiled.why_missing(cuda=True))
    launching.use_operators(form)
    try:
        ours, scale = example(), torch.ones((), device=DEVICE)
        exact = doubles(ours)
        hypers = [adamw_hyper(1e-2, (0.9, 0.95), 1e-8, t, scale, 0.9, DEVICE) for t in range(1, 5)]
        hyper = hypers[0].clone()
        step(ours, hyper)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        ours["gradients"] = [gradient.clone() for gradient in ours["gradients"]]  # other addresses: other tables
        hyper.copy_(adamw_hyper(1e-2, (0.9, 0.95), 1e-8, 2, scale, 0.9, DEVICE))
        step(ours, hyper)
        torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(ours, hyper)
        for later in hypers[2:]:
            hyper.copy_(later)
            graph.replay()
        for each in hypers:
            exact_step(exact, each)
        assert_equal_to_exact(ours, exact)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        launching.use_operators(None)
