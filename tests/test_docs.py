"""The commands and the Python of the docs run as they stand there; left out are blocks that need a checkout of other code or serve for ever."""

import importlib
import re
import shlex
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personmae import cli, pretrain
from personmae.configs import UserError
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted(DOCS.glob("*.md"))]
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


def commands():
    """(page, words) of every command of ours in the README and the docs, lines that end in a backslash joined."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8"))
        for line in text.splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"(personmae [a-z]|torchrun |srun .*torchrun |python benchmarks/)", line) and not line.endswith(("…", "...")):
                # What follows two spaces is said, not typed.
                found.append((page.name, shlex.split(re.split(r"\s{2,}|\s# ", line)[0])))
    return found


class Parsed(Exception):
    """A command was understood."""


@pytest.fixture
def nothing_runs(monkeypatch):
    """Every program of `personmae` ends where its settings are known."""

    def end(*_, **__):
        raise Parsed

    names = ["retrieval", "drawing", "packing", "cropping", "data_check", "extracting", "searching", "serving", "exporting", *cli.TASKS]
    modules = [importlib.import_module(f"personmae.tasks.{name}") for name in names]
    for module in [*modules, pretrain, importlib.import_module("personmae.demo")]:
        for function in ("main", "verify", "inspect"):
            if isinstance(getattr(module, function, None), types.FunctionType):
                monkeypatch.setattr(module, function, end)


def test_every_command_of_the_docs_is_understood(nothing_runs, capsys):
    """By the parser of its program: a flag that is gone, or a value of another kind, would be told."""
    kinds = set()
    for page, words in commands():
        if words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            missing = [word for word in words[2:] if word.startswith("--") and word != "--" and f'"{word}"' not in source and "--" not in words[2:]]
            assert not missing, (page, words)
            kinds.add("benchmark")
            continue
        if words[0] != "personmae":
            place = next(number for number, word in enumerate(words) if word.endswith(".py"))
            program = Path(words[place]).stem
            words = ["personmae", *(["pretrain"] if program == "pretrain" else ["train", program]), *words[place + 1 :]]
        try:
            cli.main(words[1:])
        except Parsed:
            kinds.add(words[1])
        except (SystemExit, UserError) as error:
            pytest.fail(f"{page}: {' '.join(words)}: {error} {capsys.readouterr()}")
    assert kinds >= {"pretrain", "train", "evaluate", "pack", "crop", "export", "inspect", "extract", "search", "serve", "mannequins", "benchmark"}


def test_every_link_between_the_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert not target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_extending(workplace):
    for language, code in blocks("extending.md"):
        assert language == "python"
        exec(compile(code, "extending.md", "exec"), {})
