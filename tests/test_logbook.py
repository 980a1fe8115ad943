"""The logbook: right means over steps and processes, read only when due; files that survive a crash; clear errors for bad folders."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.training.logbook import Logbook, Share, check_run_dir, describe_line, keep_lines_to
from personmae.whole_files import write_whole


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logbook(run_dir: Path, **options: Any) -> Logbook:
    return Logbook(run_dir, **{"num_steps": 100, "images_per_step": 32, "log_every": 2, "tensorboard": False, "stream": io.StringIO(), **options})


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_means_and_latest_values(tmp_path: Path) -> None:
    clock = Clock()
    with logbook(tmp_path / "a" / "run", log_every=3, clock=clock, config={"seed": 1, "data": {"source": "crops"}}) as book:
        for step in range(1, 8):
            clock.now += 0.5
            means: dict[str, Tensor | float | Share] = {
                "loss": torch.tensor(float(step), requires_grad=True),
                "half": torch.tensor(step, dtype=torch.bfloat16),
                "number": 2 * step,
                "loss_hidden": Share(torch.tensor(10.0 * step), torch.tensor(step)),
            }
            latest: dict[str, Tensor | float] = {"learning_rate": 0.1 * step, "epoch": step // 4}
            if step == 2:
                latest["teacher_std"] = torch.tensor(0.75)
            line = book.log(step, means, latest, wait_seconds=0.125 * step, last=step == 7)
            assert (line is not None) == (step in (3, 6, 7))
            if step in (3, 6, 7):
                # What is on disk is complete after each line, without a close.
                assert lines(tmp_path / "a" / "run")[-1] == {"step": step, **(line or {})}
    common = {"images_per_second": 64.0, "data_wait_ratio": 0.25}
    assert lines(tmp_path / "a" / "run") == [
        {"step": 3, "loss": 2, "half": 2, "number": 4, "loss_hidden": 10, "learning_rate": 0.1 * 3, "epoch": 0, "teacher_std": 0.75, **common},
        {"step": 6, "loss": 5, "half": 5, "number": 10, "loss_hidden": 10, "learning_rate": 0.1 * 6, "epoch": 1, **common},
        {"step": 7, "loss": 7, "half": 7, "number": 14, "loss_hidden": 10, "learning_rate": 0.1 * 7, "epoch": 1, **common},
    ]
    assert json.loads((tmp_path / "a" / "run" / "config.json").read_text()) == {"seed": 1, "data": {"source": "crops"}}


def test_a_share_is_the_ratio_of_sums(tmp_path: Path) -> None:
    with logbook(tmp_path, log_every=3) as book:
        for step, (total, count) in enumerate([(6.0, 2), (0.0, 0), (1.0, 5)], start=1):
            line = book.log(step, {"loss_outside": Share(torch.tensor(total), torch.tensor(count)), "never": Share(0.0, 0)})
    assert line is not None
    assert line["loss_outside"] == 1.0
    assert math.isnan(line["never"])
    assert lines(tmp_path)[0]["never"] is None


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with logbook(tmp_path, log_every=1) as book:
        line = book.log(1, {"a": torch.tensor(math.nan), "b": math.inf, "c": 1.0}, {"d": -math.inf})
    assert line is not None
    assert math.isnan(line["a"])
    assert (line["b"], line["d"]) == (math.inf, -math.inf)
    found = lines(tmp_path)[0]
    assert (found["a"], found["b"], found["c"], found["d"]) == (None, None, 1.0, None)


def test_no_value_is_read_before_a_line_is_due(tmp_path: Path) -> None:
    # Tensors without data: reading one is an error, adding it to a sum is not.
    with logbook(tmp_path, log_every=10, device="meta") as book:
        for step in range(1, 10):
            value = torch.zeros((), device="meta")
            assert book.log(step, {"loss": value, "share": Share(value, value)}, {"monitor": value}) is None
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            book.log(10, {"loss": value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_no_step_waits(tmp_path: Path) -> None:
    value = torch.full((), 2.0, device="cuda", requires_grad=True)
    with logbook(tmp_path, log_every=3, device="cuda") as book:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (1, 2):
                assert book.log(step, {"loss": value, "number": 1.0, "share": Share(value, 2)}, {"monitor": value}) is None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        line = book.log(3, {"loss": value, "number": 1.0, "share": Share(value, 2)})
    assert line is not None
    assert (line["loss"], line["number"], line["share"], line["monitor"]) == (2.0, 1.0, 1.0, 2.0)


def test_sums_go_over_processes_once_a_line(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def reduce(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A second process with the sums 10 higher and the same counts.
        calls.append(list(values))
        return {name: 2 * value + torch.tensor([10.0, 0.0], dtype=torch.float64) for name, value in values.items()}

    with logbook(tmp_path, reduce=reduce) as book:
        for step in (1, 2, 3, 4):
            line = book.log(step, {"loss": torch.tensor(1.0), "share": Share(torch.tensor(4.0), 2)})
    assert calls == [["loss", "share"]] * 2
    assert line is not None
    assert (line["loss"], line["share"]) == ((4 + 10) / 4, (16 + 10) / 8)


def test_other_processes_write_nothing_but_know_the_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logbook(tmp_path / "run", is_main=False, log_every=1, stream=stream, config={}) as book:
        book.announce("a sentence")
        line = book.log(1, {"loss": 3.0})
    assert line is not None
    assert line["loss"] == 3.0
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_sentences_are_said_once_and_kept(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logbook(tmp_path, stream=stream) as book:
        book.announce("loader: threads, because DALI is missing")
        book.announce("loader: threads, because DALI is missing")
        book.announce("another")
    assert stream.getvalue().splitlines() == ["loader: threads, because DALI is missing", "another"]
    with logbook(tmp_path) as book:
        book.announce("another")
    kept = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert kept == ["loader: threads, because DALI is missing", "another", "another"]


def test_resuming_drops_the_lines_of_steps_that_come_again(tmp_path: Path) -> None:
    with logbook(tmp_path, log_every=1) as book:
        for step in range(1, 8):
            book.log(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    stream = io.StringIO()
    with logbook(tmp_path, log_every=1, resume_step=5, stream=stream) as book:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
        for step in (6, 7):
            book.log(step, {"loss": 10.0 * step})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60), (7, 70)]
    assert "dropped 3 lines of metrics.jsonl" in stream.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "num_dropped"),
    [
        (b"", b"", 0),
        (b'{"step": 1}\n{"step": 2}\n', b'{"step": 1}\n{"step": 2}\n', 0),
        # A last line that is whole but for its end stays.
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n{"step": 2}\n', 0),
        (b'{"step": 1}\n{"step": 2, "loss": 1.', b'{"step": 1}\n', 1),
        (b'{"step": 1}\n\x00\x00\xff\n[3]\n7\n{"loss": 1}\n{"step": "2"}\n\n{"step": 2}\n', b'{"step": 1}\n{"step": 2}\n', 6),
        (b'{"step": 9}\n{"step": 3}\n', b'{"step": 3}\n', 1),
    ],
)
def test_lines_cut_off_by_a_crash_are_dropped(tmp_path: Path, before: bytes, after: bytes, num_dropped: int) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_lines_to(path, 3) == 0
    path.write_bytes(before)
    assert keep_lines_to(path, 3) == num_dropped
    assert path.read_bytes() == after
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failed_rewrite_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n')

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        keep_lines_to(path, 3)
    with pytest.raises(UserError, match=r"config\.json"):
        write_whole(tmp_path / "config.json", "{}")
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_while_logging(tmp_path: Path) -> None:
    with logbook(tmp_path, log_every=1) as book:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device"):
            book.log(1, {"loss": 1.0})


def test_a_run_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(UserError, match=r"the run folder .*file is a file"):
        logbook(file)
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        logbook(file / "run")
    with pytest.raises(UserError, match="log_every is 0"):
        logbook(tmp_path, log_every=0)
    assert file.read_text() == "text"
    check_run_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


NO_PERMISSION = """
import os, sys
from pathlib import Path
from personmae.configs import UserError
from personmae.training.logbook import check_run_dir

if os.getuid() == 0:
    os.setuid(65534)
for path in map(Path, sys.argv[1:]):
    try:
        check_run_dir(path)
    except UserError as error:
        assert str(path) in str(error), error
        print("Permission denied" in str(error))
"""


def test_a_run_folder_without_permission_is_named(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    tmp_path.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", NO_PERMISSION, str(locked), str(locked / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, resume_step in ((1, 0), (4, 3)):
        with logbook(tmp_path, log_every=1, tensorboard=True, resume_step=resume_step) as book:
            for step in range(first, 6):
                book.log(step, {"loss": torch.tensor(10.0 * first + step), "nothing": math.nan})
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    # Steps 4 and 5 of the first run are purged: they came again.
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 11), (2, 12), (3, 13), (4, 44), (5, 45)]
    assert "nothing" not in events.Tags()["scalars"]


def test_a_missing_tensorboard_is_said_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    stream = io.StringIO()
    with logbook(tmp_path, tensorboard=True, log_every=1, stream=stream) as book:
        book.log(1, {"loss": 1.0})
    assert stream.getvalue().count("pip install tensorboard") == 1
    assert lines(tmp_path)[0]["loss"] == 1.0
    assert not (tmp_path / "events").exists()


def test_plain_lines_come_now_and_then(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    with logbook(tmp_path, num_steps=10, log_every=1, clock=clock, stream=stream) as book:
        book.start_clock(0, wait_seconds=5.0)
        for step in range(1, 11):
            clock.now += 4
            book.log(step, {"loss": 3.0, "loss_pixels": 1.0, "loss_features": 2.0}, wait_seconds=5.0 + step)
    found = stream.getvalue().splitlines()
    assert [line.split()[1] for line in found] == ["1/10", "4/10", "7/10", "10/10"]
    assert found[1] == "step 4/10  pixels 1.0000  features 2.0000  8 images/s  data wait 25%  00:24 left"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    with logbook(tmp_path, num_steps=10, resume_step=4, stream=stream) as book:
        book.announce("said above the bar")
        for step in range(5, 11):
            book.log(step, {"loss_pixels": 1.0, "loss_features": 2.0})
    shown = stream.getvalue()
    assert "4/10" in shown
    assert "10/10" in shown
    assert "pixels 1.0000  features 2.0000" in shown
    assert "said above the bar\n" in shown
    assert "step 10/10" not in shown


def test_a_run_with_one_loss_shows_it() -> None:
    assert describe_line({"loss": 0.5, "images_per_second": 1234.5, "data_wait_ratio": 0.333}) == "loss 0.5000  1234 images/s  data wait 33%"


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    book = logbook(tmp_path, tensorboard=True, stream=Terminal())
    book.close()
    book.close()


def test_a_terminal_without_a_width_still_shows_the_bar(tmp_path: Path) -> None:
    main, terminal = os.openpty()  # a new one has 0 columns
    with os.fdopen(terminal, "w") as stream:
        assert os.get_terminal_size(terminal).columns == 0
        with Logbook(tmp_path / "run", num_steps=4, images_per_step=2, log_every=2, tensorboard=False, stream=stream) as logbook:
            logbook.log(1, {"loss_pixels": 1.5})
            logbook.log(2, {"loss_pixels": 1.5})
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal that is closed
        while part := os.read(main, 65536):
            shown += part.decode()
    os.close(main)
    assert "2/4" in shown
    assert "pixels 1.5" in shown
