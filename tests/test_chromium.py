"""How CI comes by its browser: whatever goes wrong is an error that says what, never a pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "chromium"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def found(tmp_path: Path):
    """Run the script with nothing on the PATH but ``id`` and the given programs."""

    def run(uid: int = 0, named: str | None = None, **programs: str):
        program(tmp_path / "id", f"echo {uid}")
        for name, text in programs.items():
            program(tmp_path / name.replace("_", "-"), text)
        given = {"PATH": str(tmp_path)} | ({} if named is None else {"CHROMIUM": named})
        bash = shutil.which("bash")
        return subprocess.run([bash, SCRIPT], env=given, capture_output=True, text=True)

    return run


def test_a_browser_that_starts_is_taken(found, tmp_path):
    done = found(chromium="exit 1", google_chrome="exit 0")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/google-chrome\n")
    program(tmp_path / "my own chrome", "exit 0")
    done = found(named=f"{tmp_path}/my own chrome")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/my own chrome\n")


@pytest.mark.parametrize(
    ("uid", "programs", "says"),
    [
        (0, {}, "install it, or set CHROMIUM"),
        (1000, {"apt_get": "exit 0"}, "sudo apt-get install chromium"),
        (0, {"apt_get": "exit 100"}, "could not install it"),
        (0, {"apt_get": "exit 0"}, "does not start"),
        (0, {"apt_get": "exit 0", "chromium": "exit 1"}, "does not start"),
    ],
    ids=["no apt", "not root", "apt fails", "apt installs nothing", "broken browser"],
)
def test_without_one_it_fails_and_says_what_to_do(found, uid, programs, says):
    done = found(uid, **programs)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr


def test_a_browser_that_was_named_and_does_not_start_is_not_replaced(found):
    done = found(named="/no/such/chrome", google_chrome="exit 0", apt_get="exit 0")
    assert done.returncode == 1
    assert "/no/such/chrome" in done.stderr


def test_ci_runs_the_browser_tests_and_no_test_of_them_skips():
    recipe = re.search(r"^check:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert "browser" in recipe[1].split()
    files = [f for f in (ROOT / "tests").glob("test_*.py") if "mark.browser" in f.read_text()]
    assert len(files) >= 2
    for file in files:
        if file.name != Path(__file__).name:
            assert "skip" not in file.read_text()
    assert os.access(SCRIPT, os.X_OK)
