"""A stranger's run is refused by name, or does no harm. jobs/reliability.py asks 10,000 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda.errors import StoreError
from tda.store import Store

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture(scope="module")
def hostile():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(JOBS))
        from faults import hostile

        yield hostile


def check(outcome) -> None:
    assert outcome.failures == []
    assert outcome.unnamed == []
    assert sum(n for (_, verdict), n in outcome.counts.items() if verdict == "detected") > 0


def test_a_sample_of_hostile_runs_is_detected_or_harmless(hostile, tmp_path):
    check(hostile.campaign(tmp_path, 60, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_hostile_runs_are_detected_or_harmless(hostile, tmp_path, seed):
    check(hostile.campaign(tmp_path, 1000, seed=100 + seed))


@pytest.mark.parametrize("name", ["cache", "train", "train/rows", "train/rows/c", "evaluate"])
def test_a_link_to_elsewhere_is_refused_before_anything_is_read_or_written(hostile, tmp_path, name):
    from faults.sound import Sound, make_run

    sound = Sound.make(tmp_path)
    place = sound.path / name
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    for use in (lambda: Store.open(sound.path), lambda: make_run(sound.path)):
        with pytest.raises(StoreError, match="link") as caught:
            use()
        assert str(caught.value.where) == str(place)
