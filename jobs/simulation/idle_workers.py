"""Workers that do nothing, in one process: what is left is the scheduler's and the client's work.

    python idle_workers.py ADDRESS COUNT

Each is a connection that speaks a worker's side of Dask's protocol: it registers, and answers every
task at once with a word that it has begun and a word that it is done.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from typing import Any

from distributed.comm import connect
from distributed.versions import get_versions

NOTHING = pickle.dumps(type(None))


def _registration(number: int) -> dict[str, Any]:
    metrics = {
        "bandwidth": {"total": 1e8, "workers": {}, "types": {}},
        "digests_total_since_heartbeat": {},
        "managed_bytes": 0,
        "spilled_bytes": {"memory": 0, "disk": 0},
        "transfer": {"incoming_bytes": 0, "incoming_count": 0, "incoming_count_total": 0},
        "event_loop_interval": 0.02,
        "task_counts": {},
        "memory": 2**28,
        "cpu": 0.0,
        "time": time.time(),
    }
    return {
        "op": "register-worker",
        "reply": False,
        "address": f"tcp://127.1.{number // 250}.{number % 250 + 1}:1",
        "status": "running",
        "nthreads": 1,
        "name": f"idle-{number}",
        "now": time.time(),
        "resources": {},
        "memory_limit": 2**34,
        "local_directory": "",
        "services": {},
        "nanny": None,
        "pid": number,
        "versions": get_versions(),
        "metrics": metrics,
        "extra": {},
        "stimulus_id": f"register-{number}",
        "server_id": f"idle-{number}",
    }


async def _work(address: str, number: int) -> None:
    comm = await connect(address, deserialize=False)
    here = _registration(number)
    await comm.write(here, serializers=["msgpack"])
    await comm.read()
    while True:
        told: list[dict[str, Any]] = []
        for message in await comm.read():
            if message.get("op") == "close":
                return
            if message.get("op") == "compute-task":
                told += _done(message, here["address"])
        if told:
            await comm.write(told, serializers=["msgpack"])


def _done(task: dict[str, Any], worker: str) -> list[dict[str, Any]]:
    token, piece, _ = task["key"].rsplit("-", 2)
    begun = {"worker": worker, "piece": int(piece), "rows": 0, "memory": 2**28}
    now = time.time()
    finished = {
        "op": "task-finished",
        "status": "OK",
        "key": task["key"],
        "run_id": task["run_id"],
        "nbytes": 16,
        "type": NOTHING,
        "typename": "NoneType",
        "metadata": {},
        "thread": 1,
        "startstops": ({"action": "compute", "start": now, "stop": now},),
        "stimulus_id": f"done-{now}",
    }
    return [{"op": "log-event", "topic": token, "msg": begun}, finished]


async def main(address: str, count: int) -> None:
    await asyncio.gather(*(_work(address, number) for number in range(count)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
