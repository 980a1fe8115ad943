"""The operators' benchmark: what its formulas count, what it refuses, and a run on a few images."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import personmae_kernels
from benchmarks import _operator_cases as cases
from benchmarks import _operator_peers as peers
from benchmarks import _operator_timing as timing
from benchmarks import operators
from benchmarks._measure import Spread
from personmae_kernels import compiled, reference

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = timing.Ceilings(bytes_per_second=1e9, flops_per_second=1e12)
# What the package exports that is no operator: pieces of the reference.
PIECES = {"cell_coordinates", "patch_targets", "region_codes"}


def options(tmp_path, *names, **changed):
    values = {"operators": list(names), "batch_size": 2, "precision": "fp32", "sweep": False, "part_seconds": 60.0, "device": "cpu"}
    return argparse.Namespace(**{**values, "compile_only": False, "output": tmp_path / "operators.json", **changed})


def test_bytes_and_operations_by_hand():
    # Two images, bfloat16. An image has 128 patches of 768 values.
    assert cases.patch_rows_work(2, 2, V=3)[0] == (2 * 3 * (768 + 1536 + 4), 2 * 2 * 3 * 768)
    assert cases.patch_rows_work(2, 2, V=128)[0].num_bytes == 2 * 128 * (768 + 1536)
    # Three of 128 tokens of 4 values: 24 bytes read, 24 written, 12 of indices; backward all 128 are written.
    assert cases.gather_visible_work(2, 2, V=3, D=4, positions=False) == ((2 * 60, 0), (2 * (24 + 1024 + 12), 0))
    assert cases.patch_loss_work(2, 2)[0].num_bytes == 2 * 128 * (768 + 1536 + 1536 + 4 + 4)
    assert cases.patch_loss_work(2, 2)[1] == (0, 0)
    assert cases.feature_loss_work(2, 2, D=4)[0].num_bytes == 2 * 128 * (8 + 8 + 8 + 4 + 4)
    # Six tokens of 8 bytes: two read and two written, mean and 1 / deviation of each, weight and bias; kernels.md says 8 D a token.
    assert cases.add_layer_norm_work(2, 2, N=3, D=4, scaled=False)[0].num_bytes == 4 * 48 + 6 * 8 + 32
    assert cases.add_layer_norm_work(2, 2, N=3, D=4, scaled=False)[1].num_bytes == 4 * 48 + 6 * 8 + 48
    assert cases.add_layer_norm_work(2, 2, N=3, D=4, scaled=False, wide_stream=True)[0].num_bytes == 2 * 96 + 2 * 48 + 6 * 8 + 32
    assert cases.add_layer_norm_work(2, 2, N=3, D=4, scaled=False, wide_stream=True)[1].num_bytes == 3 * 96 + 2 * 48 + 6 * 8 + 48
    # qkv in and one out of 2 x 3 x 5 x 7 values, 60 log-sum-exps of 4 bytes: q k^T and p v, forward; five such products, backward.
    forward, backward = cases.short_attention_work(2, 2, N=3, H=5, d=7)
    assert forward == (4 * 420 + 120, 2 * 2 * (2 * 5 * 3 * 3 * 7))
    assert backward == (8 * 420 + 120, 5 * 2 * (2 * 5 * 3 * 3 * 7))
    assert cases.short_cross_attention_work(2, 2, N=3, M=3, H=5, d=7) == (forward, backward)
    # 40 bytes for each of the 12 D**2 + 13 D parameters of a block, 38 with gradients of two bytes.
    assert cases.adamw_ema_work(2, 2, D=4, depth=2, half=False)[0].num_bytes == 2 * 40 * (12 * 16 + 13 * 4)
    assert cases.adamw_ema_work(2, 2, D=4, depth=2, half=True)[0].num_bytes == 2 * 38 * (12 * 16 + 13 * 4)
    assert cases.block_masks_work(2, 2)[0] == (2 * (8 + 128), 0)


@pytest.mark.parametrize("name", ["assemble_tokens", "join_tokens", "region_queries"])
def test_bytes_are_those_of_the_tensors(name):
    """Where each input is read and each output written once, and nothing else."""
    for case in cases.OPERATORS[name](False):
        arguments = case.make(cases.Maker(B=2, dtype=torch.float32))
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        tensors.append(getattr(reference, name)(**arguments))
        assert case.work(2, 4)[0].num_bytes == sum(tensor.nbytes for tensor in tensors)


def test_every_operator_has_cases():
    exported = {name for name in personmae_kernels.__all__ if not isinstance(getattr(personmae_kernels, name), type)}
    assert exported - PIECES - set(cases.OPERATORS) == set()
    for name, make in cases.OPERATORS.items():
        assert callable(peers.public_function(name))
        for sweep in (False, True):
            names = [case.name for case in make(sweep)]
            assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("name", cases.OPERATORS)
def test_every_case_runs_in_plain_pytorch(name):
    maker = cases.Maker(B=1, dtype=torch.float32)
    for case in cases.OPERATORS[name](False):
        if case.name.startswith("12 blocks"):
            continue
        arguments = case.make(maker)
        leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        version = next(version for version in peers.versions(name, maker.device, case.can_compile) if version.name == "eager")
        outputs = version.bind(arguments)()
        assert bool(leaves) == (case.work(1, 4)[1] is not None)
        if leaves:
            ends = timing.differentiable(outputs)
            gradients = torch.autograd.grad(ends, leaves, [torch.ones_like(end) for end in ends])
            assert all(gradient.shape == leaf.shape for gradient, leaf in zip(gradients, leaves, strict=True))


def test_an_operator_whose_test_fails_is_not_timed(tmp_path, capsys):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_block_masks.py").write_text("def test_it():\n    pass\n")
    (tests / "test_join_tokens.py").write_text("raise RuntimeError('never read: the file is that of assemble_tokens')\n")
    (tests / "test_assemble_tokens.py").write_text("def test_triton_form():\n    pass\n\ndef test_gradient():\n    assert 1 == 2\n")
    status = operators.time_all(options(tmp_path, "block_masks", "join_tokens", "patch_rows"), tests)
    assert status == 1
    record = json.loads((tmp_path / "operators.json").read_text())
    assert {row["operator"] for row in record["results"]} == {"block_masks"}
    assert record["settings"]["refused"] == ["join_tokens", "patch_rows"]
    said = capsys.readouterr().out
    assert "join_tokens was not timed, for its test fails: FAILED" in said
    # No test is no proof.
    assert "patch_rows was not timed, for its test fails: there is no test_patch_rows.py" in said


def test_ours_may_not_fail_where_it_is_timed(tmp_path, monkeypatch):
    def fail(arguments):
        raise ValueError("no such size")

    found = [peers.Version("compiled", fail), peers.Version("eager", lambda arguments: lambda: None)]
    monkeypatch.setattr(timing, "versions", lambda *_: found)
    monkeypatch.setattr(operators, "run_tests", lambda *_: {})
    monkeypatch.setattr(operators, "measure_ceilings", lambda _: CEILINGS)
    assert operators.time_all(options(tmp_path, "block_masks"), tmp_path) == 1
    failed, timed = json.loads((tmp_path / "operators.json").read_text())["results"]
    assert failed["problem"] == "ValueError: no such size"
    assert timed["share_of_copy"] == pytest.approx(timed["num_bytes"] / timed["seconds"]["median"] / 1e9)
    found[0] = peers.Version("liger", fail)
    assert operators.time_all(options(tmp_path, "block_masks"), tmp_path) == 0


def test_rates_are_shares_of_the_ceilings():
    taken = timing.Time(Spread(2e-3, 1e-3, 4e-3, 9), 1e-4)
    row = timing.finish_row({"operator": "o", "case": "c", "version": "v", "direction": "forward"}, taken, cases.Work(10**6, 10**9), CEILINGS)
    assert (row["gb_per_second"], row["share_of_copy"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert (row["tflop_per_second"], row["share_of_matmul"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert row["host_seconds"] == 1e-4


def test_what_comes_after_the_time_of_a_part_is_left_out(capsys):
    maker = cases.Maker(B=1, dtype=torch.float32)
    rows = timing.time_operator("block_masks", cases.OPERATORS["block_masks"](False), maker, CEILINGS, deadline=0.0)
    assert [row["version"] for row in rows] == (["compiled", "eager"] if compiled.available() else ["eager"])
    assert all("left_out" in row for row in rows)
    assert "block_masks, 128 patches, 63 visible, eager: left out" in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    timed = []

    def time_part(name, batch_size, *_):
        timed.append((name, batch_size))
        if len(timed) == 3:
            raise KeyboardInterrupt
        return [{"operator": name}]

    monkeypatch.setattr(operators, "time_part", time_part)
    arguments = options(tmp_path, sweep=True, output=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        operators.sweep(["patch_rows", "patch_loss"], arguments, CEILINGS, {})
    operators.sweep(["patch_rows", "patch_loss"], arguments, CEILINGS, {})
    expected = [(name, size) for size in (256, 1024, 4096) for name in ("patch_rows", "patch_loss")]
    assert timed == [*expected[:3], *expected[2:]]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {f"{name}-{size}.json" for name, size in expected}


def test_it_runs_on_a_cpu(tmp_path):
    command = ["benchmarks/operators.py", "patch_rows", "block_masks", "products", "--device", "cpu", "--precision", "fp32", "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command += ["--output", str(tmp_path / "operators.json"), "--part-seconds", "5"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "On a CPU the Triton kernels are not timed" in result.stdout
    record = json.loads((tmp_path / "operators.json").read_text())
    assert record["settings"]["ceilings"]["bytes_per_second"] > 0
    rows = record["results"]
    assert {row["operator"] for row in rows} == {"patch_rows", "block_masks", "products"}
    assert "triton" not in {row["version"] for row in rows}
    timed = [row for row in rows if "seconds" in row]
    assert {"patch_rows", "block_masks", "products"} == {row["operator"] for row in timed}
    assert all(0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"] for row in timed)


def test_it_compiles_nothing_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        operators.main(["--compile-only"])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_it_names_an_unknown_operator(capsys):
    with pytest.raises(SystemExit):
        operators.main(["patch_los"])
    assert "unknown operator 'patch_los'" in capsys.readouterr().err


def test_the_other_apex_is_recognised(tmp_path, monkeypatch):
    assert "not installed" in peers._no_apex()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('it is never imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "another package" in peers._no_apex()
    (tmp_path / "apex" / "normalization").mkdir()
    assert "without its CUDA extensions" in peers._no_apex()


def test_missing_libraries_are_named():
    found, missing = peers.libraries("add_layer_norm")
    assert [version.name for version in found if version.name == "F.layer_norm"]
    for name, why in (("liger", peers._no_liger()), ("apex", peers._no_apex())):
        assert (name in {version.name for version in found}) == (not why)
        assert any(sentence.startswith(f"{name}: ") for sentence in missing) == bool(why)
