"""Ways to be hostile to a run: each makes one input of it, a function of the random numbers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.sound import Sound

from tda.store.files import crc32c, seal

LOG = "actions/marks.jsonl"
POOL: list[Any] = [
    -1, 0, 1, 2, 7, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, True, False, None, "", "..", ".",
    "../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "rows/../../x", "\0", "0-99999999999999",
    "x" * 100_000, [], {}, [[]], [0], [1, 2, 3], {"a": 1}, "float64", "object", "bfloat16", "V8",
    "<f8", "|O", "train", "c", [2**40, 2**40], [2**62], [1] * 1000,
]  # fmt: skip


@dataclass
class Input:
    """One hostile run: what was done to which files, and whether it was sealed anew."""

    kind: str
    keys: set[str]
    sealed: bool
    what: str
    write: Callable[[], None]


def torn(sound: Sound, chance: random.Random) -> Input:
    """Bytes changed, cut off, put in, taken from elsewhere; files gone or exchanged."""
    key = chance.choice([key for key in sound.files if key != "cache"])
    data, way = bytearray(sound.files[key]), chance.randrange(9)
    at = chance.randrange(len(data) + 1)
    other = bytes(sound.files[chance.choice(list(sound.files))])
    if way < 4:
        for _ in range(chance.choice([1, 1, 2, 5])):
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    elif way == 4:
        del data[at:]  # at the end of a line, the end of a log is gone without a trace
        if key == LOG and data.endswith(b"\n"):
            data.append(0)
    elif way == 5:
        data[at:at] = chance.randbytes(chance.choice([1, 4, 4096]))
    elif way == 6:
        data[:] = other
    elif way == 7:
        del data[at : at + chance.choice([1, 4, 64])]
    place = sound.path / key
    if way == 8:
        return Input("torn", {key}, False, f"{key} gone", place.unlink)
    return Input("torn", {key}, False, f"{key} way {way}", lambda: _put(place, bytes(data)))


def lie(sound: Sound, chance: random.Random) -> Input:
    """A manifest, mark or Zarr document that says something absurd, sealed anew."""
    documents = [key for key in sound.files if key.endswith(".json") and "results" not in key]
    key = chance.choice(documents)
    value = json.loads(sound.files[key])
    what = ""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        what += "; " + _absurd(value, chance)
    if key.endswith("zarr.json"):
        return _remarked(sound, key, json.dumps(value).encode(), what)
    value.pop("crc32c", None) if isinstance(value, dict) else None
    place, data = sound.path / key, _sealed(value)
    return Input("lie", {key}, True, key + what, lambda: _put(place, data))


def _absurd(value: Any, chance: random.Random) -> str:
    """Change one thing in a JSON value; says what."""
    path: list[str] = []
    while True:
        inner = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not inner:
            if isinstance(value, list):
                value.append(deepcopy(chance.choice(POOL)))
            else:
                value["new"] = deepcopy(chance.choice(POOL))
            return f"{'.'.join(path)} filled"
        pick = chance.choice(inner)
        path.append(str(pick))
        deeper = isinstance(value[pick], dict | list) and len(value[pick]) > 0
        if deeper and chance.random() < 0.85:
            value = value[pick]
            continue
        way = chance.randrange(8)
        if way == 0:
            del value[pick]
        elif way == 1 and isinstance(value, dict):
            value[chance.choice([x for x in POOL if isinstance(x, str)])] = value.pop(pick)
        elif way == 2 and type(value[pick]) is int:
            value[pick] += chance.choice([-1, 1, 4, 1000])
        elif way == 3 and isinstance(value[pick], str) and value[pick]:
            at = chance.randrange(len(value[pick]))
            value[pick] = value[pick][:at] + chance.choice("0a9/. -") + value[pick][at + 1 :]
        else:
            value[pick] = deepcopy(chance.choice(POOL))
        return f"{'.'.join(path)} way {way}"


def _sealed(value: Any) -> bytes:
    try:
        return seal(value)
    except (TypeError, ValueError):
        return json.dumps(value).encode()


def _remarked(sound: Sound, key: str, document: bytes, what: str) -> Input:
    """A document, with the mark that vouches for it made to fit."""
    folder = key.partition("/")[0]
    if folder in ("queries", "evaluate"):
        folder = "/".join(key.split("/")[:2])
    mark_key, inner = f"{folder}/done/static.json", key[len(folder) + 1 :]
    mark = json.loads(sound.files[mark_key])
    mark.pop("crc32c")
    mark["files"][inner] = {"size": len(document), "crc32c": f"{crc32c(document):08x}"}

    def write() -> None:
        _put(sound.path / key, document)
        _put(sound.path / mark_key, seal(mark))

    return Input("lie", {key, mark_key}, True, key + what, write)


def link(sound: Sound, chance: random.Random) -> Input:
    """Links, pipes, devices and folders where files should be, and the other way round."""
    keys = [key for key in sound.files if key != "cache"]
    key = chance.choice(keys)
    way = chance.randrange(6)
    if way in (3, 4):  # a folder on the way
        parts = key.split("/")
        key = "/".join(parts[: chance.randint(1, max(1, len(parts) - 1))])
        inside = {k for k in keys if k == key or k.startswith(key + "/")}
    else:
        inside = {key}
    place, outside = sound.path / key, sound.outside

    def write() -> None:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        if way == 0:
            place.symlink_to(outside / "secret")
        elif way == 1:
            os.mkfifo(place)
        elif way == 2:
            place.symlink_to("/dev/zero")
        elif way == 3:
            place.symlink_to(outside)
        elif way == 4:
            place.symlink_to(place.name)  # to itself
        else:
            place.mkdir()

    return Input("link", {key, *inside}, False, f"{key} way {way}", write)


def bomb(sound: Sound, chance: random.Random) -> Input:
    """Bases that swell, and documents without end; the manifest vouches for them."""
    way = chance.randrange(6)
    if way >= 4:
        key = chance.choice([k for k in sound.files if k.endswith(".json")])
        ends = [b"[" * 10**6, b'{"a":' * 10**6, b"[]," * 10**6 + b"[]", b"9" * 10**6, b" " * 10**6]
        data = chance.choice(ends)
        if way == 5 and chance.random() < 0.02:
            data = b" " * (33 * 2**20)
        return Input(
            "bomb", {key}, False, f"{key} {data[:5]!r}", lambda: _put(sound.path / key, data)
        )
    data = _archive(way, chance, sound.files["projection.npz"])
    manifest = json.loads(sound.files["manifest.json"])
    manifest.pop("crc32c")
    manifest["projection"]["bases_digest"] = hashlib.blake2b(data, digest_size=16).hexdigest()

    def write() -> None:
        _put(sound.path / "projection.npz", data)
        _put(sound.path / "manifest.json", seal(manifest))

    return Input("bomb", {"projection.npz", "manifest.json"}, True, f"bases way {way}", write)


def _archive(way: int, chance: random.Random, honest: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(honest)) as known, zipfile.ZipFile(out, "w") as made:
        for entry in known.infolist():
            content = known.read(entry)
            if way == 0:
                made.writestr(entry.filename, content[:128] + b"\0" * 10**6, zipfile.ZIP_DEFLATED)
            elif way == 1:  # a header that claims more than there is
                shape = chance.choice(
                    ["(1000000000000,)", "(-1,)", "(2, -3)", "(99999, 99999)", "()"]
                )
                header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
                made.writestr(entry.filename, _npy(header))
            elif way == 2:  # objects, strings, records
                kind = chance.choice(["|O", "<U9", "|V0", "[('a', '<f4')]", "<f16", "x"])
                header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': (3,), }}"
                made.writestr(entry.filename, _npy(header) + b"\0" * 12)
            else:
                cut = bytearray(content)
                cut[chance.randrange(len(cut))] ^= chance.randrange(1, 256)
                made.writestr(entry.filename, bytes(cut))
    return out.getvalue()


def _npy(header: str) -> bytes:
    text = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def decision(sound: Sound, chance: random.Random) -> Input:
    """Lines in the file of readers' decisions."""
    key = LOG
    lines = sound.files[key].splitlines(keepends=True)
    at = chance.randrange(len(lines))
    way = chance.randrange(4)
    if way == 0:
        del lines[at if len(lines) > at + 1 else 0]
    elif way == 1:
        lines[at : at + 1] = [lines[at], lines[at]]
    elif way == 2:
        lines[0], lines[-1] = lines[-1], lines[0]
    else:
        value = json.loads(lines[at])
        value[chance.choice(list(value))] = deepcopy(chance.choice(POOL))
        lines[at] = json.dumps(value).encode() + b"\n"
    data = b"".join(lines)
    return Input(
        "decision", {key}, False, f"line {at} way {way}", lambda: _put(sound.path / key, data)
    )


KINDS = {torn: 50, lie: 35, link: 6, bomb: 5, decision: 4}


def _put(place: Path, data: bytes) -> None:
    place.write_bytes(data)
