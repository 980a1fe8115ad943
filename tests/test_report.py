"""The report: what it says of a whole run, of a run that wrote nothing, and how a browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from personmae.configs import UserError
from personmae.visuals.report import write_report

# No part of the page has these colours, so a screenshot with them shows the picture.
RECONSTRUCTION_COLOUR, RANKED_LIST_COLOUR = (250, 20, 230), (20, 250, 40)

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def row(model: str, feature: str, score: float | None) -> dict[str, object]:
    counts = {"num_queries": 1200, "num_valid": 1190, "num_gallery": 5000}
    return {"model": model, "feature": feature, "mAP": score, "mINP": 0.01, "rank1": 0.2, "rank5": 0.3, **counts}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a <b> & 'c'"
    (folder / "pictures").mkdir(parents=True)
    config = {
        "batch_size": 64,
        "started": {"steps": 900, "torch": "2.10.0", "commit": "abc1234", "machine": "2 cores"},
        "model": {"encoder": {"image_size": [96, 48]}},
        "name": "</pre><b>",
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        json.dumps({"step": step, "epoch": 1.5, "loss": 100 / step, "images_per_second": 200.0})
        for step in range(20, 601, 20)
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 620, "lo']))
    for step in (0, 300, 600):
        Image.new("RGB", (300, 200), RECONSTRUCTION_COLOUR).save(folder / "pictures" / f"reconstruction_{step:07d}.png")
    Image.new("RGB", (700, 300), RANKED_LIST_COLOUR).save(folder / "pictures" / "ranked_lists_after.png")
    evaluation = {
        "set": "Mannequins <demo>",
        "size": [96, 48],
        "rows": [
            row("colour histogram", "histogram", 0.098),
            row("random initialisation", "mean, whitened", 0.032),
            row("pre-trained", "class", None),
            row("pre-trained", "mean, whitened", 0.1115),
        ],
        "ranked_lists": ["pictures/ranked_lists_after.png", "pictures/gone.png", "../../secret.png", "config.json"],
        "notes": ["<script>document.title = 'taken over'</script>"],
    }
    write_evaluations(folder, evaluation)
    Image.new("RGB", (10, 10)).save(tmp_path / "secret.png")
    return folder


def write_evaluations(folder: Path, *evaluations: object) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"evaluations": evaluations}))


def read_evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())["evaluations"][0]


def words(page: str) -> str:
    """The page's text."""
    body = page[page.index("<body>") :]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body))).replace("\N{NO-BREAK SPACE}", " ")


def test_a_whole_run_is_told(run_dir: Path) -> None:
    report = write_report(run_dir)
    assert report == run_dir / "report.html"
    assert sorted(path.name for path in run_dir.iterdir() if "report" in path.name) == ["report.html"]
    page = report.read_text()
    said = words(page)
    assert "600 of 900 steps: not finished, or stopped early" in said
    assert "38,400 images seen" in said
    assert "evaluated on Mannequins <demo>" in said
    assert re.search(r"3\.2 % → 11\.2 %|3\.2 % → 11\.1 %", said)
    assert "points above random initialisation" in said
    assert "1,200 queries (10 without a match, not scored), gallery of 5,000" in said
    assert "mAP of the colour histogram 9.8 %" in said
    assert "96 x 48" in said
    assert "the last line of metrics.jsonl is cut off" in said.lower()
    assert "abc1234" in said
    for sentence in (
        "gone.png is missing",
        "secret.png is not a picture in the run",
        "config.json is not a picture in the run",
    ):
        assert sentence in said
    # Newest first, then the way to it.
    assert re.findall(r"<figcaption>(Step [^<]*)", page) == ["Step 600", "Step 0", "Step 300"]


def test_the_gain_can_be_a_loss(run_dir: Path) -> None:
    evaluation = read_evaluation(run_dir)
    evaluation["rows"] = [row("random initialisation", "class", 0.05), row("pre-trained", "class", 0.04)]
    write_evaluations(run_dir, evaluation)
    assert "1.0 points below random initialisation" in words(write_report(run_dir).read_text())
    evaluation["rows"] = [row("pre-trained", "class", 0.04)]
    write_evaluations(run_dir, evaluation)
    assert "no gain to state" in words(write_report(run_dir).read_text())


def test_each_set_has_its_scores_and_its_page(run_dir: Path) -> None:
    first = read_evaluation(run_dir)
    interval = {**row("pre-trained", "mean", 0.5), "intervals": {"mAP": [0.4321, 0.5678]}}
    second = {"set": "a <second> set", "rows": [interval], "page": "evaluation/second set/index.html", "notes": ["said once"]}
    third = {"set": "third", "rows": [], "page": "../../elsewhere.html", "notes": ["said once"]}
    write_evaluations(run_dir, first, second, third)
    page = write_report(run_dir).read_text()
    said = words(page)
    assert "evaluated on Mannequins <demo>, a <second> set, third" in said
    assert "[43.2, 56.8]" in said
    assert said.count("said once") == 1
    assert 'href="evaluation/second%20set/index.html"' in page
    assert "elsewhere" not in page


def test_text_from_files_is_escaped_and_nothing_is_requested(run_dir: Path) -> None:
    evaluation = read_evaluation(run_dir)
    evaluation["ranked_lists"].append('pictures/a" onerror="b.png')
    write_evaluations(run_dir, evaluation)
    shutil.copy(run_dir / "pictures" / "ranked_lists_after.png", run_dir / evaluation["ranked_lists"][-1])
    page = write_report(run_dir).read_text()
    assert "onerror=&quot;" in page
    assert 'onerror="' not in page
    assert "<script" not in page
    assert "</pre><b>" not in page
    assert "<demo>" not in page
    addresses = re.findall(r'(?:src|href|srcset|action|data)\s*=\s*"([^"]*)"', page) + re.findall(
        r"url\(([^)]*)\)", page
    )
    assert len(addresses) > 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    said = words(write_report(tmp_path).read_text())
    for sentence in (
        "no training was logged",
        "not evaluated",
        "No evaluation was run.",
        "config.json was not written.",
        "There is no metrics.jsonl.",
        "No reconstruction was drawn.",
        "No ranked list was drawn.",
        "Versions, machine, commit and date were not recorded.",
    ):
        assert sentence in said


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rows": 3}', '{"rows": [], "ranked_lists": "x"}', "\xff"])
def test_damaged_files_are_said(tmp_path: Path, content: str) -> None:
    for name in ("config.json", "evaluation.json", "metrics.jsonl"):
        (tmp_path / name).write_text(content, encoding="latin-1")
    said = words(write_report(tmp_path).read_text())
    assert "evaluation.json could not be read" in said or "evaluation.json holds no scores" in said


def test_a_missing_folder_and_a_blocked_report_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    binary = next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)
    if binary is None:
        reason = f"no Chromium found (looked for {', '.join(CHROMIUM_NAMES)}); on Debian: apt-get install chromium"
        if os.environ.get("PERSONMAE_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    def browse(page: Path, *flags: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [binary, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return browse


def test_a_browser_shows_the_page(run_dir: Path, tmp_path: Path, chromium: Callable[..., str]) -> None:
    report = write_report(run_dir)
    dom = chromium(report, "--dump-dom")
    assert "<title>a &lt;b&gt; &amp; 'c' - PersonMAE run</title>" in dom
    assert re.findall(r'<section id="([^"]*)"', dom) == [
        *("scores", "run", "curves", "reconstructions", "ranked-lists", "notes", "environment"),
    ]
    assert dom.count("<tr ") == 4

    # The page itself may run no script; a copy that may tells what the browser has made of it, on a narrow screen.
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images];
        document.body.dataset.broken = images.filter(image => !(image.complete && image.naturalWidth)).length;
        document.body.dataset.images = images.length;
        document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
    })</script></body>"""
    page, num_policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    assert num_policies == 1
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", probe))
    dom = chromium(probed, "--window-size=500,900", "--dump-dom")
    found = {name: int(re.search(rf'data-{name}="(-?\d+)"', dom)[1]) for name in ("broken", "images", "overflow")}  # type: ignore[index]
    # Two curves, three reconstructions, one ranked list.
    assert found == {"broken": 0, "images": 6, "overflow": 0}


def test_a_screenshot_is_not_blank(run_dir: Path, tmp_path: Path, chromium: Callable[..., str]) -> None:
    report = write_report(run_dir)
    pixels = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={number}"
        chromium(report, "--window-size=1200,3600", settings, f"--screenshot={shot}")
        pixels[scheme] = np.asarray(Image.open(shot).convert("RGB"))
        assert pixels[scheme].shape == (3600, 1200, 3)
        assert len(np.unique(pixels[scheme].astype(np.int64) @ (1, 256, 65536))) > 200
        for colour, area in ((RECONSTRUCTION_COLOUR, 3 * 300 * 200), (RANKED_LIST_COLOUR, 700 * 300)):
            assert (pixels[scheme] == colour).all(axis=-1).sum() > area / 2
    assert pixels["light"][5, 5].min() > 200
    assert pixels["dark"][5, 5].max() < 60
