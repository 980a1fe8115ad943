"""The commands and the Python of the docs run as they stand there; left out are blocks that need a checkout of other code or serve for ever."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personmae import cli
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What stands above a block that is not run: it needs other people's code, or does not end by itself.
LEFT_OUT = "<!-- (?:needs a checkout|serves until it is ended) -->"


def blocks(page):
    """(language, code) of the fenced blocks that are to be run."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(rf"({LEFT_OUT}\n)?```(\w+)\n(.*?)```", text, re.DOTALL)
    return [(match[2], match[3]) for match in found if not match[1]]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A run folder and two crops, under the names of the docs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs" / "small").mkdir(parents=True)
    encoder = VisionTransformer(ENCODERS["vit-small"])
    initialise(encoder, torch.Generator().manual_seed(0))
    save_encoder(tmp_path / "runs" / "small" / "encoder.safetensors", encoder, {"step": "1"})
    (tmp_path / "crops").mkdir()
    for name in "ab":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 256, (128, 64, 3), dtype=np.uint8)).save(tmp_path / "crops" / f"{name}.png")
    return tmp_path


def test_the_page_on_the_backbone(workplace):
    pytest.importorskip("onnxruntime")
    ran = 0
    for language, code in blocks("backbone.md"):
        if language == "python":
            exec(compile(code, "backbone.md", "exec"), {})
            ran += 1
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "personmae"
            cli.main(arguments)
            ran += 1
    assert ran >= 10
    assert (workplace / "small.onnx").exists()
    assert (workplace / "found.html").exists()
