"""The pre-training program: whole runs, in this process, under torchrun, killed and resumed, and given bad input."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crops import SMALL, draw_crops
from safetensors.torch import load_file

from personmae import pretrain
from personmae.configs import UserError
from personmae.training.checkpoints import list_checkpoints, load_checkpoint

PROGRAM = Path(pretrain.__file__)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return draw_crops(tmp_path_factory.mktemp("crops"))


def flags(crops, run, *more):
    """Flags of a run of 6 steps (2 epochs), a checkpoint after each step."""
    where = ["--data.source", str(crops), "--data.index-dir", str(Path(run).parent / "index"), "--run-dir", str(run)]
    return [*SMALL, *where, "--schedule.steps", "6", "--checkpoint-every", "1", "--picture-every", "3", *more]


def run_here(crops, run, *more):
    return pretrain.main(pretrain.from_command_line(flags(crops, run, *more)))


def start(arguments, processes=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
    root = PROGRAM.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return subprocess.Popen([*launch, str(PROGRAM), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one, other):
    a, b = load_file(one / "encoder.safetensors"), load_file(other / "encoder.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(crops, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_here(crops, run) == 6
    return run


def test_a_run_leaves_what_it_promises(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "pictures", "report.html", "log.txt"} <= names
    assert {"encoder.safetensors", "teacher.safetensors"} <= names
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "loss_pixels", "loss_features", "loss_pixels_seen", "loss_features_outside", "teacher_rank", "mean_patch_loss", "gradient_norm"}
    assert wanted <= lines[-1].keys()
    assert all(line["loss"] > 0 for line in lines)
    assert [path.name for _, path in list_checkpoints(undisturbed / "checkpoints")] == [f"step_{n:07d}.pt" for n in (4, 5, 6)]
    assert sorted(path.name for path in (undisturbed / "pictures").iterdir()) == ["reconstruction_0000003.png", "reconstruction_0000006.png"]


def test_the_student_learns_and_the_teacher_follows(crops, tmp_path):
    run = tmp_path / "run"
    run_here(crops, run, "--schedule.steps", "60", "--checkpoint-every", "60", "--optimiser.learning-rate", "0.1")
    lines = metrics(run)
    first, last = (sum(line["loss_pixels"] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < 0.8 * first
    config = pretrain.from_command_line(flags(crops, run))
    before = pretrain.build_models(config)[0].encoder.state_dict()
    student, teacher = load_file(run / "encoder.safetensors"), load_file(run / "teacher.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(student[name], before[name])
    # The teacher lies on the way from the start to the student.
    assert 0 < (teacher[name] - before[name]).norm() < (student[name] - before[name]).norm()


def test_the_same_run_twice_is_the_same_to_the_bit(crops, undisturbed, tmp_path):
    run_here(crops, tmp_path / "run")
    assert_same_weights(undisturbed, tmp_path / "run")


def test_killed_and_resumed_is_the_same_to_the_bit(crops, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(flags(crops, run))
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step_0000002.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = list_checkpoints(run / "checkpoints")[-1][0]
    assert run_here(crops, run) == 6
    assert left < 6, "the run ended before it was killed; the test has shown nothing"
    assert_same_weights(undisturbed, run)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    a, b = (load_checkpoint(d / "checkpoints" / "step_0000006.pt").state for d in (undisturbed, run))
    assert all(torch.equal(a["teacher"][name], b["teacher"][name]) for name in a["teacher"])


def test_sigterm_writes_a_checkpoint_and_exits_cleanly(crops, tmp_path):
    run = tmp_path / "run"
    process = start([*flags(crops, run), "--schedule.steps", "100000", "--checkpoint-every", "100000"])
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    [(step, _)] = list_checkpoints(run / "checkpoints")
    assert f"stopped at step {step} of 100000" in text


def test_two_processes_have_the_losses_of_one_which_can_go_on_alone(crops, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(flags(crops, run), processes=2)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    both = metrics(run)
    for number in (5, 6):
        (run / "checkpoints" / f"step_{number:07d}.pt").unlink()
    assert run_here(crops, run) == 6
    alone = metrics(run)
    assert alone[:4] == both[:4]
    for one, two in [*zip(metrics(undisturbed), both, strict=True), *zip(metrics(undisturbed)[4:], alone[4:], strict=True)]:
        for name in ("loss", "loss_pixels", "loss_features", "loss_pixels_hidden", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


def test_one_mistake_is_told_once_by_all_processes(tmp_path):
    process = start(flags(tmp_path / "nowhere", tmp_path / "run"), processes=2)
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert text.count("error: ") == 1
    assert str(tmp_path / "nowhere") in text


def test_accumulation_and_another_number_of_parts_at_resume(crops, undisturbed, tmp_path):
    run = tmp_path / "run"
    stopped_config = pretrain.from_command_line(flags(crops, run, "--accumulation", "4"))
    pretrain.main(stopped_config)
    for path in sorted((run / "checkpoints").iterdir()):
        if path.name != "step_0000004.pt":
            path.unlink()
    run_here(crops, run, "--accumulation", "2")
    for one, parts in zip(metrics(undisturbed), metrics(run), strict=True):
        for name in ("loss", "loss_pixels", "loss_features", "loss_features_seen", "gradient_norm"):
            assert parts[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


@pytest.mark.parametrize(
    "more",
    [
        ["--model.target-region", "A", "--model.predict", "masked", "--model.losses", "pixels", "--model.pixel-decoder.form", "mae"],
        ["--model.losses", "features", "--model.feature-decoder.form", "joint", "--model.predict", "unseen"],
        ["--teacher.with-class", "--model.low-level-injection", "--model.per-channel-pixels"],
        ["--model.masking.kind", "band", "--data.regions.independent-flips", "--model.feature-loss", "cosine"],
        ["--precision", "bf16", "--teacher.kind", "ema", "--optimiser.clip-norm", "None"],
    ],
)
def test_other_configurations_run(crops, tmp_path, more):
    assert run_here(crops, tmp_path / "run", "--schedule.steps", "2", *more) == 2
    assert all(line["loss"] > 0 for line in metrics(tmp_path / "run"))


def test_plain_mae_presets_are_plain_mae():
    config = pretrain.from_command_line(["mae-small", "--data.source", "x"])
    model = config.model
    assert (model.target_region, model.predict, model.losses, model.pixel_decoder.form, model.masking.kind) == (
        "A", "masked", "pixels", "mae", "random",
    )  # fmt: skip


def test_no_flag_of_ours_is_taken_by_torchrun():
    """Its parser reads all words, and takes one that begins two of its own options for a mistake."""
    from torch.distributed.run import get_args_parser

    theirs = get_args_parser()._option_string_actions
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as help_text:
        pretrain.from_command_line(["vit-nano", "--help"])
    ours = set(re.findall(r"--[a-z][a-z.-]*[a-z]", help_text.getvalue())) - {"--help"}
    assert {"--run-dir", "--data.source", "--batch-size"} <= ours
    assert [flag for flag in ours if any(option.startswith(flag) for option in theirs)] == []


def message(capsys, arguments):
    """What a user sees who makes a mistake: one sentence, no traceback, exit code 2."""
    with pytest.raises(SystemExit) as exit_, pretrain.user_errors_exit():
        pretrain.main(pretrain.from_command_line(arguments))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_mistakes_are_told_in_a_sentence(crops, tmp_path, capsys):
    run = tmp_path / "run"
    assert "nowhere" in message(capsys, flags(tmp_path / "nowhere", run))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in message(capsys, flags(tmp_path / "empty", run))
    one = draw_crops(tmp_path / "one", num_images=1)
    text = message(capsys, flags(one, run))
    assert "8" in text
    assert "1 image" in text
    assert "batch" in text
    assert "25" in message(capsys, flags(crops, run, "--batch-size", "25"))
    assert "multiple of 3" in message(capsys, flags(crops, run, "--accumulation", "3"))
    assert "--data.source" in message(capsys, ["vit-nano"])
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in message(capsys, flags(crops, tmp_path / "file"))
    assert "region A only" in message(capsys, flags(crops, run, "--model.pixel-decoder.form", "mae"))
    assert "vit-base" in message(capsys, ["vit-huge"])
    assert "checkpoint_every" in message(capsys, flags(crops, run, "--checkpoint-every", "0"))
    assert "schedule.steps" in message(capsys, flags(crops, run, "--schedule.steps", "0"))
    assert "100" in message(capsys, flags(crops, run, "--model.encoder.image-size", "100", "50", "--model.encoder.patch-px", "16"))


def test_a_run_is_not_continued_with_other_settings_or_images(crops, undisturbed, tmp_path, capsys):
    assert "optimiser.learning_rate" in message(capsys, flags(crops, undisturbed, "--optimiser.learning-rate", "0.5"))
    assert "model.encoder.width" in message(capsys, flags(crops, undisturbed, "--model.encoder.width", "64"))
    assert "--resume is never" in message(capsys, flags(crops, undisturbed, "--resume", "never"))
    others = draw_crops(tmp_path / "others", seed=1)
    assert "other images" in message(capsys, flags(others, undisturbed))


def test_a_broken_checkpoint_is_passed_over_and_said(crops, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    run_here(crops, run)
    newest = run / "checkpoints" / "step_0000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert run_here(crops, run) == 6
    assert "step_0000006.pt" in "".join(capsys.readouterr())
    assert_same_weights(undisturbed, run)


def test_a_file_that_goes_bad_leaves_the_run_what_it_was(crops, undisturbed, tmp_path):
    """The run goes on over the images that it began with: the bad one is replaced and listed, nothing else changes."""
    own = shutil.copytree(crops, tmp_path / "crops")
    run = tmp_path / "run"
    run_here(own, run, "--data.loader.cache-gib", "0")
    for path in sorted((run / "checkpoints").iterdir()):
        if path.name != "step_0000004.pt":
            path.unlink()
    victim = own / "part1" / "crop_005.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    draw_crops(own / "new", num_images=2, seed=3)
    assert run_here(own, run, "--data.loader.cache-gib", "0", "--data.loader.retry-seconds", "0") == 6
    listed = (run / "quarantine.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in listed] == [str(victim)]
    lines = metrics(run)
    assert [line["quarantined_images"] for line in lines[:4]] == [0, 0, 0, 0]
    assert [line["loss"] for line in lines[:4]] == [line["loss"] for line in metrics(undisturbed)[:4]]


def test_more_bad_files_than_allowed_stop_the_run(crops, tmp_path):
    own = shutil.copytree(crops, tmp_path / "crops")
    run = tmp_path / "run"
    run_here(own, run, "--data.loader.cache-gib", "0", "--schedule.steps", "3")
    (run / "checkpoints" / "step_0000003.pt").unlink()
    for path in sorted(own.rglob("*.jpg"))[::2]:
        path.unlink()
    with pytest.raises(UserError, match="max_bad_ratio"):
        run_here(own, run, "--data.loader.cache-gib", "0", "--data.loader.retry-seconds", "0", "--schedule.steps", "3")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(crops, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="loss is"):
        run_here(crops, run, "--optimiser.learning-rate", "1e30", "--schedule.steps", "50", "--optimiser.clip-norm", "None")
    assert not (run / "encoder.safetensors").exists()
    saved = [load_checkpoint(path) for _, path in list_checkpoints(run / "checkpoints")]
    assert saved
    assert all(torch.isfinite(tensor).all() for checkpoint in saved for tensor in checkpoint.state["model"].values())


def on_gpu(crops, run, *more):
    arguments = flags(crops, run, "--deterministic", *more)
    arguments[arguments.index("--device") + 1] = "cuda"
    return pretrain.main(pretrain.from_command_line(arguments))


@pytest.mark.gpu
def test_a_gpu_has_the_losses_of_the_cpu_in_fp32(crops, undisturbed, tmp_path):
    assert on_gpu(crops, tmp_path / "run", "--data.loader.kind", "threads") == 6
    for one, two in zip(metrics(undisturbed), metrics(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_run_in_bf16_is_resumed_to_the_bit(crops, tmp_path):
    assert on_gpu(crops, tmp_path / "whole", "--precision", "bf16") == 6
    assert on_gpu(crops, tmp_path / "run", "--precision", "bf16") == 6
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name != "step_0000004.pt":
            path.unlink()
    assert on_gpu(crops, tmp_path / "run", "--precision", "bf16") == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
