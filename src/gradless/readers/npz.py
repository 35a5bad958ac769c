"""Arrays of a .npz file. Their sizes are checked before they are unpacked, and nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradless.errors import GradlessError
from gradless.readers.sentences import said

SPARE, RATIO = 256 << 20, 32
"""The arrays of a file may take `SPARE` bytes plus `RATIO` times the size of the file."""
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """The named arrays of a file.

    Raises:
        GradlessError: the file is no .npz, lacks an array, or unpacks to more than its size allows.
    """
    what = f"{path} is no .npz with arrays {' and '.join(f'`{name}`' for name in names)}"
    try:
        with zipfile.ZipFile(path) as archive:
            if len(set(archive.namelist())) != len(archive.namelist()):
                raise GradlessError(f"{what}: it holds a name twice.")
            members = [archive.getinfo(f"{name}.npy") for name in names]
            size, most = sum(member.file_size for member in members), SPARE + RATIO * path.stat().st_size
            if size > most:
                raise GradlessError(
                    f"{path} unpacks to {size:,} bytes; a file of its size may unpack to {most:,} at most. Make it again."
                )
            return {name: _array(archive, member) for name, member in zip(names, members, strict=True)}
    except GradlessError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise about ten kinds
        raise GradlessError(f"{what}: {said(error)}.") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[np.generic]:
    if member.compress_type not in PACKINGS:
        raise ValueError(f"{member.filename} is packed in a way that numpy does not write")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"{member.filename} is of version {version}")
        shape, columns_first, dtype = read[version](stream)  # type: ignore[no-untyped-call]
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which are not unpickled")
        held = stream.read()
        if min(shape, default=0) < 0 or len(held) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{member.filename} has {len(held)} bytes for the shape {shape} of {dtype}")
    return np.frombuffer(bytearray(held), dtype).reshape(shape, order="F" if columns_first else "C")
