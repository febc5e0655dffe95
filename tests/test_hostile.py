"""A stranger's run is refused by name, or does no harm. jobs/reliability.py asks 10,000 times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tda
from tda.errors import ConfigError, MismatchError, StoreError
from tda.store import Store
from tda.store.manifest import read_manifest, write_manifest
from tda.upkeep import verify

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


def test_a_projection_of_another_version_is_refused(tmp_path):
    data, path = (torch.randn(6, 9), torch.arange(6) % 2), tmp_path / "run"
    task = tda.Task(torch.nn.Linear(9, 2))
    tda.index(task, data, path, proj_dim=8, progress=False)
    manifest = read_manifest(path)
    manifest["projection"]["strides"] = {"weight": 2}
    write_manifest(path, manifest)
    with pytest.raises(ConfigError, match="does not know") as caught:
        tda.open(path, task).add_queries(data)
    assert caught.value.found == "strides"
    with pytest.raises(MismatchError, match="strides"):
        tda.index(task, data, path, proj_dim=8, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_one", ["no.weight"]),
        ("filters", {"no.weight": 9}),
        ("filters", {"0.weight": 7}),
        ("filters", {"2.weight": 9}),
    ],
    ids=["absent", "absent filter", "another kernel", "no filter"],
)
def test_a_projection_of_another_models_parameters_is_refused(tmp_path, field, value):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    data = torch.randn(6, 16, 4, 4), torch.arange(6) % 2
    path, task = tmp_path / "run", tda.Task(model)
    tda.index(task, data, path, proj_dim=32, progress=False)
    manifest = read_manifest(path)
    assert manifest["projection"]["filters"] == {"0.weight": 9}
    manifest["projection"][field] = value
    write_manifest(path, manifest)
    for use in (
        lambda: tda.index(task, data, path, proj_dim=32, progress=False),
        lambda: tda.open(path, task).add_queries(data),
    ):
        with pytest.raises(ConfigError, match="another model") as caught:
            use()
        assert repr(next(iter(value))) in str(caught.value.where)


@pytest.mark.parametrize("other", ["float32", "int8", "int4", "ternary"])
def test_rows_of_another_type_than_the_manifest_says_are_refused(tmp_path, other):
    """Who seals the manifest anew does not have the files read as what they are not."""
    data = torch.randn(6, 4), torch.arange(6) % 2
    path = tmp_path / "run"
    tda.index(tda.Task(torch.nn.Linear(4, 2)), data, path, progress=False)
    write_manifest(path, {**read_manifest(path), "dtype": other})
    with pytest.raises(StoreError, match=f"bfloat16, and the manifest says {other}"):
        Store.open(path).table("train")
    assert verify(path)


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
