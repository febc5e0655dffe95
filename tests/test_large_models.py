"""Models that are adapted or sharded: what is indexed is what was trained, on any layout."""

from __future__ import annotations

from collections.abc import Iterator
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
def test_what_fsdp_sharded_is_indexed_once_it_is_gathered(tmp_path: Path, mesh: Any) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    plain, sharded = Net(), Net()
    sharded.load_state_dict(plain.state_dict())
    for part in (sharded.up, sharded.down, sharded):
        fully_shard(part, mesh=mesh)
    with pytest.raises(TaskError, match="get_model_state_dict"):
        tda.Task(sharded)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(sharded, options=options)
    run = tda.index(tda.Task(Net(), [gathered]), (X, Y), tmp_path / "run", **EXACT)
    torch.testing.assert_close(stored_products(run), products(plain))
