"""Every labelled set by name: where code bases keep it, how it is told from others, and who reads it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from personmae.configs import UserError
from personmae.data.reid import cuhk03, market, msmt17, pairs, tables
from personmae.data.reid import partial as partial_sets
from personmae.data.reid.luperson import find_database
from personmae.data.reid.published import PUBLISHED
from personmae.data.reid.sets import ReidSet
from personmae.data.reid.splits import check_number

MARKET_LAYOUT, TABLE, LUPERSON = "market-layout", "csv", "luperson"


@dataclass(frozen=True)
class Entry:
    """One set. holds: what its folder holds, in words. folders: where it lies below a root, as code bases name it; the first is where to put it.

    fits: does a folder hold it? read: (folder, split) -> the set. own_layout: a folder that fits can be no other set (variants of it apart).
    """

    description: str
    holds: str
    folders: tuple[str, ...]
    fits: Callable[[Path], bool]
    read: Callable[[Path, int], ReidSet]
    num_splits: int = 1
    own_layout: bool = True


def _market(description: str, *folders: str, with_distractors: bool = False) -> Entry:
    def read(root: Path, split: int) -> ReidSet:
        return market.read_market_layout(root, with_distractors=with_distractors)

    holds = "query, bounding_box_test and bounding_box_train" + (" and images" if with_distractors else "")
    return Entry(description, holds, folders, market.is_market_layout, read, own_layout=False)


def _msmt17(description: str, with_val: bool) -> Entry:
    holds = "train and test (V1), mask_train_v2 and mask_test_v2 (V2) with list_*.txt, or query and bounding_box_test (repacked)"
    folders = ("MSMT17_V1", "MSMT17_V2", "msmt17/MSMT17_V1", "msmt17/MSMT17_V2", "msmt17", "MSMT17")
    return Entry(description, holds, folders, msmt17.is_msmt17, lambda root, split: msmt17.read_msmt17(root, with_val=with_val))


def _cuhk03_classic(kind: cuhk03.Kind) -> Entry:
    def read(root: Path, split: int) -> ReidSet:
        return cuhk03.read_classic(root, kind, split)

    holds = f"images_{kind} and splits_classic_{kind}.json"
    fits = partial(cuhk03.is_classic, kind=kind)
    return Entry(f"CUHK03, {kind}, 20 classic splits", holds, ("cuhk03",), fits, read, cuhk03.NUM_CLASSIC_SPLITS)


def _cuhk03_new(kind: cuhk03.Kind) -> Entry:
    holds = f"query and bounding_box_test, or images_{kind} and splits_new_{kind}.json or cuhk03_new_protocol_config_{kind}.mat"
    folders = (f"cuhk03-np/{kind}", f"cuhk03_np/{kind}", f"CUHK03-NP/{kind}", f"cuhk03/{kind}", kind, "cuhk03")
    fits = partial(cuhk03.is_new, kind=kind)
    return Entry(f"CUHK03-NP, {kind} (767 and 700 people)", holds, folders, fits, lambda root, split: cuhk03.read_new(root, kind), own_layout=False)


def _camera_less(name: str, description: str, folders: tuple[str, ...], own: Callable[[Path], bool]) -> Entry:
    holds = "a folder of queries and one of whole bodies, or Probe.txt and Gallery.txt"

    def fits(root: Path) -> bool:
        return own(root) or (partial_sets.is_query_and_gallery(root) and not market.is_market_layout(root))

    return Entry(description, holds, folders, fits, lambda root, split: partial_sets.read_query_and_gallery(root, name))


def _p_duke(description: str, supervised: bool) -> Entry:
    holds = "train and test, each with occluded_body_images and whole_body_images"
    folders = ("P-DukeMTMC-reID", "p-dukemtmc-reid", "P-DukeMTMC", "P_DukeMTMC")
    return Entry(description, holds, folders, partial_sets.is_p_duke, lambda root, split: partial_sets.read_p_duke(root, supervised=supervised))


_MARKET_FOLDERS = ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501", "Market-1501", "Market1501", "Market")
_DUKE_FOLDERS = ("DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmcreid/DukeMTMC-reID", "dukemtmcreid", "dukemtmc-reid")
_OCCLUDED_DUKE_FOLDERS = ("Occluded_Duke", "dukemtmcreid/Occluded_Duke", "Occluded-DukeMTMC-reID", "Occluded-Duke", "occluded_duke")
_PARTIAL = {
    "occluded-reid": partial_sets.is_occluded_reid,
    "partial-reid": partial_sets.is_partial_reid,
    "partial-ilids": partial_sets.is_partial_ilids,
}
_PRID_FOLDERS = ("prid2011/prid_2011/single_shot", "prid_2011/single_shot", "single_shot", "prid2011/single_shot")
_GRID_FOLDERS = ("grid/underground_reid", "underground_reid", "grid")

ENTRIES: dict[str, Entry] = {
    "market1501": _market("Market-1501", *_MARKET_FOLDERS),
    "market1501-500k": _market("Market-1501 with 500,000 distractors", *_MARKET_FOLDERS, with_distractors=True),
    "dukemtmc": _market("DukeMTMC-reID", *_DUKE_FOLDERS),
    "occluded-duke": _market("Occluded-Duke", *_OCCLUDED_DUKE_FOLDERS),
    "msmt17": _msmt17("MSMT17 V1, V2 or repacked, trained on train alone (30,248 images)", with_val=False),
    "msmt17-trainval": _msmt17("the same, trained on train and val (32,621 images)", with_val=True),
    "cuhk03-np-labelled": _cuhk03_new("labeled"),
    "cuhk03-np-detected": _cuhk03_new("detected"),
    "cuhk03-classic-labelled": _cuhk03_classic("labeled"),
    "cuhk03-classic-detected": _cuhk03_classic("detected"),
    "cuhk01": Entry("CUHK01, 20 splits", "0001001.png", ("cuhk01/campus", "campus", "cuhk01", "CUHK01"), pairs.is_cuhk01, pairs.read_cuhk01, 20),
    "viper": Entry("VIPeR, 20 splits", "cam_a and cam_b", ("viper/VIPeR", "VIPeR", "viper"), pairs.is_viper, pairs.read_viper, 20),
    "prid2011": Entry("PRID-2011, single shot, 10 splits", "cam_a and cam_b", _PRID_FOLDERS, pairs.is_prid, pairs.read_prid, 10),
    "grid": Entry("GRID, 10 splits", "probe and gallery", _GRID_FOLDERS, pairs.is_grid, pairs.read_grid, 10),
    "occluded-reid": _camera_less("occluded-reid", "Occluded-REID", ("Occluded_REID", "OccludedREID", "Occluded-REID"), _PARTIAL["occluded-reid"]),
    "partial-reid": _camera_less(
        "partial-reid", "Partial-REID", ("Partial_REID", "PartialREID", "Partial-REID", "Partial-REID_Dataset"), _PARTIAL["partial-reid"]
    ),
    "partial-ilids": _camera_less(
        "partial-ilids", "Partial-iLIDS", ("Partial_iLIDS", "PartialiLIDS", "Partial-iLIDS", "Partial_iLIDS_Dataset"), _PARTIAL["partial-ilids"]
    ),
    "p-dukemtmc": _p_duke("P-DukeMTMC-reID, supervised: with its training part", supervised=True),
    "p-dukemtmc-zero-shot": _p_duke("P-DukeMTMC-reID, its test part alone", supervised=False),
    MARKET_LAYOUT: _market("any folder in Market-1501's layout"),
    TABLE: Entry("a CSV file: path, person, camera, split", "a CSV file", (), tables.is_table, lambda root, split: tables.read_table(root)),
}
# Names on the command line -> what each is.
REID_SETS: dict[str, str] = {name: entry.description for name, entry in ENTRIES.items()}
# Other spellings of the names above.
_ALIASES = {"market": "market1501", "market-1501": "market1501", "duke": "dukemtmc", "dukemtmcreid": "dukemtmc", "dukemtmc-reid": "dukemtmc"}
_ALIASES |= {"prid": "prid2011", "prid-2011": "prid2011", "p-duke": "p-dukemtmc", "p-dukemtmc-reid": "p-dukemtmc"}


def num_splits(name: str) -> int:
    """How many splits a set has by convention; results are means over all. Raises UserError for an unknown name."""
    return ENTRIES[known_name(name)].num_splits


def known_name(name: str) -> str:
    """The name as `REID_SETS` has it. Case, underscores and the American spelling do not matter. Raises UserError for an unknown one."""
    plain = name.strip().lower().replace("_", "-").replace("labeled", "labelled")
    plain = _ALIASES.get(plain, plain)
    if plain == LUPERSON:
        raise UserError("luperson has no query and gallery: pre-training takes it as --data.source; `personmae data check luperson` checks it")
    if plain not in ENTRIES:
        close = difflib.get_close_matches(plain, ENTRIES, 3, 0.5)
        raise UserError(f"unknown data set {name!r}{'; did you mean ' + ' or '.join(close) if close else ''}; there are: {', '.join(ENTRIES)}")
    return plain


def open_reid_set(name: str | None, root: Path, *, split: int = 0) -> ReidSet:
    """A labelled set by its name (see `REID_SETS`), in `root` or in a folder of it that known code bases use for it.

    name: None finds out what lies there, and says so in the notes. split: of those sets that have several (`num_splits`).

    Raises UserError if the set is not there (what was looked for, and where to put it), if several are, or if a file of it is not as it should be.
    """
    root = Path(root).expanduser()
    if name is not None:
        name = known_name(name)
    if not root.exists():
        similar = _similar(root.parent, [root.name])
        raise UserError(f"no such folder: {root}{similar}; data sets are not downloaded: put them there, or give another folder")
    name, folder, notes = (name, *_find(name, root)) if name is not None else _find_out(root)
    entry = ENTRIES[name]
    check_number(split, entry.num_splits, name)
    found = entry.read(folder, split)
    if name in PUBLISHED:
        found = replace(found, name=name)
    return replace(found, notes=(*notes, *found.notes))


def _find(name: str, root: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the set, and what to say of it."""
    entry = ENTRIES[name]
    if name == TABLE and root.is_dir():
        files = sorted(path for path in root.iterdir() if tables.is_table(path))
        if len(files) != 1:
            raise UserError(f"{root} holds {len(files)} CSV files; give the path of one")
        return files[0], ()
    if entry.fits(root):
        return root, ()
    found = _folders_that_fit(entry, root)
    if len(found) > 1:
        raise UserError(f"{root} holds {name} {len(found)} times: {', '.join(map(str, found))}; give the path of one")
    if found:
        return found[0], (f"{name} found in {found[0]}",)
    looked = f", nor do {', '.join(entry.folders)} in it" if entry.folders else ""
    where = f"put them into {root / entry.folders[0]}" if entry.folders else "give the path of one that does"
    names = [folder for path in entry.folders for folder in path.split("/")]
    raise UserError(f"{name} is not in {root}: it does not hold {entry.holds}{looked}; {where}{_similar(root, names)}; nothing is downloaded")


def _folders_that_fit(entry: Entry, root: Path) -> list[Path]:
    """Different folders of `root` that hold the set, without those that hold another of them."""
    found: dict[Path, Path] = {}
    for folder in entry.folders:
        path = root / folder
        if entry.fits(path):
            # On some systems, Market1501 and market1501 are one.
            found.setdefault(path.resolve(), path)
    return [path for path in found.values() if not any(other != path and other.is_relative_to(path) for other in found.values())]


def _find_out(root: Path) -> tuple[str, Path, tuple[str, ...]]:
    """(name, folder, notes) of the one set that lies in a folder."""
    if root.is_file():
        if not tables.is_table(root):
            raise UserError(f"{root} is neither a folder nor a CSV file with columns {', '.join(tables.COLUMNS)}")
        return TABLE, root, (f"{root} read as a CSV table",)
    own = [(name, root) for name, entry in ENTRIES.items() if entry.own_layout and entry.fits(root) and not market.is_market_layout(root)]
    own = _without_namesakes(own)
    if market.is_market_layout(root):
        own.append((MARKET_LAYOUT, root))
    if not own:
        below = [(name, folder) for name, entry in ENTRIES.items() if name != "market1501-500k" for folder in _folders_that_fit(entry, root)]
        own = [*_without_namesakes(below), *((TABLE, path) for path in sorted(root.glob("*.csv")))]
    if not own:
        hint = "; its data.mdb is LUPerson's LMDB, which has no query and gallery" if find_database(root) else ""
        raise UserError(
            f"{root} holds no data set that is known: neither query and bounding_box_test, nor MSMT17's lists, nor another set's folders{hint}; "
            f"name one of: {', '.join(ENTRIES)}"
        )
    if len(own) > 1:
        choices = ", ".join(name if folder == root else f"{name} in {folder}" for name, folder in own)
        raise UserError(f"{root} may be read as one of several sets; name it: {choices}")
    name, folder = own[0]
    return name, folder, (f"{folder} read as {name}: {REID_SETS[name]}",)


def _without_namesakes(found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Without the camera-less sets that fit by two folders alone, where their own layout says which one it is."""
    return [(name, folder) for name, folder in found if name not in _PARTIAL or _PARTIAL[name](folder) or not _is_told(folder)]


def _is_told(folder: Path) -> bool:
    return any(own(folder) for own in _PARTIAL.values()) or pairs.is_grid(folder)


def _similar(folder: Path, wanted: list[str]) -> str:
    """What to say of entries of a folder with names close to those wanted."""
    if not folder.is_dir():
        return ""
    present = {path.name.lower(): path.name for path in folder.iterdir() if not path.name.startswith(".")}
    close = {present[match]: None for name in wanted for match in difflib.get_close_matches(name.lower(), present, 3, 0.6)}
    return f" (there is {', '.join(list(close)[:3])})" if close else ""
