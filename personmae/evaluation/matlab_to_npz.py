"""Turn a MATLAB file up to version 7 into a `.npz` of its numbers and texts: `python -P matlab_to_npz.py IN.mat OUT.npz`.

A program of its own, which imports nothing of personmae, because scipy's reader crashes with the whole process on some damaged files
(a type of data that does not exist, for one). Cells of texts become arrays of texts; what is neither numbers nor text is left out.
"""

from __future__ import annotations

import os
import sys
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

REFUSED = 3  # exit status; the reason stands on stdout


def convert(source: str, target: str) -> str | None:
    """Write the `.npz`. Returns why that cannot be, or None; damaged files end in any exception, or in a crash."""
    from scipy.io import loadmat, whosmat

    try:
        claims = whosmat(source)
    except NotImplementedError:
        return "it is a MATLAB file of version 7.3; save it with -v7, or give the arrays as .npz"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, shape, kind in claims:
        size = (4 if kind == "single" else 8) * int(np.prod([int(side) for side in shape], dtype=object))
        if size > memory:
            return f"{name} takes {size / 2**30:,.1f} GiB; this machine has {memory / 2**30:,.1f} GiB of memory"
    # Not by np.savez, to which a variable called `file` would be an argument.
    with zipfile.ZipFile(target, "w") as archive:
        for name, value in loadmat(source).items():
            array = None if name.startswith("__") else plain(value)
            if array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
    return None


def plain(value: Any) -> npt.NDArray[Any] | None:
    """An array of numbers or texts, or None."""
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        # A cell holds an array of its own; a matrix of characters comes padded with blanks.
        entries = [entry.ravel()[0] if isinstance(entry, np.ndarray) and entry.size == 1 else entry for entry in array.ravel().tolist()]
        if not all(isinstance(entry, str | bytes | int | float | np.number) for entry in entries):
            return None
        return np.array([str(entry).rstrip() for entry in entries], np.str_).reshape(array.shape)
    return array if array.dtype.kind in "biufc" else None


if __name__ == "__main__":
    reason = convert(sys.argv[1], sys.argv[2])
    if reason:
        print(reason)
        sys.exit(REFUSED)
