"""NVIDIA's apex as optimiser: against stand-ins with its signatures and state (read from NVIDIA/apex at the pinned commit), and, where it is
installed, against PyTorch's AdamW."""

import importlib.util
import inspect
import sys

import numpy as np
import pytest
import torch
from torch import nn

from personmae.configs import UserError
from personmae.training import optimisers
from personmae.training.checkpoints import load_checkpoint, restore_optimiser, save_checkpoint
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import APEX_COMMIT, OptimiserConfig, build_optimiser, update_weights

SPEC = importlib.util.find_spec("apex")
HAS_APEX = SPEC is not None and importlib.util.find_spec("amp_C") is not None
needs_apex = pytest.mark.skipif(not HAS_APEX, reason="NVIDIA's apex with its CUDA kernels is not installed")
APEX_KINDS = ("apex-adam", "apex-lamb")


class FusedAdam(torch.optim.Optimizer):
    """As apex's: the same arguments, defaults, state and keys of the parameter groups; the arithmetic in PyTorch."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert adam_w_mode
        assert [amsgrad, capturable, master_weights] == [False] * 3
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        raise AssertionError("apex's takes no arguments")

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(adam_update(self.state[p], p, p.grad, group), alpha=group["lr"])


class FusedLAMB(torch.optim.Optimizer):
    """As apex's: the same arguments, defaults, state and keys of the parameter groups; the arithmetic in PyTorch."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        assert adam_w_mode
        assert grad_averaging
        assert [amsgrad, use_nvlamb] == [False] * 2
        own = {"bias_correction": bias_correction, "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})

    def zero_grad(self):
        raise AssertionError("apex's takes no arguments")

    @torch.no_grad()
    def step(self, closure=None):
        norm = torch.nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        clip = (norm / self.defaults["max_grad_norm"]).clamp(min=1.0)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    update = adam_update(self.state[p], p, p.grad / clip, group)
                    ratio = p.norm() / update.norm() if group["weight_decay"] and p.norm() and update.norm() else 1.0
                    p.sub_(group["lr"] * ratio * update)


def adam_update(state, weight, gradient, group):
    assert group["bias_correction"]
    if not state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    for name, value, beta in zip(("exp_avg", "exp_avg_sq"), (gradient, gradient.square()), group["betas"], strict=True):
        state[name].mul_(beta).add_(value, alpha=1 - beta)
    first, second = (state[name] / (1 - beta ** group["step"]) for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True))
    return first / (second.sqrt() + group["eps"]) + group["weight_decay"] * weight


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """A folder of packages that come before all others; whatever apex they are is forgotten afterwards."""
    monkeypatch.setattr(optimisers, "_require_cuda", lambda kind, device: None)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def apex(packages):
    """The stand-in, installed."""
    folder = packages / "apex" / "optimizers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("from . import optimizers\n")
    (folder / "__init__.py").write_text("from .fused_adam import FusedAdam\nfrom .fused_lamb import FusedLAMB\n")
    (folder / "fused_adam.py").write_text(f"from {__name__} import FusedAdam\n")
    (folder / "fused_lamb.py").write_text(f"from {__name__} import FusedLAMB\n")
    return folder


def network(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(device)


def gradients(model, step):
    """Of a size that changes from step to step, so that clipping is seen in spite of the division by their own size."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.device) * 10.0 ** (step % 3 - 1) for p in model.parameters()]


def run(kind, model, first, last, clip_norm=None, optimiser=None):
    """(optimiser, average, norms) after some steps with drawn gradients; the last parameter never gets any."""
    average = network(next(model.parameters()).device)
    mean = MovingAverage(average, model)
    optimiser = optimiser or build_optimiser(model, OptimiserConfig(kind=kind, weight_decay=0.1, betas=(0.8, 0.9)), mean)
    norms = []
    for step in range(first, last):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        model[2].bias.grad = None
        norms.append(update_weights(optimiser, model, mean, 1e-2 * (step + 1), 0.9, clip_norm).item())
        assert all(parameter.grad is None for parameter in model.parameters())
    return optimiser, average, norms


def lamb_by_formula(model, num_steps, clip_norm=None):
    """Weights after LAMB in float64: You et al., 2020, algorithm 2, with the norm itself as phi; vectors, which do not decay, without the ratio."""
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    moments = [[np.zeros_like(w), np.zeros_like(w)] for w in weights]
    for step in range(num_steps):
        drawn = [g.double().numpy() for g in gradients(model, step)][:-1]
        norm = np.sqrt(sum((g * g).sum() for g in drawn))
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        for w, (m, v), g in zip(weights, moments, drawn, strict=False):
            m += 0.2 * (scale * g - m)
            v += 0.1 * ((scale * g) ** 2 - v)
            decay = 0.1 if w.ndim > 1 else 0.0
            r = (m / (1 - 0.8 ** (step + 1))) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-8) + decay * w
            ratio = np.linalg.norm(w) / np.linalg.norm(r) if decay else 1.0
            w -= 1e-2 * (step + 1) * ratio * r
    return weights


def assert_near(model, weights, tolerance=1e-5):
    for (name, parameter), wanted in zip(model.named_parameters(), weights, strict=True):
        assert np.allclose(parameter.detach().cpu().numpy(), wanted, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_apex_adam_gives_what_adamw_gives(apex, clip_norm):
    ours, theirs = network(), network()
    optimiser, average, norms = run("apex-adam", ours, 0, 5, clip_norm)
    assert isinstance(optimiser, FusedAdam)
    _, other_average, other_norms = run("adamw", theirs, 0, 5, clip_norm)
    assert norms == pytest.approx(other_norms)
    assert_near(ours, [p.detach().numpy() for p in theirs.parameters()])
    assert_near(average, [p.detach().numpy() for p in other_average.parameters()])


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_apex_lamb_follows_its_formula_and_clips_as_asked_only(apex, clip_norm):
    model = network()
    optimiser, _, norms = run("apex-lamb", model, 0, 5, clip_norm)
    assert isinstance(optimiser, FusedLAMB)
    assert max(norms) > 10
    assert_near(model, lamb_by_formula(network(), 5, clip_norm), 1e-4)


@pytest.mark.parametrize("kind", APEX_KINDS)
def test_apex_state_goes_through_a_checkpoint(apex, tmp_path, kind):
    straight, model = network(), network()
    run(kind, straight, 0, 5)
    optimiser, *_ = run(kind, model, 0, 3)
    path = save_checkpoint(tmp_path / "checkpoints", 3, {"optimiser": optimiser.state_dict()}, keep_last=1)
    again = build_optimiser(model, OptimiserConfig(kind=kind, weight_decay=0.1, betas=(0.8, 0.9)))
    restore_optimiser(again, load_checkpoint(path).state["optimiser"], source=path, saved_preset="a", preset="a")
    assert {group["step"] for group in again.param_groups} == {3}
    run(kind, model, 3, 5, optimiser=again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))


@pytest.mark.parametrize("saved", ["adamw", "adamw-ema", *APEX_KINDS])
@pytest.mark.parametrize("kind", ["adamw", "adamw-ema", *APEX_KINDS])
def test_the_state_of_another_kind_is_refused(apex, saved, kind):
    model = network()
    state = run(saved, model, 0, 1)[0].state_dict()
    optimiser = build_optimiser(model, OptimiserConfig(kind=kind))
    # Both of ours keep the same.
    names = [name.replace("adamw-ema", "adamw") for name in (saved, kind)]
    if names[0] == names[1]:
        optimiser.load_state_dict(state)
        return
    with pytest.raises(UserError, match=f"state is that of {names[0]}, and this run's is {names[1]}; go on with --optimiser.kind {names[0]}"):
        optimiser.load_state_dict(state)
    assert not optimiser.state


@pytest.mark.parametrize("kind", APEX_KINDS)
def test_apex_is_for_cuda(kind):
    with pytest.raises(UserError, match=f"{kind} runs on CUDA only, and this run is on cpu; use --optimiser.kind adamw"):
        build_optimiser(network(), OptimiserConfig(kind=kind))


def test_a_missing_apex_is_named_with_the_pinned_command(packages, monkeypatch):
    monkeypatch.setattr(optimisers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    command = f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex@{APEX_COMMIT}"
    with pytest.raises(UserError, match="apex-adam needs NVIDIA's apex, which is not installed") as error:
        build_optimiser(network(), OptimiserConfig(kind="apex-adam"))
    assert command in str(error.value)
    assert "nvcc of CUDA 12.8" in str(error.value)


@pytest.mark.parametrize("summary", [None, "A toolkit for web sites"])
def test_the_apex_of_pypi_is_told_apart_without_importing_it(packages, summary):
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("raise SystemExit('imported')\n")
    if summary:
        (packages / "apex-0.9.dist-info").mkdir()
        (packages / "apex-0.9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: 0.9\nSummary: {summary}\n")
    said = rf" \({summary}\)" if summary else r"( \(.*\))?"
    with pytest.raises(UserError, match=rf"the apex that is installed{said} is not NVIDIA's.*pip uninstall apex.*github.com/NVIDIA/apex@"):
        build_optimiser(network(), OptimiserConfig(kind="apex-lamb"))


def test_an_apex_without_its_kernels_is_named_with_the_command(apex, monkeypatch):
    # What apex itself says then.
    def without(self, *args, **kwargs):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(FusedAdam, "__init__", without)
    with pytest.raises(UserError, match=r"requires cuda extensions.*APEX_CUDA_EXT=1 pip install"):
        build_optimiser(network(), OptimiserConfig(kind="apex-adam"))


@needs_apex
@pytest.mark.parametrize("stand_in", [FusedAdam, FusedLAMB])
def test_the_stand_ins_have_the_signatures_of_apex(stand_in):
    import apex.optimizers

    real = getattr(apex.optimizers, stand_in.__name__)
    for method in ("__init__", "step", "zero_grad"):
        assert inspect.signature(getattr(stand_in, method)) == inspect.signature(getattr(real, method))


@pytest.mark.gpu
@needs_apex
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_apex_on_a_gpu_gives_what_adamw_and_the_formula_give(clip_norm):
    ours, theirs, lamb = (network("cuda") for _ in range(3))
    optimiser, _, norms = run("apex-adam", ours, 0, 5, clip_norm)
    _, _, other_norms = run("adamw", theirs, 0, 5, clip_norm)
    assert norms == pytest.approx(other_norms)
    assert_near(ours, [p.detach().cpu().numpy() for p in theirs.parameters()])
    assert set(optimiser.state[ours[0].weight]) == {"exp_avg", "exp_avg_sq"}
    run("apex-lamb", lamb, 0, 5, clip_norm)
    assert_near(lamb, lamb_by_formula(network(), 5, clip_norm), 1e-4)
