"""The same with a cluster: ``tda index --workers 2``, and one of its processes is struck."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

from faults.kills import Tally

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

KINDS = {
    "kill -9 of a worker": ("worker", signal.SIGKILL, 6),
    "a worker that hangs (SIGSTOP)": ("worker", signal.SIGSTOP, 3),
    "kill -9 of the client of workers": ("client", signal.SIGKILL, 3),
    "SIGTERM of the client of workers": ("client", signal.SIGTERM, 3),
}


def campaign(folder: Path, share: float = 1.0, seed: int = 0) -> list[Tally]:
    """Every kind, ``share`` of its usual number of strikes."""
    # The tests' own way to strike, from the folder put on the path above.
    from test_cluster_faults import (  # type: ignore[import-not-found]
        CHUNK_ROWS,
        NUM_CHUNKS,
        Site,
    )

    whole = Site(folder / "whole").finish()
    found = []
    for kind, (whom, number, usual) in KINDS.items():
        tally = Tally(kind)
        for i in range(max(1, round(share * usual))):
            chance = random.Random(f"{seed}/{kind}/{i}")
            site = Site(folder / f"{whom}-{number.name}-{i}")
            process = site.start("--workers", "2")
            site.wait_for_marks(chance.randint(1, NUM_CHUNKS - 2), process)
            if process.poll() is not None:
                continue
            try:
                site.strike(process, whom, number)
            except (StopIteration, ProcessLookupError):  # it has just ended
                pass
            else:
                tally.times += 1
            process.wait(180)
            finished = site.finish()
            vain = site.num_computed() - NUM_CHUNKS
            tally.recomputed += vain
            # Two workers had a chunk each in their hands.
            tally.most_recomputed = max(tally.most_recomputed, vain)
            rows = {n for n in whole if "/rows/" in n and not n.endswith("json")}
            tally.rows_lost += CHUNK_ROWS * len(rows - set(finished))
            altered = [n for n in rows & set(finished) if finished[n] != whole[n]]
            tally.rows_altered += CHUNK_ROWS * len(altered)
            if finished != whole and not altered:
                raise AssertionError(f"{kind}: other files differ")
        found.append(tally)
    return found
