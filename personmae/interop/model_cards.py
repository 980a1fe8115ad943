"""The page beside an exported file: what it is, how it is loaded, what it may be used for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from personmae.interop.exports import GraphName, how_to_load
from personmae.whole_files import write_whole

USE = """\
## Intended use, limits, law

These weights describe pictures of people so that pictures of the same person can be found again across cameras. That is surveillance technology.

- Meant for research, for tests on data whose people have agreed to it, and for search in one's own archives where the law allows it.
- Not meant for finding out who somebody is, for following people without a legal basis, for decisions about people without a human who checks them.
- A score is no proof: different people in similar clothes are confused, and the same person in other clothes is missed. Accuracy differs between
  groups of people as the training pictures do; measure it on your own before anything depends on it.
- In the European Union such features can be personal or biometric data (GDPR), and remote biometric identification is restricted (AI Act); other
  countries have laws of their own. Published ReID data sets are for research only, and weights trained on them inherit that.
"""


def write_model_card(path: Path, card: Mapping[str, Any]) -> Path:
    """Write the card of an exported file beside it, as NAME.md; returns its path. Raises UserError if the disk refuses."""
    page = path.with_name(path.name + ".md")
    write_whole(page, model_card(path, card))
    return page


def model_card(path: Path, card: Mapping[str, Any]) -> str:
    """The card as Markdown. card: of `export_state`."""
    config, notes = card["config"], card["notes"]
    height, width = config["image_size"]
    rows, columns = card["grid"]
    mean, std = (", ".join(f"{value:g}" for value in config[name]) for name in ("mean", "std"))
    is_graph = card["target"] in get_args(GraphName)
    facts = {
        "network": f"{card['encoder']}: {config['width']} channels, {config['depth']} blocks, {config['num_heads']} heads",
        "patches": f"{config['patch_px']} pixels, {card['stride_px']} from one to the next",
        "images": f"{height} x {width} pixels (height x width), RGB; {rows} x {columns} patches",
        "normalisation": "inside: the images are uint8" if is_graph else f"mean {mean}, std {std}, on the scale [0, 1]" + _folded(card),
        "positions": "learned" if card["learned_positions"] else "sines and cosines, fixed in training",
        "made for": card["target"],
        "made from": f"{card['source']} ({card['family']})",
        **{_words(name): note for name, note in notes.items()},
        "exported by": f"personmae {card['personmae']}, commit {card['commit']}",
    }
    if card["left_out"]:
        facts["left out"] = f"{len(card['left_out'])} tensors beside the encoder, as {card['left_out'][0]}"
    if not notes:
        facts["training data"] = "not told by the file"
    lines = [f"# {path.name}", "", *(f"- {name}: {value}" for name, value in facts.items()), "", "## How to load it", ""]
    lines += [f"    {line}" for line in how_to_load(path, card)]
    return "\n".join([*lines, "", USE])


def _folded(card: Mapping[str, Any]) -> str:
    own = card["trained_with"]
    same = own["mean"] == list(card["config"]["mean"]) and own["std"] == list(card["config"]["std"])
    return "" if same else "; folded into the patch embedding, the weights were trained with " + ", ".join(f"{value:g}" for value in own["mean"])


def _words(name: str) -> str:
    return {"data": "training data", "commit": "trained by commit"}.get(name, name)
