"""MATLAB files of splits, by SciPy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from personmae.configs import UserError


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """These variables of a .mat file (version 7.2 and before; SciPy reads no 7.3).

    Raises UserError if the file cannot be read or lacks one of them.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=list(names))
    except (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, struct.error, zlib.error, MatReadError) as error:
        raise UserError(f"{path} cannot be read as a MATLAB file (5.0 to 7.2): {error}") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{path} has no variable {missing[0]!r}")
    return {name: content[name] for name in names}
