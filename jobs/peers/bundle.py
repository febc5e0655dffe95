"""What a peer is given and what it gives back: files only, nothing of tda is imported.

    BUNDLE/about.json     task, and for "last", "path" and "models" the checkpoints:
                          [{"file", "learning_rate"}, …]
    BUNDLE/data.npz       train_inputs, train_targets, query_inputs, query_targets
    BUNDLE/networks.py    network(task), losses(task, model, inputs, targets)

    python PEER.py BUNDLE METHOD CHECKPOINTS NUMBER OUT.npz      runs in the peer's environment

OUT.npz has ``scores`` [query, train], > 0 where the example helps, ``seconds`` from checkpoints to
scores and ``peak_bytes`` of the process.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Bundle:
    """The model, its checkpoints and its data, as a peer wants them."""

    path: Path
    task: str
    checkpoints: list[dict[str, Any]]
    networks: Any
    train: TensorDataset
    queries: TensorDataset

    @property
    def is_classification(self) -> bool:
        targets = self.train.tensors[1]
        is_label = targets.dtype == torch.int64 and targets.ndim == 1
        return is_label and self.task != "fashion_ddpm"  # which has labels, and does not see them

    @property
    def is_language(self) -> bool:
        """Whether ℓ is −log p of a text (the mean of its characters')."""
        return self.task == "shakespeare"

    def weights(self, index: int) -> dict[str, Tensor]:
        return torch.load(self.path / self.checkpoints[index]["file"], weights_only=True)

    def model(self, index: int = 0) -> nn.Module:
        model = self.networks.network(self.task)
        model.load_state_dict(self.weights(index))
        return model.eval()

    def losses(self, model: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self.networks.losses(self.task, model, inputs, targets)

    def margins(self, model: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """log(p/(1−p)): p the softmax of the target's class, or e^−ℓ of a text, which is what
        dattri's examples take of a language model."""
        if not self.is_language:
            return margin(model(inputs), targets)
        logp = -self.losses(model, inputs, targets)
        return logp - torch.log(1 - torch.exp(logp))

    def output_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses of outputs that a peer computed by itself."""
        return self.networks.losses(self.task, lambda inputs: outputs, outputs, targets)

    def loader(self, data: TensorDataset, batch_size: int) -> DataLoader:
        return DataLoader(data, batch_size=batch_size, shuffle=False)


def read(path: str, which: str, number: int) -> Bundle:
    folder = Path(path)
    about = json.loads((folder / "about.json").read_text())
    spec = importlib.util.spec_from_file_location("networks", folder / "networks.py")
    assert spec is not None and spec.loader is not None
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    with np.load(folder / "data.npz") as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    train = TensorDataset(arrays["train_inputs"], arrays["train_targets"])
    queries = TensorDataset(arrays["query_inputs"], arrays["query_targets"])
    kept = about["checkpoints"][which]
    return Bundle(folder, about["task"], kept[:number], networks, train, queries)


def called(model: nn.Module, parameters: Any) -> Callable[..., Tensor]:
    """The model with these parameters: a dict, or with buffers in a pair."""
    return lambda *inputs: functional_call(model, parameters, inputs)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p/(1−p)) of the target's class, from logits ``[example, class]``."""
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], float("-inf"))
    return own[:, 0] - others.logsumexp(1)


def run(methods: dict[str, Callable[[Bundle], Any]]) -> None:
    """The main program of a peer: ``methods`` name → function from a bundle to [query, train]."""
    path, method, which, number, out = sys.argv[1:]
    torch.set_num_threads(1)
    given = read(path, which, int(number))
    started = time.perf_counter()
    scores = np.asarray(methods[method](given), np.float32)
    seconds = time.perf_counter() - started
    if not np.isfinite(scores).all():
        raise SystemExit("its scores are not finite")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.savez(out, scores=scores, seconds=seconds, peak_bytes=peak)
