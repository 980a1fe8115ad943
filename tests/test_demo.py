"""The demo and the command, whole, on a few drawn images: it draws, pre-trains, evaluates, reports, and takes up where it was."""

import contextlib
import importlib
import json
import subprocess
import sys

import pytest
import torch
from crops import draw_crops
from safetensors.torch import load_file

from personmae import cli


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    cli.main(["demo", "--folder", str(folder), "--steps", "3", "--num-unlabelled", "130", "--num-test-ids", "8"])
    return folder


def test_the_demo_leaves_a_report_with_scores_before_and_after(demo):
    run = demo / "run-seed0"
    page = (run / "report.html").read_text()
    for word in ("pre-trained", "random initialisation", "colour histogram", "whitened", "data:image/png"):
        assert word in page
    (content,) = json.loads((run / "evaluation.json").read_text())["evaluations"]
    rows = content["rows"]
    assert {(row["model"], row["feature"]) for row in rows} >= {("pre-trained", "mean, whitened"), ("random initialisation", "mean, whitened")}
    assert all(0 < row["mAP"] < 1 for row in rows)
    assert (run / "pictures" / "ranked_lists_mannequins_after.png").exists()
    assert (run / content["page"]).is_file()
    assert f'href="{content["page"]}"' in page


def test_a_second_call_takes_up_what_is_there(demo, capsys):
    before = load_file(demo / "run-seed0" / "encoder.safetensors")
    cli.main(["demo", "--folder", str(demo), "--steps", "3", "--num-unlabelled", "130", "--num-test-ids", "8"])
    said = "".join(capsys.readouterr())
    assert "nothing to draw" in said
    assert "continuing" in said
    after = load_file(demo / "run-seed0" / "encoder.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_evaluate_takes_a_run_or_a_file(demo, capsys):
    cli.main(["evaluate", "--checkpoint", str(demo / "run-seed0"), "--data", str(demo / "mannequins")])
    of_run = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pre-trained")]
    weights = demo / "run-seed0" / "encoder.safetensors"
    cli.main(["evaluate", "--checkpoint", str(weights), "--data", str(demo / "mannequins"), "--no-compare"])
    of_file = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pre-trained")]
    assert of_file == [line for line in of_run if "whitened" not in line]
    assert len(of_run) == 4


def test_other_rules_and_a_page_elsewhere_take_nothing_from_the_report(demo, tmp_path):
    run = demo / "run-seed0"
    before = json.loads((run / "evaluation.json").read_text())["evaluations"]
    flags = ["--as", "layumi", "--no-compare", "--page", "--output", str(tmp_path / "out")]
    cli.main(["evaluate", "--checkpoint", str(run), "--data", str(demo / "mannequins"), *flags])
    after = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert after[1:] == before
    assert (after[0]["rules"], after[0]["page"]) == ("layumi, cosine", None)
    assert len(list((tmp_path / "out").rglob("index.html"))) == 1
    report = (run / "report.html").read_text()
    assert "rules: layumi, cosine" in report
    assert "rules: standard, cosine" in report


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["evaluate", "--checkpoint", "nowhere.safetensors", "--data", "x"], "no such folder: x"),
        (["evaluate"], "--features"),
        (["evaluate", "--features", "nowhere.npz"], "nowhere.npz"),
        (["evaluate", "--features", "x.npz", "--as", "nobody"], "nobody"),
        (["data", "chek"], "data check"),
        (["pretrain", "vit-nano", "--data.source", "nowhere"], "nowhere"),
        (["draw"], "'draw'"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_set_or_no_run_is_named(demo, tmp_path, capsys):
    crops = draw_crops(tmp_path / "crops", num_images=2)
    for checkpoint, data in ((demo / "run-seed0", crops), (crops, demo / "mannequins")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["evaluate", "--checkpoint", str(checkpoint), "--data", str(data)])
        assert exit_.value.code == 2
        assert str(crops) in capsys.readouterr().err


def test_version_and_help_of_data(capsys):
    cli.main(["--version"])
    cli.main(["data", "--help"])
    cli.main(["data", "names"])
    out = capsys.readouterr().out
    assert out.startswith("personmae ")
    assert "data check SET FOLDER" in out
    assert "market1501 " in out


def test_a_reader_that_has_seen_enough_gives_no_traceback():
    command = f"{sys.executable} -m personmae data names | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"personmae {command} " in out
    # Of a command with flags, that of its own module.
    if entry := cli.COMMANDS[command].entry:
        first = importlib.import_module(f"personmae.{entry.partition(':')[0]}").__doc__.partition(":")[0].split()
        assert " ".join(first[:4]) in out


def test_help_needs_no_torch():
    code = "import sys; from personmae import cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain" in found.stdout
