"""Labelled ReID sets in every layout they come in. One call, `open_reid_set(name, root)`; nothing is ever downloaded."""

from personmae.data.reid.catalogue import REID_SETS, num_splits, open_reid_set
from personmae.data.reid.market import read_market_layout
from personmae.data.reid.sets import ReidSet

__all__ = ["REID_SETS", "ReidSet", "num_splits", "open_reid_set", "read_market_layout"]
