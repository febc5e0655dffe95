"""The disk below a run fails while it is written: one of its own, mounted for the purpose."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.site import FAILED, Campaign, Kind, Site


@contextmanager
def on_a_disk(run: Path, mount: Callable[[Path], list[str]]) -> Iterator[None]:
    """The run's folder is a small disk of its own inside, and a plain folder again after.

    mount: the command that mounts it there. Raises OSError where this user may not.
    """
    held = run.with_name("held")
    if run.exists():
        run.rename(held)
    else:
        held.mkdir()
    run.mkdir()
    if subprocess.run(mount(run), capture_output=True).returncode:
        raise OSError("a disk of its own cannot be mounted: run as root")
    try:
        shutil.copytree(held, run, dirs_exist_ok=True)
        subprocess.run(["sync", "--file-system", str(run)], check=True)  # these were durable
        yield
        shutil.rmtree(held)
        shutil.copytree(run, held, ignore=shutil.ignore_patterns("lost+found"))
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)
    run.rmdir()
    held.rename(run)


def full(site: Site, chance: random.Random) -> int:
    """the disk is full; then there is room"""
    run = Path(site.run)
    used = sum(file.stat().st_size + 4096 for file in run.rglob("*"))
    size = used + chance.randrange(300_000, 900_000)
    with on_a_disk(
        run, lambda at: ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    ):
        code = site.wait(site.start())
        assert code in (0, FAILED), code
        assert code == 0 or "the disk is full" in site.errors(), site.errors()
    return int(code == FAILED)


def read_only(site: Site, chance: random.Random) -> int:
    """the disk turns read-only in mid-write, as after an error; then it is mounted anew"""
    run, image = Path(site.run), site.folder / "disk"
    with image.open("wb") as file:
        file.truncate(16 * 2**20)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", str(image)]
    if shutil.which(make[0]) is None or subprocess.run(make, capture_output=True).returncode:
        raise OSError("there is no mkfs.ext4")
    mount = ["mount", "-o", "loop", str(image)]
    with on_a_disk(run, lambda at: [*mount, str(at)]):
        pid = site.start()
        struck = site.at_a_random_moment(pid, chance)
        # All at once, under the writer's open files; what was not flushed by then is gone.
        subprocess.run(["mount", "-o", "remount,abort", str(run)], check=True, capture_output=True)
        code = site.wait(pid)
        assert code in (0, FAILED), (code, site.errors())
        told = ("cannot be written", "cannot write this file")  # read-only, or an I/O error
        assert code == 0 or any(words in site.errors() for words in told), site.errors()
        subprocess.run(["umount", str(run)], check=True)  # and not lazily: it is to be read
        subprocess.run(["e2fsck", "-y", str(image)], capture_output=True)
        subprocess.run([*mount, str(run)], check=True)
    image.unlink()
    return int(struck and code == FAILED)


KINDS: dict[Kind, int] = {full: 10, read_only: 15}
CAMPAIGN = Campaign(KINDS, Site.at)
