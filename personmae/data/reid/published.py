"""How many images, people and cameras each set has by its publishers: what `personmae data check` compares with.

People are counted as numbers in the labels, so the distractors of a gallery, all person 0, are one. Sources: the papers named in the readers;
Market-1501 and DukeMTMC-reID also their readmes (gallery without the 3,819 junk images: 19,732 - 3,819 = 15,913; Duke 702 people and 408 of one
camera alone); Occluded-Duke: Miao et al., ICCV 2019, with the lists of lightas/Occluded-DukeMTMC-Dataset; CUHK03-NP: zhunzhong07/person-re-ranking;
MSMT17: its lists (train 30,248 and val 2,373 images of the same 1,041 people); P-DukeMTMC-reID: Gao et al., "Pose-guided visible part matching", CVPR
2020; Partial-REID, Partial-iLIDS and Occluded-REID: the table of fast-reid's PartialReID; VIPeR, PRID-2011, GRID, CUHK01: the splits of torchreid
(GRID's gallery: 125 people and 775 distractors). The counts of P-DukeMTMC-reID and the cameras of all sets could not be checked against a source that
is at hand. None: not published, or different in each split.
"""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """Of one part; None where there is no one number."""

    images: int | None
    people: int | None
    cameras: int | None


_MARKET_TRAIN, _MARKET_QUERY = Counts(12_936, 751, 6), Counts(3_368, 750, 6)
_MSMT17_TEST = {"query": Counts(11_659, 3_060, 15), "gallery": Counts(82_161, 3_060, 15)}
_P_DUKE_TEST = {"query": Counts(2_163, 634, None), "gallery": Counts(9_053, 634, None)}
_CUHK03_CLASSIC = {"train": Counts(None, 1_367, 2), "query": Counts(None, 100, 2), "gallery": Counts(None, 100, 2)}

# Name of the set -> part -> counts. A part that is not named should be empty.
PUBLISHED: dict[str, dict[str, Counts]] = {
    "market1501": {"train": _MARKET_TRAIN, "query": _MARKET_QUERY, "gallery": Counts(15_913, 751, 6)},
    "market1501-500k": {"train": _MARKET_TRAIN, "query": _MARKET_QUERY, "gallery": Counts(None, 751, None)},
    "dukemtmc": {"train": Counts(16_522, 702, 8), "query": Counts(2_228, 702, 8), "gallery": Counts(17_661, 1_110, 8)},
    "occluded-duke": {"train": Counts(15_618, 702, 8), "query": Counts(2_210, 519, 8), "gallery": Counts(17_661, 1_110, 8)},
    "msmt17": {"train": Counts(30_248, 1_041, 15), **_MSMT17_TEST},
    "msmt17-trainval": {"train": Counts(32_621, 1_041, 15), **_MSMT17_TEST},
    "cuhk03-np-labelled": {"train": Counts(7_368, 767, 2), "query": Counts(1_400, 700, 2), "gallery": Counts(5_328, 700, 2)},
    "cuhk03-np-detected": {"train": Counts(7_365, 767, 2), "query": Counts(1_400, 700, 2), "gallery": Counts(5_332, 700, 2)},
    "cuhk03-classic-labelled": _CUHK03_CLASSIC,
    "cuhk03-classic-detected": _CUHK03_CLASSIC,
    "cuhk01": {"train": Counts(1_940, 485, 2), "query": Counts(972, 486, 1), "gallery": Counts(972, 486, 1)},
    "viper": {"train": Counts(632, 316, 2), "query": Counts(316, 316, 1), "gallery": Counts(316, 316, 1)},
    "prid2011": {"train": Counts(200, 100, 2), "query": Counts(100, 100, 1), "gallery": Counts(649, 649, 1)},
    "grid": {"train": Counts(250, 125, None), "query": Counts(125, 125, None), "gallery": Counts(900, 126, None)},
    "occluded-reid": {"query": Counts(1_000, 200, None), "gallery": Counts(1_000, 200, None)},
    "partial-reid": {"query": Counts(300, 60, None), "gallery": Counts(300, 60, None)},
    "partial-ilids": {"query": Counts(119, 119, None), "gallery": Counts(119, 119, None)},
    "p-dukemtmc": {"train": Counts(12_927, 665, None), **_P_DUKE_TEST},
    "p-dukemtmc-zero-shot": _P_DUKE_TEST,
}
NUM_LUPERSON = 4_180_243
