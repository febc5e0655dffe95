"""One process of those that a model is sharded over: `python sharded_run.py FOLDER RANK WORLD`.

Does what tests/test_sharded.py looks at, and writes what rank 0 found to FOLDER/found.pt.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import tda
from tda.errors import GradientError
from tda.gradients import Gradients
from tda.measurements import as_measurement

NUM_TRAIN, NUM_QUERIES, TOKENS = 14, 3, 6
EXACT: dict[str, Any] = {"projection": "identity", "dtype": "float32", "progress": False}
TEXTS = [(x,) for x in torch.randint(11, (17, TOKENS), generator=torch.Generator().manual_seed(3))]
TRAIN, QUERIES = TEXTS[:NUM_TRAIN], TEXTS[NUM_TRAIN:]
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(4))
Y = torch.arange(12) % 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    """With a head that is the embedding, and positions that are a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Adapted(nn.Module):
    """A linear layer that is frozen, and two small ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 16).requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.out = nn.Linear(16, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.base(x) + self.b(self.a(x))))


class Recurrent(nn.Module):
    """Which no tap separates, but a loop does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.unflatten(1, (3, 2)))[0][:, -1])


class InPlace(nn.Module):
    """Changes what a layer was given after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = h + self.shift
        h.mul_(2)
        return self.out(y + h)


def log_loss(model: nn.Module, batch: Any) -> Tensor:
    """−log p of a text, ``[example]``."""
    (tokens,) = batch
    logits = model(tokens)[:, :-1].float()
    return -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum((1, 2))


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The same model in every process and in the test."""
    torch.manual_seed(seed)
    return kind()


def sharded(model: nn.Module, *parts: Any, root: dict | None = None, **options: Any) -> nn.Module:
    """Parts first, and then the whole."""
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, **options)
    return fully_shard(model, **(options if root is None else {**options, **root}))


def transformer(**options: Any) -> nn.Module:
    model = made(Transformer)
    return sharded(model, *model.blocks, **options)


def leaves() -> nn.Module:
    """Each layer by itself, given back between forward and backward."""
    model = made(Transformer)
    parts = [part for b in model.blocks for part in (b.norm, b.up, b.down)]
    return sharded(model, *parts, [model.embed, model.head], reshard_after_forward=True)


def rows(run: tda.Run) -> Tensor:
    return run.store.table("train").rows(0, 0, run.store.table("train").num_rows)


def index(model: nn.Module, path: Path, data: Any = TRAIN, **how: Any) -> tda.Run:
    measurement = "cross_entropy" if isinstance(data, tuple) else log_loss
    task = tda.Task(model, how.pop("checkpoints", None), measurement)
    return tda.index(task, data, path, **{**EXACT, "batch_size": 4, **how})


def indexed(model: nn.Module, path: Path, data: Any = TRAIN) -> tuple[Tensor, str]:
    """Rows of the training set, and how they were taken."""
    run = index(model, path, data)
    audit = run.featurizer().audit
    assert audit is not None
    return rows(run), audit.path


RECIPES = "influence", "grad_cos", "influence_gn", "influence_ekfac"


def queries_of(model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """Scores by recipe, of two checkpoints in the eigenbasis of the last."""
    other = {name: 1.1 * value for name, value in made(Transformer).state_dict().items()}
    task = tda.Task(model, [other, made(Transformer, 1).state_dict()], "causal_lm")
    data, asked = ([{"input": x, "labels": x} for (x,) in part] for part in (TRAIN, QUERIES))
    how: dict[str, Any] = {"dtype": "float32", "progress": False, "batch_size": 8}
    run = tda.index(task, data, folder / "eigen", proj_dim=64, projection="eigenbasis", **how)
    run.add_curvature(data, num_rows=40, batch_size=8)
    return {name: np.asarray(run.scores(asked, recipe=name)) for name in RECIPES}


def steps(model: nn.Module) -> list[float]:
    """Losses of a short training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = log_loss(model, (torch.stack([x for (x,) in TRAIN]),)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resumed(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The third batch cannot be made; then it can, and the same call goes on."""
    left = 3

    def together(examples: list[Any]) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("stopped")
        return (torch.stack([x for (x,) in examples]),)

    def work() -> tda.Run:
        task = tda.Task(model, None, log_loss, collate=together)
        how = {**EXACT, "batch_size": 4, "chunk_rows": 4}
        return tda.index(task, TRAIN, folder / "resumed", **how)

    said = ""
    try:
        tda.lead(model, work)
    except tda.DataError as error:
        said = str(error)
    if dist.get_rank() == 0:
        missing = tda.open(folder / "resumed").store.stored("train").missing()
    run = tda.lead(model, work)
    return {} if run is None else {"said": said, "missing": missing, "rows": rows(run)}


def refusals(model: nn.Module, folder: Path) -> dict[str, str]:
    """What is said of everything that cannot be done."""
    said = {}

    def tell(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except tda.TdaError as error:
            said[name] = str(error)

    whole, weights = made(Transformer), made(Transformer).state_dict()
    task = tda.Task(model, weights, log_loss)
    tell("a task outside", lambda: tda.Task(model))
    tell("an index outside", lambda: tda.index(task, TRAIN, folder / "none", progress=False))
    tell("a whole model", lambda: tda.lead(whole, lambda: None))
    tell("no function", lambda: tda.lead(model, None))  # type: ignore[arg-type]
    part = sharded(made(Block).up)
    tell("a root that is whole", lambda: tda.lead(nn.Sequential(part), lambda: None))

    def work() -> None:
        tell("lead in lead", lambda: tda.lead(model, lambda: None))
        tell("another model", lambda: tda.Task(part))
        tell("other weights", lambda: index(model, folder / "none", checkpoints=[{"w": X}]))
        tell("conjugate gradients", lambda: tda.attribute(
            tda.Task(model, weights), (X, Y), (X, Y), "influence_cg",
            progress=False))  # fmt: skip
        tell("workers", lambda: pickle.dumps(tda.Run(None, task)))  # type: ignore[arg-type]
        tell("a bad measurement", lambda: tda.index(
            tda.Task(model, weights, lambda model, batch: model(batch[0])), TRAIN,
            folder / "bad", progress=False))  # fmt: skip

    tda.lead(model, work)
    return said


class Ranks:
    """A reduction that says who has done it; fails where that is rank ``never``."""

    def __init__(self, never: int | None = None) -> None:
        self.never = never

    def __call__(self, num_examples: int, device: torch.device) -> Any:
        def consume(name: str, factors: list[Any]) -> None:
            if dist.get_rank() == self.never:
                raise ValueError(f"on rank {self.never}")

        return consume, lambda: (torch.full((num_examples,), dist.get_rank()),)


def divided(model: nn.Module) -> dict[str, Any]:
    """Who has computed examples of batches of 1 to 5; and of one that fails on the other side."""
    gradients = Gradients(model, as_measurement("cross_entropy"))
    ranks, seen = Ranks(), {}
    for count in (5, 2, 1):
        batch = X[:count], Y[:count]
        seen[f"ranks of {count}"] = gradients.reduced(batch, count, ranks)[2][0].tolist()
    try:
        gradients.reduced((X, Y), 12, Ranks(never=1))
    except GradientError as error:
        seen["said"] = error.found
    seen["outputs"] = gradients.reduced((X, Y), 12, ranks)[0]
    return seen


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for name, model, data in (
        ("kept after forward", transformer(reshard_after_forward=False), TRAIN),
        ("given back", transformer(reshard_after_forward=True), TRAIN),
        ("each layer", leaves(), TRAIN),
        ("bfloat16", transformer(mp_policy=MixedPrecisionPolicy(torch.bfloat16)), TRAIN),
        ("adapted", sharded(made(Adapted)), (X, Y)),
        ("recurrent", sharded(made(Recurrent)), (X, Y)),
        ("in place", sharded(made(InPlace)), (X, Y)),
    ):
        found[name] = tda.lead(model, lambda m=model, n=name, d=data: indexed(m, folder / n, d))

    model = transformer()
    model.train()
    model.embed.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    before = [p.full_tensor().clone() for p in model.parameters()]  # type: ignore[operator]
    found["scores"] = tda.lead(model, lambda: queries_of(model, folder))
    found["as it was"] = (
        all(
            torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before, strict=True)
        )
        and all(module.training for module in model.modules())
        and flags == [p.requires_grad for p in model.parameters()]
    )
    adapted = sharded(made(Adapted))
    found["divided"] = tda.lead(adapted, lambda: divided(adapted))
    found["resumed"] = resumed(model, folder)
    found["refusals"] = refusals(model, folder)
    found["losses"] = steps(model)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
