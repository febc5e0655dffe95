"""The network between a process and object storage fails, or the storage does: a real S3 server.

The process that watches speaks to the server by a wire of its own, and by a client of its own.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from faults.kills import killed
from faults.site import FAILED, Campaign, Kind, Site

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))


class Storage:
    """A server, and a wire to it that can be cut."""

    def __init__(self) -> None:
        from object_storage import (  # type: ignore[import-not-found]  # the tests' own server
            SECRETS,
            Server,
            Wire,
        )

        self.server = Server()
        self.wire = Wire(self.server)
        import boto3

        self.client = boto3.client(
            "s3",
            endpoint_url=self.server.url,
            region_name="us-east-1",
            aws_access_key_id=SECRETS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRETS["AWS_SECRET_ACCESS_KEY"],
        )
        where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.wire.port}"}
        self.environment: dict[str, str] = {**self.server.environment, **where}

    def look(self, run: str, prefix: str) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket="bucket", Prefix=f"{run}/{prefix}"
        )
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return {
            key[len(run) + 1 :]: self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys
        }

    def site(self, folder: Path) -> Site:
        folder.mkdir(parents=True)
        environment = {**self.environment, "TDA_CACHE": str(folder / "kept")}
        look = partial(self.look, folder.name)
        return Site(folder, f"s3://bucket/{folder.name}", look, environment)

    # ---- kinds of fault

    def cut_a_while(self, site: Site, chance: random.Random) -> int:
        """the network to the storage is cut for a moment: it asks again, and goes on by itself"""
        pid = site.start()
        struck = site.at_a_random_moment(pid, chance)
        self.wire.cut()
        time.sleep(0.1 + 1.5 * chance.random())
        self.wire.mend()
        code = site.wait(pid)
        assert code == 0, (code, site.errors())
        return int(struck)

    def cut(self, site: Site, chance: random.Random) -> int:
        """the network to the storage is cut for longer than it asks; then it is there again"""
        pid = site.start(before=_impatient)
        struck = site.at_a_random_moment(pid, chance)
        self.wire.cut()
        code = site.wait(pid)
        self.wire.mend()
        assert code in (0, FAILED), (code, site.errors())
        assert code == 0 or "the storage cannot be reached" in site.errors(), site.errors()
        return int(struck and code == FAILED)

    def paused(self, site: Site, chance: random.Random) -> int:
        """the storage stands still for a while (SIGSTOP)"""
        pid = site.start()
        struck = site.at_a_random_moment(pid, chance)
        assert self.server.process is not None
        os.kill(self.server.process.pid, signal.SIGSTOP)
        time.sleep(0.5 + chance.random())
        os.kill(self.server.process.pid, signal.SIGCONT)
        code = site.wait(pid)
        assert code == 0, (code, site.errors())
        return int(struck)

    def busy(self, site: Site, chance: random.Random) -> int:
        """the storage answers 500 or 503 to some requests"""
        pid = site.start()
        struck = site.at_a_random_moment(pid, chance)
        self.server.answer(chance.choice([500, 503]), chance.randint(1, 6))
        code = site.wait(pid)
        self.server.answer(500, 0)
        assert code == 0, (code, site.errors())
        return int(struck)

    def killed(self, site: Site, chance: random.Random) -> int:
        """kill -9 of a client that writes to object storage"""
        return killed(site, chance)

    @property
    def campaign(self) -> Campaign:
        kinds: dict[Kind, int] = {
            self.cut_a_while: 8,
            self.cut: 10,
            self.paused: 6,
            self.busy: 6,
            self.killed: 12,
        }
        return Campaign(kinds, self.site)

    def close(self) -> None:
        self.wire.close()
        self.server.kill()


def _impatient() -> None:
    from tda.store import remote

    quick: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}
    remote._RETRY = quick
