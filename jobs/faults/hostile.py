"""A stranger's run: a file of a sound run is changed at random; what does the engine make of it?

Every input is *detected* (a TdaError that says where, or a fault by `verify`), *harmless* (every
answer as of the sound run) or, if it was sealed anew as its maker can, *another* run, sound in
itself. Anything else is a fault of the engine: a bare traceback, other answers to bytes that do not
match their checksums, too long, too much memory, a file touched outside the run.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tda
from tda.decisions import Marks
from tda.errors import TdaError
from tda.store.files import crc32c, seal

SECONDS, BYTES = 20, 2 * 2**30  # more than that for a run of a few kilobytes is a fault
IDS = ["../../etc/passwd", "é/ü 日本 🙂", "a\0b", "<b>&\"'", "", ".", "CON", "x" * 40, "\n", "-rf"]
LOG = "actions/marks.jsonl"
POOL: list[Any] = [
    -1, 0, 1, 2, 7, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, True, False, None, "", "..", ".",
    "../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "rows/../../x", "\0", "0-99999999999999",
    "x" * 100_000, [], {}, [[]], [0], [1, 2, 3], {"a": 1}, "float64", "object", "bfloat16", "V8",
    "<f8", "|O", "train", "c", [2**40, 2**40], [2**62], [1] * 1000,
]  # fmt: skip


def make_run(path: Path) -> tda.Task:
    """Small, but with everything a run may hold; ids are as odd as they get."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, 5, generator=generator)
    y = torch.arange(14) % 3
    data = [{"input": x[i], "target": y[i], "id": name} for i, name in enumerate(IDS)]
    asked = [{"input": x[i], "target": y[i], "id": f"q{i}"} for i in range(10, 14)]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value * 1.5 for name, value in first.items()}
    checkpoints = [
        tda.Checkpoint(first, step=1, learning_rate=0.1),
        tda.Checkpoint(second, step=2, learning_rate=0.05),
    ]
    task = tda.Task(model, checkpoints=checkpoints, measurement="cross_entropy")
    options: dict[str, Any] = {"projection": "eigenbasis", "proj_dim": 16, "progress": False}
    run = tda.index(task, data, path, chunk_rows=6, **options)
    run.add_curvature(data, num_rows=10)
    run.add_queries(asked, "q")
    run.delete([IDS[3]])

    def retrain(subset: np.ndarray, seed: int) -> np.ndarray:
        return np.full(4, subset.sum() + seed, np.float32)

    design = tda.evaluate.Design(num_subsets=3, seeds=(0, 1))
    tda.evaluate.ground_truth(run, retrain, asked, design, progress=False)
    marks = Marks(path)
    for i, action in enumerate(("remove", "keep", "relabel")):
        marks.set(IDS[i], action, "2" if action == "relabel" else None, "note")  # type: ignore[arg-type]
    shutil.rmtree(path / "cache")
    (path / "cache").write_text("no folder, so nothing is kept between two inputs")
    return task


Answer = Callable[[tda.Run], Any]


def _columns(run: tda.Run) -> Any:
    table = run.store.table("train")
    return [(name, table.column(name).tobytes()) for name in table.columns()]


def _top(run: tda.Run) -> Any:
    top = run.top_k("q", k=3, recipe="influence_gn")
    return top.proponents.ids.tolist(), top.opponents.scores.tobytes()


def _truth(run: tda.Run) -> Any:
    truth = tda.evaluate.GroundTruth.open(run.path / "evaluate" / "half")
    return truth.masks.tobytes(), truth.outputs.tobytes()


def _decided(run: tda.Run) -> Any:
    return [(m.id, m.action, m.label, m.note) for m in Marks(run.path).all().values()]


def _bases(run: tda.Run) -> Any:
    projector = run.featurizer().projector
    return None if projector is None else list(projector.layers)


ANSWERS: dict[str, tuple[Answer, tuple[str, ...]]] = {  # with the files it is made of
    "top": (_top, ("train/", "curvature/", "queries/", "manifest.json")),
    "columns": (_columns, ("train/", "manifest.json")),
    "self": (lambda run: run.self_influence("grad_dot").tobytes(), ("train/", "manifest.json")),
    "near": (lambda run: run.baseline_top_k("q", 2).proponents.ids.tolist(), ("queries/",)),
    "truth": (_truth, ("evaluate/",)),
    "marks": (_decided, ("actions/",)),
    "bases": (_bases, ("projection.npz", "manifest.json")),
}


def answers(path: Path, task: tda.Task, which: set[str]) -> dict[str, Any]:
    """These kinds of answer."""
    run = tda.open(path, task)
    found = {name: ask(run) for name, (ask, _) in ANSWERS.items() if name in which}
    return {"ids": run.ids.tolist(), "queries": run.queries, **found}


def concerned(keys: set[str], chance: random.Random) -> set[str]:
    """The answers that are made of some of these files, and one other."""
    made = {n for n, (_, files) in ANSWERS.items() if any(k.startswith(files) for k in keys)}
    picked = chance.sample(sorted(made), min(2, len(made)))
    return {*picked, chance.choice(list(ANSWERS))}


@dataclass
class Sound:
    """The run that is tampered with, on a copy that is put right after each input."""

    path: Path
    task: tda.Task
    files: dict[str, bytes]
    answers: dict[str, Any]
    outside: Path

    @staticmethod
    def make(folder: Path) -> Sound:
        path, outside = folder / "run", folder / "outside"
        task = make_run(path)
        outside.mkdir()
        (outside / "secret").write_bytes(b"not for you\n")
        files = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        return Sound(path, task, files, answers(path, task, set(ANSWERS)), outside)

    def put_right(self, keys: set[str]) -> None:
        for key in sorted(keys):  # a folder before what is in it
            place = self.path / key
            if place.is_symlink() or place.is_file() or place.is_fifo():
                place.unlink()
            elif place.is_dir():
                shutil.rmtree(place)
            if key in self.files:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self.files[key])


@dataclass
class Input:
    """One hostile run: what was done to which files, and whether it was sealed anew."""

    kind: str
    keys: set[str]
    sealed: bool
    what: str
    write: Callable[[], None]


# ---- ways to be hostile


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
    import hashlib

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


# ---- what became of it


@dataclass
class Outcome:
    """Counts by (kind, verdict), and every failure in words."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)  # errors that do not say where

    def add(self, given: Input, verdict: str, detail: str = "") -> None:
        self.counts[given.kind, verdict] += 1
        if verdict not in ("detected", "harmless", "another"):
            self.failures.append(f"{given.kind}: {given.what[:200]}: {verdict} {detail[:2000]}")


def judge(sound: Sound, given: Input, outcome: Outcome, chance: random.Random) -> None:
    given.write()
    verdict, detail = "harmless", ""
    try:
        with _bounded():
            faults = _verify(sound.path)
            asked = concerned(given.keys, chance)
            found = answers(sound.path, sound.task, asked)
            wrong = {name for name in found if found[name] != sound.answers[name]}
            if wrong == {"marks"} and faults:
                verdict = "detected"  # the end of this file was cut off, and verify says so
            elif wrong:
                verdict = "another" if given.sealed else "silently wrong"
                detail = ", ".join(sorted(wrong))
            elif not given.sealed and not faults and _differs(sound, given):
                verdict, detail = "overlooked", "verify finds nothing"
    except TdaError as error:
        verdict = "detected"
        if error.where is None:
            outcome.unnamed.append(f"{given.kind}: {given.what[:200]}: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        import traceback

        verdict = "hang" if isinstance(error, TooLongError) else "traceback"
        detail = "".join(traceback.format_exception(error)[-4:])
    finally:
        sound.put_right(given.keys)
    if (
        sorted(p.name for p in sound.outside.iterdir()) != ["secret"]
        or (sound.outside / "secret").read_bytes() != b"not for you\n"
    ):
        verdict = "touched what is outside"
    outcome.add(given, verdict, detail)


def _verify(path: Path) -> list[Any]:
    from tda.upkeep import verify

    return verify(path, withdraw=False)


def _differs(sound: Sound, given: Input) -> bool:
    for key in given.keys:
        place = sound.path / key
        if not place.is_file() or place.read_bytes() != sound.files.get(key):
            return True
    return False


class TooLongError(Exception):
    pass


@contextmanager
def _bounded() -> Iterator[None]:
    def late(*about: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """For the whole process: what is there now and BYTES more."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, resource.RLIM_INFINITY))


def campaign(folder: Path, count: int, seed: int = 0, kinds: Any = None) -> Outcome:
    """``count`` hostile inputs, a function of the seed."""
    torch.set_num_threads(1)
    logging.getLogger("tda").setLevel(logging.ERROR)
    sound, outcome = Sound.make(folder), Outcome()
    ways = kinds or KINDS
    started = time.perf_counter()
    for i in range(count):
        chance = random.Random(f"{seed}/{i}")
        (way,) = chance.choices(list(ways), list(ways.values()))
        judge(sound, way(sound, chance), outcome, chance)
    outcome.counts["all", "seconds"] = round(time.perf_counter() - started)
    return outcome
