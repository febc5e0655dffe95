"""Every file of a run goes through here: where it is, its bytes, its checksum.

A place is a folder or a file of a run, on this machine (`tda.store.local`) or in object storage
(`tda.store.remote`); nothing outside this file asks which, but for readers of chunks and the lock,
who keep copies and leases. Whoever reads a file sees the old bytes or the new ones,
whole; what has been written is durable.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np

from tda.errors import ConfigError, StoreError
from tda.store import kept, local, remote
from tda.store.kept import beside
from tda.store.local import TMP, Parts, Stat, disk, write_apart
from tda.store.remote import SCHEMES, Remote

__all__ = ["TMP", "Parts", "Place", "Remote", "Stat", "as_place", "beside", "disk", "write_apart"]

Place: TypeAlias = Path | Remote
TRAILER = 4  # bytes of the crc32c that ends every chunk file (Zarr's codec "crc32c")


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli) of the bytes of ``data``."""
    return google_crc32c.value(data)


def to_json(value: Any) -> bytes:
    """``value`` as JSON: one spelling for one value (sorted keys, no NaN, a newline at the end)."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def seal(value: Mapping[str, Any]) -> bytes:
    """``value`` as JSON with one more key, ``crc32c``: of the JSON without it."""
    return to_json({**value, "crc32c": f"{crc32c(to_json(value)):08x}"})


def unseal(data: bytes) -> dict[str, Any] | None:
    """What :func:`seal` made ``data`` of, or None: then a byte of it is not as it was written."""
    try:
        value = json.loads(data)
        del value["crc32c"]
        return value if seal(value) == data else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def as_place(given: str | Place) -> Place:
    """The place a user names: a folder, s3://BUCKET/PREFIX, or PROFILE.toml/NAME.

    A storage profile is a TOML file of a ``url`` and, if need be, ``[options]``; see
    ``stores/README.md``. Raises ConfigError.
    """
    if isinstance(given, Remote):
        return given
    if not isinstance(given, str | os.PathLike) or given == "":
        raise ConfigError(
            "this names no place",
            found=repr(given),
            wanted="a folder, s3://BUCKET/PREFIX, or PROFILE.toml/NAME",
        )
    text = str(given)
    scheme = text.partition(":/")[0]
    if scheme in SCHEMES and isinstance(given, str):
        return Remote.parse(text)
    head, dot, rest = text.partition(".toml/")
    if dot and Path(f"{head}.toml").is_file():
        url, options = _profile(Path(f"{head}.toml"))
        if url.partition(":/")[0] in SCHEMES:
            return Remote.parse(f"{url}/{rest}", options)
        return Path(url).expanduser() / rest
    return Path(given)


def _profile(file: Path) -> tuple[str, dict[str, Any]]:
    with disk(file, "read"):
        text = file.read_text(encoding="utf-8")
    try:
        profile = tomllib.loads(text)
        url, options = profile.pop("url"), profile.pop("options", {})
    except (ValueError, KeyError) as error:
        raise ConfigError("this is no storage profile", where=file, found=error) from error
    if profile or not isinstance(url, str) or not isinstance(options, dict):
        raise ConfigError(
            "this is no storage profile",
            where=file,
            found=", ".join(profile) or repr(url),
            wanted='url = "s3://BUCKET/PREFIX" and perhaps [options]',
        )
    return url, options


def stat_file(place: Place) -> Stat | None:
    """Size and stamp of a file, or None if there is none. Raises StoreError."""
    return remote.stat(place) if isinstance(place, Remote) else local.stat(place)


def list_files(folder: Place) -> dict[str, Stat]:
    """Every file below a folder by its key (relative, with /), sorted. Raises StoreError."""
    found = remote.walk(folder) if isinstance(folder, Remote) else local.walk(folder)
    return dict(sorted(found))


def list_folders(folder: Place) -> list[str]:
    """Names of the folders in a folder that hold something, sorted. Raises StoreError."""
    found = remote.folders(folder) if isinstance(folder, Remote) else local.folders(folder)
    return sorted(found)


def read_file(place: Place, most: int | None = None) -> bytes | None:
    """The bytes of a file, or None if there is none. Raises StoreError, also for more than most."""
    if isinstance(place, Remote):
        found = stat_file(place)
        if found is not None and most is not None and found.size > most:
            raise _too_large(place, found.size, most)
        return None if found is None else read_files(place.parent, {place.name: found})[place.name]
    with disk(place, "read"):
        try:
            return local.read(place, most)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def read_files(folder: Place, listed: Mapping[str, Stat]) -> dict[str, bytes | None]:
    """The bytes of small files as they were listed; of remote ones only those that are new here."""
    if isinstance(folder, Path):
        return {key: read_file(folder / key) for key in listed}
    found = {key: kept.read(folder / key, stat.stamp) for key, stat in listed.items()}
    new = [key for key, data in found.items() if data is None]
    answers = remote.get_many([folder / key for key in new])
    for key, answer in zip(new, answers, strict=True):
        if answer is not None:
            data = found[key] = bytes(answer[0])
            kept.write(folder / key, answer[1].stamp, data)
    return found


def map_file(place: Place) -> np.ndarray | None:
    """The bytes of a file as it lies there, or None if there is none. Raises StoreError."""
    if isinstance(place, Remote):
        found = remote.get(place)
        return None if found is None else np.frombuffer(found[0], np.uint8)
    with disk(place, "read"):
        try:
            return local.map_file(place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def is_writable(folder: Place) -> bool:
    """Whether files of a folder may be replaced, as far as can be told beforehand."""
    return isinstance(folder, Remote) or os.access(folder, os.W_OK)


def require_plain(run: Place) -> None:
    """Raises StoreError if anything in a run is a link to somewhere else."""
    if not isinstance(run, Remote):
        local.require_plain(run)


def _too_large(place: Place, size: int, most: int) -> StoreError:
    return StoreError(
        "this file is far too large for what it is",
        where=place,
        found=f"{size} bytes",
        wanted=f"{most} bytes at the most",
        do="restore it from a copy",
    )


def write_files(folder: Place, files: Iterable[tuple[str, Parts | None]]) -> None:
    """Make each file ``folder / key`` hold its parts, one after the other; durable on return.

    None: the file is there already, make sure of it. Raises StoreError.
    """
    if isinstance(folder, Remote):
        remote.write(folder, files)
    else:
        local.write(folder, files)


def put_files(
    folder: Place,
    files: Iterable[tuple[str, Parts | None]],
    mark: str,
    content: Callable[[], bytes],
) -> Callable[[], None]:
    """Write files, and a mark that vouches for them, so that a killed process leaves them whole.

    Returns what finishes them: a mark from before is taken away, the files are made durable under
    their names, then the mark. content: of the mark, asked for after the last of the files. An
    object has no unfinished name: there all is done at once. Raises StoreError.
    """
    if not isinstance(folder, Path):
        remove_file(folder / mark)
        remote.write(folder, files)
        create_file(folder / mark, content())
        return lambda: None
    finish = local.put(folder, files, ((mark, (content(),)) for _ in range(1)))

    def finish_all() -> None:
        remove_file(folder / mark)
        finish()

    return finish_all


def write_file(place: Place, data: bytes) -> None:
    """Make ``place`` hold ``data``; durable on return. Raises StoreError."""
    write_files(place.parent, [(place.name, (data,))])


def create_file(place: Place, data: bytes) -> None:
    """Make ``place`` hold ``data``, which nobody else may have made hold something else.

    Two that write the same at once are one. Raises StoreError.
    """
    if isinstance(place, Path):
        write_file(place, data)
    elif remote.put(place, data, "create") is None and read_file(place) != data:
        raise StoreError(
            "another process has written this file meanwhile",
            where=place,
            do="let one process at a time write a run, then run the same command again",
        )


def extend_file(place: Place, more: Callable[[bytes], bytes]) -> None:
    """Put ``more(content)`` after the last whole line of a file; durable on return.

    The content is what it is followed by, whoever else extends it at once. Raises StoreError,
    and what ``more`` raises.
    """
    if isinstance(place, Path):
        local.extend(place, more)
        return
    tried = None
    while True:
        found = remote.get(place)
        data = b"" if found is None else bytes(found[0])
        if tried is not None and data.startswith(tried):
            return  # it was written, and the answer was lost
        whole = data[: data.rfind(b"\n") + 1]
        mode = "create" if found is None else found[1].stamp
        tried = whole + more(whole)
        if remote.put(place, tried, mode) is not None:
            return


def remove_file(place: Place) -> None:
    """Delete a file if it is there; durable on return. Raises StoreError."""
    if isinstance(place, Remote):
        remote.remove(place)
    else:
        local.remove(place)


def adopt_files(folder: Path, there: Mapping[str, str], mark: str, unfinished: str) -> None:
    """Finish what :func:`put_files` put: ``there`` tells by key where each file lies."""
    lying = {folder / key: folder / name for key, name in there.items()}
    remove_file(folder / mark)
    local.finish(folder, [lying, {folder / mark: folder / unfinished}])


def remove_unfinished(folder: Path) -> None:
    """What killed writers left anywhere in a folder. Raises StoreError."""
    local.remove_unfinished(folder)


def remove_tree(folder: Place) -> None:
    """Delete a folder and all in it, if it is there. Raises StoreError."""
    if isinstance(folder, Remote):
        remote.remove_tree(folder)
    else:
        local.remove_tree(folder)
