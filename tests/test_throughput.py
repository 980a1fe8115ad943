"""The training benchmark: its peers compute what ours computes, its counts by hand, what it does when a way fails or has had its time."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _throughput_timing as timing
from benchmarks import _throughput_ways as ways
from benchmarks import throughput
from benchmarks._measure import spread
from benchmarks._throughput_chart import draw_chart
from benchmarks._throughput_flops import Flops, count_flops, describe_flops
from benchmarks._throughput_inputs import NoiseFeed, noise_batch
from benchmarks._throughput_peers import PlainMAE
from personmae import pretrain
from personmae.configs import UserError
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig
from personmae.models.vit import VitConfig
from personmae.recipes.pretraining import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
VIT = VitConfig(image_size=(32, 16), patch_px=4, width=64, depth=2, num_heads=2)


def small(form="cross"):
    decoder = DecoderConfig(form=form, depth=2, width=32, num_heads=2)
    own = {"target_region": "A", "predict": "masked", "losses": "pixels"} if form == "mae" else {}
    # The weights differ, so that neither loss can stand for the other.
    model = MaskedConfig(encoder=VIT, pixel_decoder=decoder, feature_decoder=decoder, pixel_weight=0.75, feature_weight=1.5, **own)
    return PretrainConfig(model=model, batch_size=3)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("form", ["cross", "mae"])
@pytest.mark.parametrize("way", ways.WAYS[:3])
def test_the_peers_compute_what_ours_computes(way, form):
    config = small(form)
    batch = noise_batch(config)
    model, teacher = pretrain.build_models(config)
    # As initialised, biases and the class token of a model are near zero, and a peer without them would pass.
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    teacher.encoder.load_state_dict(model.encoder.state_dict())
    inputs = pretrain.to_inputs(batch, config, CPU)
    ours = model(inputs, None if form == "mae" else teacher(inputs.region_b)).total
    ours.backward()
    peer = PlainMAE(config.model, model.state_dict(), with_sdpa=way != "eager")
    # The compiler's own code takes a minute; what it is given is checked here: one graph, the same numbers.
    forward = torch.compile(peer, backend="aot_eager", fullgraph=True) if way == "compile" else peer
    loss = forward(batch.region_a, batch.region_b, batch.boxes, batch.flips, inputs.mask.float())
    loss.backward()
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)
    expected = gradients(model)
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    assert gradients(peer).keys() == expected.keys()
    assert {name for name, value in gradients(peer).items() if not (value - expected[name]).norm() <= 1e-5 * size} == set()


def test_the_first_loss_of_each_way_is_checked(monkeypatch):
    config = small()
    beginning = ways.begin(config, noise_batch(config), CPU, "fp32")
    for way in ways.WAYS:
        ways.make_trainer(way, config, beginning, CPU, "fp32")
    for way in ways.WAYS:
        with pytest.raises(ValueError, match="not the same training"):
            ways.make_trainer(way, config, dataclasses.replace(beginning, loss=1.01 * beginning.loss), CPU, "fp32")
        with pytest.raises(ValueError, match="not the same training"):
            ways.make_trainer(way, config, dataclasses.replace(beginning, loss=math.nan), CPU, "fp32")


@pytest.mark.parametrize("way", ["eager", "ours"])
def test_a_step_trains_and_moves_the_average(way, monkeypatch):
    config = small()
    made = []

    class Noted(ways.MovingAverage):
        def __init__(self, average, source):
            super().__init__(average, source)
            made.append(self)

    monkeypatch.setattr(ways, "MovingAverage", Noted)
    trainer = ways.make_trainer(way, config, ways.begin(config, noise_batch(config), CPU, "fp32"), CPU, "fp32")
    before = [(source.detach().clone(), average.clone()) for source, average in made[0].pairs()]
    trainer.step(noise_batch(config, 1))
    for (source, average), (was, average_was) in zip(made[0].pairs(), before, strict=True):
        assert source.grad is None
        assert torch.equal(average_was, was)
        if source.ndim > 1:
            assert not torch.equal(source, was)
        torch.testing.assert_close(average, was.lerp(source.detach(), 1 - ways.MOMENTUM), rtol=0, atol=1e-7)


def test_what_the_peers_do_not_have_is_named():
    config = small("joint")
    with pytest.raises(UserError, match=r"form joint.*--ways ours"):
        PlainMAE(config.model, {}, with_sdpa=True)


def test_operations_by_hand():
    flops = count_flops(small())
    # 15 of 32 patches are visible, and the class token; a patch has 48 values. Backward takes twice the forward pass, but for the pixels' gradient.
    D, P = 64, 48

    def blocks(tokens):
        return 2 * (2 * tokens * 12 * D * D + 2 * 2 * tokens * tokens * D)

    assert flops.student == 2 * (2 * 15 * P * D) + 3 * blocks(16)
    assert flops.teacher == 2 * 32 * P * D + blocks(32)
    assert flops.total == flops.student + flops.teacher + flops.decoders
    pixels_only = count_flops(small("mae"))
    assert pixels_only.teacher == 0
    assert 0 < pixels_only.decoders < flops.decoders


def test_a_count_far_from_the_plan_is_told():
    assert "2.9% more" in describe_flops("vit-small", Flops(0, 0, 18_000_000_000))
    assert "over" not in describe_flops("vit-small", Flops(0, 0, 18_000_000_000))
    assert describe_flops("vit-small", Flops(0, 0, 35_000_000_000)).endswith(
        "100.0% more, which is over 3%: the speeds aimed at are to be multiplied by 0.500"
    )
    assert "over 3%" in describe_flops("vit-base", Flops(0, 0, 60_000_000_000))
    assert "planned" not in describe_flops("vit-nano", Flops(1, 2, 3))


class Clock:
    """Goes on only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def step_of(self, *seconds):
        left = list(seconds)

        def step(batch):
            del batch
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return step


class SlowFeed(NoiseFeed):
    """Lets its consumer wait a second for each batch."""

    def __init__(self, clock):
        super().__init__([None])
        self.clock = clock

    def __next__(self):
        self.clock.now += 1
        self.wait_seconds += 1
        return super().__next__()


def test_the_first_steps_are_not_timed_and_waiting_is(monkeypatch):
    clock = Clock(monkeypatch)
    noted = timing.Timing()
    turn = timing.time_turn(clock.step_of(100, 50, 1, 2, 3), SlowFeed(clock), 3, 2, CPU, 1000, noted)
    assert turn == timing.Turn([2, 3, 4], 3 / 9, None)
    assert (noted.first_step_seconds, noted.spent) == (101, 60)
    noted.turns.append(turn)
    row = noted.row(batch_size=12, flops_per_image=10, flops_ceiling=80)
    assert row["step_ms"] == spread([2000, 3000, 4000])
    assert row["images_per_second"].median == 4
    assert row["share_of_matmul"] == 0.5
    assert row["data_wait_ratio"].median == 3 / 9
    assert row["peak_bytes_per_image"] is None


def test_each_way_ends_when_its_time_is_over(monkeypatch):
    clock = Clock(monkeypatch)
    opened = []

    @contextlib.contextmanager
    def source(first, num):
        opened.append((first, num))
        yield NoiseFeed([None])

    trainers = {"eager": ways.Trainer(clock.step_of(10), ""), "ours": ways.Trainer(clock.step_of(1), "")}
    timings = {way: timing.Timing() for way in trainers}
    calls = []
    timing.time_in_turns(trainers, timings, source, timing.Lengths(3, 4, 3, 1, 25), CPU, lambda: calls.append(clock.now))
    # Eager: one step that does not count, two untimed, one timed though its time is over by then; ours: 3 + 4, 1 + 4, 1 + 4 steps.
    assert [len(turn.seconds) for turn in timings["eager"].turns] == [1]
    assert [len(turn.seconds) for turn in timings["ours"].turns] == [4, 4, 4]
    assert opened == [(0, 7), (0, 7), (7, 5), (12, 5)]
    assert len(calls) == 4


def options(tmp_path, *names, **changed):
    values = {"presets": list(names), "ways": None, "input": ["synthetic"], "batch_size": 2, "num_steps": 1, "num_turns": 2, "part_seconds": 60.0}
    values |= {"device": "cpu", "precision": "fp32", "num_threads": None, "num_images": None, "output": tmp_path / "throughput.json"}
    return throughput.argparse.Namespace(**{**values, **changed})


@pytest.mark.parametrize(("broken", "status"), [("eager", 0), ("ours", 1)])
@pytest.mark.parametrize("when", ["made", "stepping"])
def test_a_way_that_fails_does_not_end_the_others(broken, status, when, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate\n a lot")

    def make(way, *_):
        if way == broken and when == "made":
            fail()
        return ways.Trainer(fail if way == broken else lambda batch: None, way)

    monkeypatch.setattr(throughput, "make_trainer", make)
    monkeypatch.setattr(throughput, "measure_ceiling", lambda device: 1e12)
    monkeypatch.setattr(throughput, "COMPARED", ("vit-nano",))
    given = options(tmp_path, ways=["eager", "ours"])
    assert throughput.time_all({"vit-nano": throughput.pretrain_presets()["vit-nano"][1]}, given) == status
    rows = {row["way"]: row for row in json.loads(given.output.read_text())["results"]}
    assert rows[broken]["problem"] == "OutOfMemoryError: tried to allocate a lot"
    assert rows[broken]["steps_left_out"] == 2
    other = rows["ours" if broken == "eager" else "eager"]
    assert other["images_per_second"]["num"] == 2
    assert "problem" not in other
    assert "tried to allocate a lot" in capsys.readouterr().out


def test_a_result_says_that_everything_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "measure_ceiling", lambda device: 1e12)
    config = throughput.pretrain_presets()["vit-nano"][1]
    joint = dataclasses.replace(config.model.pixel_decoder, form="joint")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pixel_decoder=joint))
    given = options(tmp_path, ways=["eager", "sdpa"])
    assert throughput.time_all({"vit-nano": config}, given) == 0
    assert all("form joint" in row["problem"] for row in json.loads(given.output.read_text())["results"])


def test_the_chart_shows_what_failed_too(tmp_path):
    speed = spread([90.0, 100.0, 110.0])
    rows = [
        {"preset": "vit-small", "input": "synthetic", "way": "eager", "problem": "OutOfMemoryError"},
        {
            "preset": "vit-small",
            "input": "synthetic",
            "way": "ours",
            "images_per_second": speed,
            "share_of_matmul": 0.4,
            "peak_bytes_per_image": 2**20,
        },
        {"preset": "vit-small", "input": "jpegs", "way": "ours", "images_per_second": speed, "share_of_matmul": 0.4, "peak_bytes_per_image": None},
    ]
    draw_chart(tmp_path / "chart.png", "a title", rows)
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_it_runs_on_a_cpu_without_the_command_lines_library(tmp_path):
    """As on a machine where nothing is installed for it: the folders on the path, no tyro."""
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    arguments = ["vit-nano", "--ways", "eager", "ours", "--input", "synthetic", "jpegs", "--batch-size", "2", "--num-images", "2"]
    arguments += [
        "--num-steps",
        "2",
        "--num-turns",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--output",
        str(tmp_path / "out" / "throughput.json"),
    ]
    command = [sys.executable, "benchmarks/throughput.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "vit-nano: 0.27 GFLOP an image" in result.stdout
    record = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert {"commit", "date", "machine"} <= record.keys()
    assert record["settings"]["gflop_per_image"]["vit-nano"]["planned"] is None
    rows = record["results"]
    assert [(row["input"], row["way"]) for row in rows] == [(kind, way) for kind in ("synthetic", "jpegs") for way in ("eager", "ours")]
    for row in rows:
        assert row["step_ms"]["num"] == 4
        assert 0 < row["images_per_second"]["low"] <= row["images_per_second"]["high"]
        assert 0 < row["share_of_matmul"] < 2
        assert 0 <= row["data_wait_ratio"]["median"] <= 1
    assert rows[1]["times_as_fast"].keys() == {"eager"}
    assert (tmp_path / "out" / "throughput.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vit-huge"], "unknown preset 'vit-huge'"),
        (["--num-turns", "0"], "--num-turns is 0"),
        (["--batch-size", "8", "--num-images", "4"], "at least a batch"),
    ],
)
def test_wrong_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        throughput.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
