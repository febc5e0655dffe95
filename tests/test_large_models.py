"""Models that are adapted or sharded: what is indexed is what was trained, on any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import TaskError

X = np.random.default_rng(0).normal(size=(12, 6)).astype("f4")
Y = np.arange(12) % 3
EXACT: dict[str, Any] = {"projection": "identity", "dtype": "float32", "progress": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def products(model: nn.Module) -> Tensor:
    """⟨∇ℓ_i, ∇ℓ_j⟩ of all examples by plain autograd, over what requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in zip(torch.tensor(X), torch.tensor(Y), strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    return torch.stack(rows) @ torch.stack(rows).T


def stored_products(run: tda.Run) -> Tensor:
    table = run.store.table("train")
    rows = table.rows(0, 0, 12) * torch.tensor(table.column("slope")[0])[:, None]
    return rows @ rows.T


def test_of_an_adapted_model_only_the_adapters_are_indexed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    run = tda.index(tda.Task(model), (X, Y), tmp_path / "run", **EXACT)
    manifest = run.store.manifest["model"]
    assert set(manifest["parameters"]) == adapters
    assert manifest["num_parameters"] == 2 * (6 + 16 + 16 + 3)
    torch.testing.assert_close(stored_products(run), products(model.eval()))

    seen: set[str] = set()  # a frozen weight makes no factor: it costs its forward pass alone
    featurizer = run.featurizer()
    featurizer.at(0)
    batch = (torch.tensor(X), torch.tensor(Y))
    featurizer.gradients(batch, 12, lambda name, factors: seen.add(name))
    assert seen == adapters


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A process group of one, over gloo."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_a_run_is_the_same_of_a_model_gathered_or_sharded(tmp_path: Path, mesh: Any) -> None:
    """On one process; tests/test_sharded.py has two."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    plain, sharded = Net(), Net()
    sharded.load_state_dict(plain.state_dict())
    for part in (sharded.up, sharded.down, sharded):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(sharded.parameters())
    with pytest.raises(TaskError, match=r"(?s)sharded by FSDP.*get_state_dict"):
        tda.Recorder(tmp_path / "recorded", sharded, optimizer, keep=1)
    assert not (tmp_path / "recorded").exists()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(sharded, options=options)
    run = tda.index(tda.Task(Net(), [gathered]), (X, Y), tmp_path / "run", **EXACT)
    torch.testing.assert_close(stored_products(run), products(plain))

    def work() -> tuple[tda.Run, tda.Run]:
        """Finds the same run complete; and makes it anew."""
        paths = tmp_path / "run", tmp_path / "again"
        first, second = (tda.index(tda.Task(sharded), (X, Y), path, **EXACT) for path in paths)
        return first, second

    done = tda.lead(sharded, work)
    assert done is not None and done[0].featurizer().audit is None
    torch.testing.assert_close(stored_products(done[1]), stored_products(run))
    assert done[1].store.manifest["checkpoints"] == run.store.manifest["checkpoints"]


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_what_is_sharded_otherwise_is_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallel = parallelize_module(Net(), mesh, {"up": ColwiseParallel()})
    flat = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    for model, by in ((parallel, "tensor parallelism"), (flat, "FSDP 1")):
        with pytest.raises(TaskError, match=f"(?s){by}.*tda.lead.*get_model_state_dict"):
            tda.Task(model)
        with pytest.raises(TaskError, match=by):
            tda.lead(model, lambda: None)
    partly = Net()
    fully_shard(partly.up, mesh=mesh)
    with pytest.raises(TaskError, match=r"(?s)not sharded.*down.weight"):
        tda.lead(partly, lambda: None)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_what_a_sharded_training_gathers_is_what_a_whole_one_has(tmp_path: Path, mesh: Any) -> None:
    """As the recorder's refusal says: model and optimizer, by torch's get_state_dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    plain, sharded = Net(), Net()
    sharded.load_state_dict(plain.state_dict())
    for part in (sharded.up, sharded.down, sharded):
        fully_shard(part, mesh=mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (plain, sharded)]
    for model, optimizer in zip((plain, sharded), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.tensor(X)), torch.tensor(Y)).backward()
            optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(sharded, optimizers[1], options=options)
    torch.save(weights, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "optimizer.pt")
    files = tmp_path / "weights.pt", tmp_path / "optimizer.pt"
    given = tda.Checkpoint(files[0], optimizer=files[1])
    whole = tda.Checkpoint(plain.state_dict(), optimizer=optimizers[0].state_dict())
    found, wanted = (
        tda.index(tda.Task(Net(), [c], metric="adam"), (X, Y), tmp_path / n, **EXACT).store
        for n, c in (("found", given), ("wanted", whole))
    )
    rows = [store.table("train").rows(0, 0, 12) for store in (found, wanted)]
    torch.testing.assert_close(rows[0], rows[1])
    assert found.manifest["checkpoints"][0]["optimizer"] == "adam"


def test_partitioned_parameters_are_known_by_deepspeeds_mark(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=r"(?s)ZeRO 3.*zero_to_fp32"):
        tda.Task(model)
    with pytest.raises(TaskError, match=r"(?s)ZeRO 3.*zero_to_fp32"):
        tda.Recorder(tmp_path / "recorded", model, optimizer, keep=1)


def hooked() -> Net:
    """As accelerate's dispatch_model leaves a model whose layers it has put on devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = Net()
    for part in (model.up, model.down, model):
        hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=part is model)
        hooks.add_hook_to_module(part, hook)
    model.hf_device_map = {"up": "cpu", "down": "cpu"}
    return model


@pytest.mark.parametrize("spread", [False, True])
def test_a_device_map_is_left_as_it_is(spread: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """With one device there is; ``spread``: as if there were two, nothing is moved."""
    model, plain = hooked(), Net()
    plain.load_state_dict(model.state_dict())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    moved: list[object] = []
    if spread:
        monkeypatch.setattr("tda.gradients.is_spread", lambda model: True)
        monkeypatch.setattr(nn.Module, "to", lambda self, *to: moved.append(to) or self)
    run = tda.index(tda.Task(model), (X, Y), tmp_path / "run", **EXACT)
    torch.testing.assert_close(stored_products(run), products(plain))
    assert run.featurizer().audit.path == "tap" and not moved
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_what_is_offloaded_is_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    layout = {"up": "cpu", "down": "disk"}
    model = accelerate.dispatch_model(
        Net(), layout, main_device="cpu", offload_dir=str(tmp_path / "offloaded")
    )
    with pytest.raises(TaskError, match=r"(?s)meta.*without offloading") as caught:
        tda.Task(model)
    assert caught.value.where == "down.weight"


@pytest.mark.gpu
def test_a_model_on_two_devices_has_the_gradients_of_one(tmp_path: Path) -> None:
    class Split(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(x.to("cuda")))
            return self.down(hidden.cpu())

    model, plain = Split(), Net()
    plain.load_state_dict(model.state_dict())
    model.up.cuda()
    for device in ("cpu", "cuda"):
        run = tda.index(tda.Task(model, device=device), (X, Y), tmp_path / device, **EXACT)
        assert run.featurizer().audit.path == "tap"
        torch.testing.assert_close(stored_products(run), products(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile
@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_and_its_weights_are_those_inside(
    wrapped: Any, index_exactly: Callable
) -> None:
    """The same run, in one backward pass, whichever names the weights go by."""
    inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    outer, data = wrapped(inner), (torch.randn(6, 5), torch.arange(6) % 3)
    twice = nn.DataParallel(outer)
    wanted = index_exactly(tda.Task(inner), data).store.table("train").rows(0, 0, 6)
    for weights in (None, inner.state_dict(), outer.state_dict(), twice.state_dict()):
        run = index_exactly(tda.Task(twice, weights), data)
        assert run.featurizer().audit.path == "tap"
        assert torch.equal(run.store.table("train").rows(0, 0, 6), wanted)


def test_a_part_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(5, 3)
    assert tda.Task(model).weights(0).keys() == model.state_dict().keys()
