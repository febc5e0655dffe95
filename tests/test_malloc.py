"""What is freed stays with the process until it is given back, unless its environment has chosen
otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tda.malloc import KEPT

SIZE = 32 * 2**20
FREED = f"""
import ctypes, resource
from tda.malloc import give_back, keep_freed
keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
held = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, place = held(), libc.malloc({SIZE})
ctypes.memset(place, 1, {SIZE})
assert held() - before > 0.9 * {SIZE}
libc.free(place)
freed = held() - before
give_back()
print(freed, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize(("chosen", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_memory_is_kept(chosen, kept):
    environment = {k: v for k, v in os.environ.items() if k not in KEPT} | chosen
    asked = subprocess.run(
        [sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True
    )
    freed, given_back = map(int, asked.stdout.split())
    assert (freed > 0.9 * SIZE) == kept
    assert given_back < 0.1 * SIZE
