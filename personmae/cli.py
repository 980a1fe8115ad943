"""The `personmae` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import personmae
from personmae.configs import UserError, user_errors_exit


class Command(NamedTuple):
    """A subcommand. Its modules are imported when it is called: --help must not wait for torch."""

    entry: str | None  # MODULE:FUNCTION, called with the config; None: it has subcommands of its own
    config: str | None  # of personmae.recipes.programs, made from the flags; None: the module makes its own from them
    what: str  # it does, in a line


COMMANDS = {
    "demo": Command("demo:main", "DemoConfig", "draw the built-in data set, pre-train, evaluate, write a report"),
    "pretrain": Command("pretrain:main", None, "pre-train on a folder of person crops (the same as torchrun personmae/pretrain.py, in one process)"),
    "train": Command(
        None, None, "TASK: holistic, occluded, usl or uda: train an encoder on a labelled set or without labels, score it, write a report"
    ),
    "evaluate": Command("tasks.retrieval:main", "RetrievalConfig", "retrieval scores of runs, encoder files or anyone's features on labelled sets"),
    "pack": Command(
        "tasks.packing:main", "PackConfig", "pack a folder, list, zip, tar or LMDB of images into checked tar shards, for pre-training on millions"
    ),
    "crop": Command("tasks.cropping:main", "CropConfig", "cut person crops from frames or videos with given boxes (MOT, CSV, JSON)"),
    "data": Command(None, None, "check SET FOLDER: a labelled set against its published counts; names: the sets that are known"),
    "extract": Command("tasks.extracting:main", "ExtractConfig", "features of a folder of images, into an .npz"),
    "search": Command(
        "tasks.searching:main", "SearchConfig", "the pictures of a gallery that show who a query shows; keeps an index of the gallery"
    ),
    "serve": Command("tasks.serving:main", "ServeConfig", "a local web page to search a gallery: drop a picture, browse results"),
    "export": Command(
        "tasks.exporting:main", "ExportConfig", "CHECKPOINT --to transreid, fast-reid, torchreid, timm, onnx ...: weights for other code"
    ),
    "inspect": Command("tasks.exporting:inspect", "InspectConfig", "FILE: what each code base would do with a file of weights"),
    "verify-export": Command(
        "tasks.exporting:verify", "VerifyConfig", "CHECKPOINT --to transreid --repo CHECKOUT: builds the real class there, and compares features"
    ),
    "mannequins": Command("tasks.drawing:main", "DrawConfig", "draw the built-in data set"),
}
TASKS = ("holistic", "occluded", "usl", "uda")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand. An unknown one, like any mistake of the user's, is told in a sentence and exits with 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] == "--version":
        print(f"personmae {personmae.__version__}")
        return
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with user_errors_exit():
            _run(command, rest)
    except BrokenPipeError:
        # The reader of the output (as `| head`) has seen enough; nothing can be told any more, not even at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.what}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: personmae COMMAND [flags]", "", *lines, "", "personmae COMMAND --help lists its flags"])


def _parse(config: Any, program: str, module: Any, arguments: list[str]) -> Any:
    """A config from flags; the module's docstring, its examples a line each, is the description."""
    import tyro

    # tyro joins the lines of a paragraph.
    description = "\n\n".join(line for line in (module.__doc__ or "").splitlines() if line.strip())
    return tyro.cli(config, prog=program, description=description, args=arguments)


def _run(name: str, arguments: list[str]) -> None:
    command, program = COMMANDS[name], f"personmae {name}"
    if command.entry is None:
        {"train": _run_task, "data": _run_data}[name](arguments)
        return
    place, _, function = command.entry.partition(":")
    module = importlib.import_module(f"personmae.{place}")
    if command.config is None:
        config = module.from_command_line(arguments, program)
    else:
        config = _parse(getattr(importlib.import_module("personmae.recipes.programs"), command.config), program, module, arguments)
    getattr(module, function)(config)


def _run_task(arguments: list[str]) -> None:
    task, rest = " ".join(arguments[:1]), arguments[1:]
    if task in TASKS:
        module = importlib.import_module(f"personmae.tasks.{task}")
        module.main(module.from_command_line(rest, f"personmae train {task}"))
    elif task in ("-h", "--help"):
        print(f"usage: personmae train {'|'.join(TASKS)} PRESET [flags]\n\npersonmae train holistic --help lists presets and flags")
    else:
        raise UserError(f"train {task or 'alone'} is no command; there are: {', '.join(f'train {name}' for name in TASKS)}")


def _run_data(arguments: list[str]) -> None:
    what, rest = arguments[:1], arguments[1:]
    if what == ["names"]:
        from personmae.data.reid import REID_SETS

        width = max(map(len, REID_SETS))
        print("\n".join(f"{name:{width}}  {description}" for name, description in REID_SETS.items()))
        print("\n`data check` also takes luperson (no query, no gallery) and auto (finds out which set it is).")
    elif what == ["check"]:
        from personmae.recipes.programs import DataCheckConfig
        from personmae.tasks import data_check

        raise SystemExit(data_check.main(_parse(DataCheckConfig, "personmae data check", data_check, rest)))
    elif what and what[0] in ("-h", "--help"):
        print("usage: personmae data check SET FOLDER [flags]\n       personmae data names")
    else:
        raise UserError(f"data {' '.join(what) or 'alone'} is no command; there are: data check SET FOLDER, data names")
