"""The `personmae` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import personmae
from personmae.configs import UserError, user_errors_exit

COMMANDS = {
    "demo": "draw the built-in data set, pre-train, evaluate, write a report",
    "pretrain": "pre-train on a folder of person crops (the same as torchrun personmae/pretrain.py, in one process)",
    "train": "TASK: holistic, occluded, usl or uda: train an encoder on a labelled set or without labels, score it, write a report",
    "evaluate": "retrieval scores of runs, encoder files or anyone's features on labelled sets",
    "pack": "pack a folder, list, zip, tar or LMDB of images into checked tar shards, for pre-training on millions",
    "crop": "cut person crops from frames or videos with given boxes (MOT, CSV, JSON)",
    "data": "check SET FOLDER: a labelled set against its published counts; names: the sets that are known",
    "extract": "features of a folder of images, into an .npz",
    "search": "the pictures of a gallery that show who a query shows; keeps an index of the gallery",
    "serve": "a local web page to search a gallery: drop a picture, browse results",
    "export": "CHECKPOINT --to transreid, fast-reid, torchreid, timm, onnx ...: weights for other code",
    "inspect": "FILE: what each code base would do with a file of weights",
    "verify-export": "CHECKPOINT --to transreid --repo CHECKOUT: builds the real class there, and compares features",
    "mannequins": "draw the built-in data set",
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
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: personmae COMMAND [flags]", "", *lines, "", "personmae COMMAND --help lists its flags"])


def _parse(config: Any, program: str, module: Any, arguments: list[str]) -> Any:
    """A config from flags; the module's docstring, its examples a line each, is the description."""
    import tyro

    # tyro joins the lines of a paragraph.
    description = "\n\n".join(line for line in (module.__doc__ or "").splitlines() if line.strip())
    return tyro.cli(config, prog=program, description=description, args=arguments)


def _run(command: str, arguments: list[str]) -> None:
    # Each command's modules are imported when it is called: --help must not wait for torch.
    program = f"personmae {command}"
    if command == "pretrain":
        from personmae import pretrain

        pretrain.main(pretrain.from_command_line(arguments, program))
    elif command == "demo":
        from personmae import demo
        from personmae.recipes.programs import DemoConfig

        demo.main(_parse(DemoConfig, program, demo, arguments))
    elif command == "train":
        _run_task(arguments)
    elif command == "evaluate":
        from personmae.recipes.programs import RetrievalConfig
        from personmae.tasks import retrieval

        retrieval.main(_parse(RetrievalConfig, program, retrieval, arguments))
    elif command == "data":
        _run_data(arguments)
    elif command == "pack":
        from personmae.recipes.programs import PackConfig
        from personmae.tasks import packing

        packing.main(_parse(PackConfig, program, packing, arguments))
    elif command == "crop":
        from personmae.recipes.programs import CropConfig
        from personmae.tasks import cropping

        cropping.main(_parse(CropConfig, program, cropping, arguments))
    elif command in ("export", "inspect", "verify-export"):
        _run_export(command, arguments)
    elif command in ("extract", "search", "serve"):
        _run_features(command, arguments)
    else:
        from personmae.recipes.programs import DrawConfig
        from personmae.tasks import drawing

        drawing.main(_parse(DrawConfig, program, drawing, arguments))


def _run_export(command: str, arguments: list[str]) -> None:
    from personmae.recipes.programs import ExportConfig, InspectConfig, VerifyConfig
    from personmae.tasks import exporting

    if command == "export":
        exporting.main(_parse(ExportConfig, "personmae export", exporting, arguments))
    elif command == "inspect":
        exporting.inspect(_parse(InspectConfig, "personmae inspect", exporting, arguments))
    else:
        exporting.verify(_parse(VerifyConfig, "personmae verify-export", exporting, arguments))


def _run_features(command: str, arguments: list[str]) -> None:
    from personmae.recipes.programs import ExtractConfig, SearchConfig, ServeConfig
    from personmae.tasks import extracting, searching, serving

    if command == "extract":
        extracting.main(_parse(ExtractConfig, "personmae extract", extracting, arguments))
    elif command == "serve":
        serving.main(_parse(ServeConfig, "personmae serve", serving, arguments))
    else:
        searching.main(_parse(SearchConfig, "personmae search", searching, arguments))


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
