"""The choice of an implementation, and xformers' own choice of an operator, on fake CUDA tensors."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from personmae.configs import UserError
from personmae.models import attention
from personmae.models.attention import (
    SDPA_BACKENDS,
    Attention,
    AttentionChoice,
    CrossAttention,
    Measured,
    choose_attention,
    set_attention,
)
from personmae.models.masked import RegionInputs, longest_sequence
from personmae.models.masking import visible_count
from personmae.models.packed_attention import block_diagonal_mask, packed_attention
from personmae.pretrain import build_models
from personmae.recipes.pretraining import pretrain_presets
from personmae.training.precision import autocast

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
LENGTHS = (5, 1, 7, 5)
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
# The stacks for CUDA 12 come with xformers: there its absence is a failure.
needs_xformers = pytest.mark.skipif(
    not HAS_XFORMERS and not (torch.version.cuda or "").startswith("12"), reason="xformers is not installed (pip install xformers)"
)


@pytest.fixture
def h200(monkeypatch):
    """As on an H200 with a good cuDNN; nothing that was switched stays."""
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(attention, "xformers_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(was_on)


def test_the_choice_says_its_reason(h200, monkeypatch):
    assert choose_attention("auto", torch.device("cpu")).kind == "sdpa"
    assert "cpu" in choose_attention("auto", torch.device("cpu")).reason
    assert choose_attention("auto", CUDA) == AttentionChoice("xformers", "installed and built for CUDA")
    assert choose_attention("xformers", CUDA).kind == "xformers"
    assert choose_attention("sdpa", CUDA) == AttentionChoice("sdpa", "asked for")
    monkeypatch.setattr(attention, "xformers_problem", lambda: "xformers is not installed (pip install xformers)")
    choice = choose_attention("auto", CUDA)
    assert choice.kind == "sdpa"
    assert "pip install" in choice.reason
    with pytest.raises(UserError, match="pip install"):
        choose_attention("xformers", CUDA)


@pytest.mark.parametrize("kind", ["xformers", *SDPA_BACKENDS])
def test_what_needs_cuda_is_refused_elsewhere(kind):
    with pytest.raises(UserError, match=f"attention {kind} runs on CUDA only; use --attention sdpa"):
        choose_attention(kind, torch.device("cpu"))


def test_one_kernel_of_pytorch_may_be_asked_for(h200):
    for kind in SDPA_BACKENDS:
        assert choose_attention(kind, CUDA, "bf16") == AttentionChoice(kind, "asked for")
    assert choose_attention("sdpa-efficient", CUDA, "fp32").kind == "sdpa-efficient"
    for kind in ("sdpa-flash", "sdpa-cudnn"):
        with pytest.raises(UserError, match=f"attention {kind} has no fp32 kernel"):
            choose_attention(kind, CUDA, "fp32")
    with pytest.raises(UserError, match="not deterministic"):
        choose_attention("sdpa-cudnn", CUDA, "bf16", deterministic=True)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("version", "said"), [(91002, "cuDNN 9.10.2"), (91500, "cuDNN 9.15.0"), (91501, None), (91900, None), (None, None)])
def test_the_attention_of_a_broken_cudnn_is_refused(h200, monkeypatch, version, said):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    for kind in ("auto", "xformers", "sdpa", "sdpa-flash"):
        torch.backends.cuda.enable_cudnn_sdp(True)
        choice = choose_attention(kind, CUDA, "bf16")
        # Nothing in the process gets it, be it that the run itself attends with xformers.
        assert torch.backends.cuda.cudnn_sdp_enabled() is (said is None)
        assert (f"switched off: {said} reads beyond" in choice.reason) is (said is not None)
    if said:
        with pytest.raises(UserError, match=f"{said} reads beyond its inputs.*--attention auto"):
            choose_attention("sdpa-cudnn", CUDA, "bf16")
    else:
        assert choose_attention("sdpa-cudnn", CUDA, "bf16").kind == "sdpa-cudnn"


def test_the_table_of_measurements_names_committed_files():
    for found in attention.MEASURED:
        assert (ROOT / found.result).is_file()


def test_what_was_measured_faster_replaces_xformers_there_alone(h200, monkeypatch):
    found = (
        Measured("short", 128, (32,), "bf16", (9, 0), "benchmarks/results/a.json"),
        Measured("sdpa-cudnn", 100, (64, 96), "bf16", (9, 0), "benchmarks/results/b.json"),
        Measured("sdpa", 64, (64,), "bf16", (8, 9), "benchmarks/results/c.json"),
    )
    monkeypatch.setattr(attention, "MEASURED", found)
    choice = choose_attention("auto", CUDA, "bf16")
    assert choice.kind == "xformers"
    assert "short up to 128 tokens with heads of 32 (benchmarks/results/a.json), sdpa-cudnn up to 100 tokens with heads of 64 or 96" in choice.reason
    assert "c.json" not in choice.reason
    narrow, wide, other = Attention(64, 2), CrossAttention(128, 2), Attention(32, 2)
    for layer in (narrow, wide, other):
        set_attention(layer, choice)
    assert [narrow.kind_for(128, 128), narrow.kind_for(1, 64), narrow.kind_for(129, 1), narrow.kind_for(1, 129)] == ["short"] * 2 + ["xformers"] * 2
    assert [wide.kind_for(100, 64), wide.kind_for(101, 64), wide.kind_for(64, 101)] == ["sdpa-cudnn", "xformers", "xformers"]
    assert other.kind_for(2, 2) == "xformers"
    for unchanged in (
        choose_attention("xformers", CUDA, "bf16"),
        choose_attention("auto", CUDA, "fp32"),
        choose_attention("auto", CUDA, "bf16", deterministic=True),
    ):
        assert not unchanged.replaced
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert choose_attention("auto", CUDA, "bf16").replaced == {32: (128, "short")}
    # What a layer was told before does not stay.
    set_attention(narrow, "sdpa")
    assert narrow.kind_for(128, 128) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "precision", "deterministic", "kind"),
    [
        ((9, 0), "bf16", False, "xformers"),
        ((9, 0), "fp32", False, "xformers"),
        ((9, 0), "bf16", True, "sdpa"),
        ((12, 0), "fp32", False, "sdpa"),
        ((12, 0), "bf16", False, "xformers"),
        ((7, 5), "bf16", False, "sdpa"),
    ],
)
def test_xformers_is_left_where_it_has_no_kernel(h200, monkeypatch, capability, precision, deterministic, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention("auto", CUDA, precision, deterministic).kind == kind


@pytest.fixture
def fresh_problem():
    """The answer about xformers is asked anew, and forgotten."""
    attention.xformers_problem.cache_clear()
    yield attention.xformers_problem
    attention.xformers_problem.cache_clear()


def test_a_missing_xformers_is_named_with_the_cure(monkeypatch, fresh_problem):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in (fresh_problem() or "")


@needs_xformers
def test_xformers_works_in_this_stack(fresh_problem):
    assert fresh_problem() is None


@pytest.fixture
def cuda_13(monkeypatch, tmp_path):
    """A torch for CUDA 13, and a stand-in for xformers that is built for CUDA if, when it is imported, libcudart.so.12 is loaded."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "stand_in" / "xformers" / "ops" / "fmha"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "common.py").write_text("import ctypes\n_built_with_cuda = bool(ctypes.loaded)\n")
    monkeypatch.syspath_prepend(tmp_path / "stand_in")
    loaded = []
    monkeypatch.setattr(ctypes, "loaded", loaded, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    yield loaded
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


def test_beside_cuda_13_the_runtime_of_cuda_12_is_loaded_before_xformers(cuda_13, monkeypatch, tmp_path, fresh_problem):
    wheels = {"nvidia-cuda-runtime-cu12": SimpleNamespace(locate_file=lambda name: tmp_path / name)}
    monkeypatch.setattr(importlib.metadata, "distribution", wheels.__getitem__)
    assert fresh_problem() is None
    assert cuda_13 == [(str(tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12"), ctypes.RTLD_GLOBAL)]


def test_beside_cuda_13_a_missing_runtime_is_named_with_the_cure(cuda_13, monkeypatch, fresh_problem):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "for CUDA 13.0, and libcudart.so.12 is missing (pip install nvidia-cuda-runtime-cu12==" in (fresh_problem() or "")
    assert cuda_13 == []


def test_beside_cuda_13_a_runtime_that_does_not_load_is_named(cuda_13, monkeypatch, tmp_path, fresh_problem):
    def broken(path, mode):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(locate_file=lambda name: tmp_path / name))
    monkeypatch.setattr(ctypes, "CDLL", broken)
    assert "libcudart.so.12 does not load: cannot open" in (fresh_problem() or "")


@pytest.mark.skipif(not (torch.version.cuda or "").startswith("12"), reason="the wheel nvidia-cuda-runtime-cu12 comes with a torch for CUDA 12")
def test_the_runtime_is_where_its_wheel_puts_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert attention._load_cuda_12_runtime() is None


@pytest.fixture
def dispatched(h200, monkeypatch):
    """The operators that xformers chooses from here on: (name, shape of the queries). As on an H200, where tensors are fake."""
    fmha = importlib.import_module("xformers.ops.fmha")
    chosen = []

    def recorded(dispatch):
        def record(inputs, *args, **kwargs):
            operator = dispatch(inputs, *args, **kwargs)
            chosen.append((operator.NAME, tuple(inputs.query.shape)))
            return operator

        return record

    for name in ("_dispatch_fw", "_dispatch_bw"):
        monkeypatch.setattr(fmha, name, recorded(getattr(fmha, name)))
    # Without a GPU autocast leaves CUDA alone.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    # From pinned memory, which only a GPU's driver gives.
    monkeypatch.setattr(fmha.attn_bias, "_to_device_tensor", torch.tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    block_diagonal_mask.cache_clear()
    yield chosen
    block_diagonal_mask.cache_clear()


def fake_pretraining_step(config, choice, precision):
    """The forward pass of teacher and student, two images, on CUDA tensors without data."""
    with torch.device("meta"):
        models = build_models(config)
    rows, columns = config.model.encoder.grid
    with FakeTensorMode(), torch.device("cuda"):
        weights = []
        for part in models:
            set_attention(part, choice, longest_sequence(config.model))
            tensors = [*part.named_parameters(), *part.named_buffers()]
            weights.append({name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for name, t in tensors})
        images = torch.empty(2, *config.model.encoder.image_size, 3, dtype=torch.uint8)
        boxes, flips = torch.empty(2, 2, 4, dtype=torch.int32), torch.empty(2, 2, dtype=torch.bool)
        mask = torch.empty(2, rows * columns, dtype=torch.bool)
        visible = torch.empty(2, visible_count(config.model.masking, config.model.encoder.grid), dtype=torch.int32)
        inputs = RegionInputs(images, images, boxes, flips, mask, visible)
        (model, teacher), (own, theirs) = models, weights
        with autocast(CUDA, precision):
            features = torch.func.functional_call(teacher, theirs, (inputs.region_b,)) if config.model.losses != "pixels" else None
            torch.func.functional_call(model, own, (inputs, features, 1.0, 1.0))


@needs_xformers
@pytest.mark.parametrize(("precision", "forward", "backward"), [("bf16", "fa2F", "fa2B"), ("fp32", "cutlassF-pt", "cutlassB-pt")])
@pytest.mark.parametrize("preset", pretrain_presets())
def test_every_attention_of_a_run_on_cuda_is_that_of_xformers(dispatched, monkeypatch, preset, precision, forward, backward):
    monkeypatch.setattr(attention, "MEASURED", ())
    config = pretrain_presets()[preset][1]
    choice = choose_attention(config.attention, CUDA, precision)
    assert choice.kind == "xformers"
    fake_pretraining_step(config, choice, precision)
    encoder, decoder = config.model.encoder, config.model.pixel_decoder
    layers = encoder.depth + decoder.depth * (1 if decoder.form == "mae" else 2)
    layers += 0 if config.model.losses == "pixels" else encoder.depth + 2 * config.model.feature_decoder.depth
    names = [name.split("@")[0] for name, _ in dispatched]
    assert set(names) == {forward, backward}
    assert names.count(forward) == layers
    # The teacher has no gradient, all else has.
    assert names.count(backward) == layers - (0 if config.model.losses == "pixels" else encoder.depth)
    visible = visible_count(config.model.masking, encoder.grid)
    assert visible + 1 in {shape[1] for _, shape in dispatched}
    assert {shape[2:] for _, shape in dispatched} == {(part.num_heads, part.width // part.num_heads) for part in (encoder, decoder)}


@needs_xformers
@pytest.mark.parametrize("preset", pretrain_presets())
def test_on_hopper_every_attention_of_a_run_is_the_short_one(dispatched, preset):
    config = pretrain_presets()[preset][1]
    fake_pretraining_step(config, choose_attention(config.attention, CUDA, "bf16"), "bf16")
    assert not dispatched


@needs_xformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_xformers_is_one_graph_for_torch_compile(h200, monkeypatch, dtype):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    # That a kernel of SDPA is there PyTorch asks the GPU.
    monkeypatch.setitem(SDPA_BACKENDS, "sdpa-efficient", SDPBackend.MATH)
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 33, 6, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    torch.compiler.reset()
    torch.compile(attention.attend, fullgraph=True, backend=keep)(q, k, v, "xformers")
    torch.compiler.reset()
    assert len(graphs) == 1
    if dtype == torch.bfloat16:
        assert "xformers_flash.flash_fwd" in graphs[0]
        assert "xformers_flash.flash_bwd" in graphs[0]
    else:
        assert "scaled_dot_product_attention" in graphs[0]


def test_one_kernel_of_pytorch_is_one_graph_for_torch_compile():
    # PyTorch has its flash kernel on the CPU too.
    values = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]
    torch.compiler.reset()
    out = torch.compile(attention.attend, fullgraph=True, backend="aot_eager")(*values, "sdpa-flash")
    torch.compiler.reset()
    expected = attention.attend(*values, "sdpa")
    assert torch.allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 2e-2)])
def test_compiled_attention_of_a_gpu_gives_what_it_gives_uncompiled(precision, dtype, tolerance):
    kinds = {choose_attention("auto", CUDA, precision).kind, "sdpa", "sdpa-efficient"} | ({"sdpa-flash"} if precision == "bf16" else set())
    values = [torch.randn(2, 33, 6, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    for kind in sorted(kinds):
        torch.compiler.reset()
        compiled = torch.compile(attention.attend, fullgraph=True)(*values, kind)
        plain = attention.attend(*values, kind)
        assert torch.allclose(compiled, plain, atol=tolerance, rtol=tolerance), kind
        for ours, theirs in zip(torch.autograd.grad(compiled.sum(), values), torch.autograd.grad(plain.sum(), values), strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm() + tolerance, kind


@needs_xformers
def test_the_mask_of_packed_sequences_is_built_once_and_never_in_a_capture(monkeypatch):
    cpu = torch.device("cpu")
    mask = block_diagonal_mask(LENGTHS, cpu)
    assert block_diagonal_mask(LENGTHS, cpu) is mask
    assert block_diagonal_mask((9, 9), cpu) is not mask
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    assert torch.equal(mask.materialize((18, 18)) == 0, number[:, None] == number)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the CUDA graph"):
        block_diagonal_mask((3, 15), CUDA)


@needs_xformers
@pytest.mark.parametrize(("dtype", "names"), [(torch.bfloat16, ["fa2F", "fa2B"]), (torch.float32, ["cutlassF-pt", "cutlassB-pt"])])
def test_packed_sequences_on_cuda_are_one_launch_of_xformers(dispatched, dtype, names):
    with FakeTensorMode():
        q, k, v = (torch.empty(18, 6, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        assert packed_attention(q, k, v, LENGTHS).shape == (18, 6, 64)
    assert [name.split("@")[0] for name, _ in dispatched] == names
