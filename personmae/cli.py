"""The `personmae` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from personmae.configs import UserError, user_errors_exit

COMMANDS = {
    "demo": "draw the built-in data set, pre-train, evaluate, write a report",
    "pretrain": "pre-train on a folder of person crops (the same as torchrun personmae/pretrain.py, in one process)",
    "evaluate": "retrieval scores of runs, encoder files or anyone's features on labelled sets",
    "pack": "pack a folder, list, zip, tar or LMDB of images into checked tar shards, for pre-training on millions",
    "crop": "cut person crops from frames or videos with given boxes (MOT, CSV, JSON)",
    "data": "check SET FOLDER: a labelled set against its published counts; names: the sets that are known",
    "mannequins": "draw the built-in data set",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand. An unknown one, like any mistake of the user's, is told in a sentence and exits with 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    with user_errors_exit():
        _run(command, rest)


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: personmae COMMAND [flags]", "", *lines, "", "personmae COMMAND --help lists its flags"])


def _run(command: str, arguments: list[str]) -> None:
    # Each command's modules are imported when it is called: --help must not wait for torch.
    import tyro

    program = f"personmae {command}"
    if command == "pretrain":
        from personmae import pretrain

        pretrain.main(pretrain.from_command_line(arguments, program))
    elif command == "demo":
        from personmae import demo
        from personmae.recipes import DemoConfig

        demo.main(tyro.cli(DemoConfig, prog=program, description=demo.__doc__, args=arguments))
    elif command == "evaluate":
        from personmae.recipes import RetrievalConfig
        from personmae.tasks import retrieval

        retrieval.main(tyro.cli(RetrievalConfig, prog=program, description=retrieval.__doc__, args=arguments))
    elif command == "data":
        _run_data(arguments)
    elif command == "pack":
        from personmae.recipes import PackConfig
        from personmae.tasks import packing

        packing.main(tyro.cli(PackConfig, prog=program, description=packing.__doc__, args=arguments))
    elif command == "crop":
        from personmae.recipes import CropConfig
        from personmae.tasks import cropping

        cropping.main(tyro.cli(CropConfig, prog=program, description=cropping.__doc__, args=arguments))
    else:
        from personmae.recipes import DrawConfig
        from personmae.tasks import drawing

        drawing.main(tyro.cli(DrawConfig, prog=program, description=drawing.__doc__, args=arguments))


def _run_data(arguments: list[str]) -> None:
    import tyro

    what, rest = arguments[:1], arguments[1:]
    if what == ["names"]:
        from personmae.data.reid import REID_SETS

        width = max(map(len, REID_SETS))
        print("\n".join(f"{name:{width}}  {description}" for name, description in REID_SETS.items()))
    elif what == ["check"]:
        from personmae.recipes import DataCheckConfig
        from personmae.tasks import data_check

        config = tyro.cli(DataCheckConfig, prog="personmae data check", description=data_check.__doc__, args=rest)
        raise SystemExit(data_check.main(config))
    else:
        raise UserError(f"data {' '.join(what) or 'alone'} is no command; there are: data check SET FOLDER, data names")
