"""A stranger's run: a file of a sound run is changed at random; what does the engine make of it?

Every input is *detected* (a TdaError that says where, or a fault by `verify`), *harmless* (every
answer as of the sound run) or, if it was sealed anew as its maker can, *another* run, sound in
itself. Anything else is a fault of the engine: a bare traceback, other answers to bytes that do not
match their checksums, too long, too much memory, a file touched outside the run.
"""

from __future__ import annotations

import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faults.sound import Sound, answers, concerned
from faults.ways import KINDS, Input

from tda.errors import TdaError

SECONDS, BYTES = 20, 2 * 2**30  # more than that for a run of a few kilobytes is a fault


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
    sound, outcome = Sound.make(folder), Outcome()
    ways = kinds or KINDS
    started = time.perf_counter()
    for i in range(count):
        chance = random.Random(f"{seed}/{i}")
        (way,) = chance.choices(list(ways), list(ways.values()))
        judge(sound, way(sound, chance), outcome, chance)
    outcome.counts["all", "seconds"] = round(time.perf_counter() - started)
    return outcome
