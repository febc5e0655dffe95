"""An ``.npz`` that may come from anywhere: read without trusting what it says of itself."""

from __future__ import annotations

import io
import math
import zipfile
from typing import IO

import numpy as np
from numpy.lib import format as npy


def read_npz(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed ``.npz``, which together are no larger than it is.

    Raises ValueError for a compressed or damaged one, for objects, and for an array that claims
    more than the file holds: `np.load` would allocate what is claimed.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its arrays are larger than the file")
            return {
                entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries
            }
    except ValueError:
        raise
    except Exception as error:  # headers are parsed as Python's, by a parser of many exceptions
        raise ValueError(f"no .npz of numbers: {error}"[:200]) from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    name = entry.filename[:80]
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name!r} is compressed")
    with archive.open(entry) as content:
        if npy.read_magic(content) != (1, 0):
            raise ValueError(f"{name!r} is of another version")
        shape, fortran, dtype = npy.read_array_header_1_0(content)
        body = entry.file_size - content.tell()
        claimed = dtype.itemsize * math.prod(shape)
        if dtype.hasobject or not dtype.itemsize or claimed != body or min(shape, default=0) < 0:
            raise ValueError(f"{name!r} does not hold {shape} {dtype}")
        values = np.empty(math.prod(shape), dtype)
        view, done = values.view(np.uint8).data, 0
        while done < body and (count := content.readinto(view[done:])):  # type: ignore[attr-defined]
            done += count
        if done < body or content.read(1):
            raise ValueError(f"{name!r} is cut short")
    return values.reshape(shape, order="F" if fortran else "C")
