"""Problems as data: small models that between them hold every trap a gradient engine can fall into.

Each problem has a few checkpoints, about ten training examples, a few queries, the measurement as
the engine is told it, and the same measurement on one example as ``naive.Outcome``, written apart.
``tda`` is never imported here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import models
import torch
import torch.nn.functional as F
from naive import Outcome
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

LEARNING_RATES = (0.1, 0.03, 0.01)
NUM_TRAIN, NUM_QUERIES = 10, 3


@dataclass(frozen=True)
class Weights:
    """One checkpoint: a state dict with the step and learning rate it was saved at."""

    state: Mapping[str, Tensor]
    step: int
    learning_rate: float


@dataclass(frozen=True)
class Problem:
    """A task, its data, and the meaning of its measurement."""

    name: str
    make: Callable[[], nn.Module]
    checkpoints: tuple[Weights, ...]
    train: Listed
    queries: Listed
    measurement: str | Callable[[nn.Module, Any], Tensor]
    outcome: Callable[[nn.Module, Any], Outcome]

    @property
    def learning_rates(self) -> list[float]:
        return [weights.learning_rate for weights in self.checkpoints]


class Listed(Dataset):
    """A map-style data set over a list."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        return self.examples[i]


# What one example measures (a batch of one, float64).


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Model output and target, from a pair or from a Hugging Face batch."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits, batch["labels"]
    return model(batch[0]), batch[1]


def classified(model: nn.Module, batch: Any) -> Outcome:
    logits, label = predict(model, batch)
    p = torch.softmax(logits[0], 0)[label[0]]
    return margin_of(p)


def binary_classified(model: nn.Module, batch: Any) -> Outcome:
    logit, label = predict(model, batch)
    p = torch.sigmoid(logit.reshape(()))
    return margin_of(p if label.item() == 1 else 1 - p)


def margin_of(p: Tensor) -> Outcome:
    """f = log(p/(1−p)), ℓ = −log p = softplus(−f), ℓ'' = p(1−p)."""
    f, curvature = torch.log(p) - torch.log(1 - p), (p * (1 - p)).item()
    return Outcome(f, -torch.log(p), curvature, p.item(), has_margin=True)


def squared(model: nn.Module, batch: Any) -> Outcome:
    prediction, target = predict(model, batch)
    f = prediction.reshape(())
    return Outcome(f, 0.5 * (f - target.item()) ** 2)


def plain(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Outcome]:
    """An outcome whose differentiated scalar is the loss itself."""

    def outcome(model: nn.Module, batch: Any) -> Outcome:
        value = loss(model, batch)
        return Outcome(value, value)

    return outcome


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """Mean over tokens of −log p(token | tokens before); targets of −100 do not count."""
    if isinstance(batch, Mapping):
        logits, labels = predict(model, batch)
        logits, targets = logits[0, :-1], labels[0, 1:]
    else:
        logits, targets = model(batch[0])[0], batch[1][0]
    counted = targets != -100
    picked = logits[counted].log_softmax(-1)[torch.arange(int(counted.sum())), targets[counted]]
    return -picked.mean()


def labels_on(model: nn.Module, batch: Any) -> Tensor:
    """Sum over labels of −y log p − (1−y) log(1−p)."""
    p = torch.sigmoid(model(batch[0])[0])
    return -(batch[1][0] * p.log() + (1 - batch[1][0]) * (1 - p).log()).sum()


def mean_squared(model: nn.Module, batch: Any) -> Tensor:
    """Mean over outputs of ½(ŷ − y)²."""
    return 0.5 * ((model(batch[0])[0] - batch[1][0]) ** 2).mean()


def distance(model: nn.Module, batch: Any) -> Tensor:
    """Squared distance of the output from the target, for a model of several inputs."""
    return ((model(batch["left"], batch["right"]) - batch["near"]) ** 2).sum()


# The same as a user would hand them to the engine: (model, batch) -> one scalar an example.


def sequence_loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(1)


def label_loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.binary_cross_entropy_with_logits(logits, batch[1], reduction="none").sum(1)


def pair_loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["left"], batch["right"]) - batch["near"]).square().sum(1)


# Data.


def classes(*shape: int, num: int = 4) -> tuple[Listed, Listed]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_TRAIN + NUM_QUERIES, *shape, generator=generator)
    return split([(x, i % num) for i, x in enumerate(inputs)])


def tokens(vocabulary: int = 11, length: int = 6, num: int = 3) -> tuple[Listed, Listed]:
    """Right-padded sequences of tokens ≥ 1 (padding is 0) with a class each."""
    return split([(x, i % num) for i, x in enumerate(padded(vocabulary, length))])


def padded(vocabulary: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(1, vocabulary, (NUM_TRAIN + NUM_QUERIES, length), generator=generator)
    keep = [length - i % 3 for i in range(len(drawn))]
    return [x * (torch.arange(length) < n) for x, n in zip(drawn, keep, strict=True)]


def split(examples: Sequence[Any]) -> tuple[Listed, Listed]:
    return Listed(examples[:NUM_TRAIN]), Listed(examples[NUM_TRAIN:])


def regression(seed: int = 3) -> tuple[Listed, Listed]:
    """y = x·w + noise with d = 5."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_TRAIN + NUM_QUERIES, 5, generator=g)
    y = x @ torch.linspace(-1, 1, 5) + 0.5 * torch.randn(len(x), generator=g)
    return split(list(zip(x, y, strict=True)))


def digits() -> tuple[Listed, Listed]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[: NUM_TRAIN + NUM_QUERIES] / 16, dtype=torch.float32)
    return split([(a, int(b)) for a, b in zip(x, labels, strict=False)])


def hugging_face(*, causal: bool) -> tuple[Listed, Listed]:
    found = []
    for i, x in enumerate(padded(13, 6)):
        mask = (x != 0).long()
        labels = torch.where(mask == 1, x, -100) if causal else i % 3
        found.append({"input_ids": x, "attention_mask": mask, "labels": labels})
    return split(found)


def pairs() -> tuple[Listed, Listed]:
    g = torch.Generator().manual_seed(9)
    found = []
    for _ in range(NUM_TRAIN + NUM_QUERIES):
        left, right = torch.randn(5, generator=g), torch.randn(3, 5, generator=g)
        found.append({"left": left, "right": right, "near": torch.randn(4, generator=g)})
    return split(found)


def several_labels() -> tuple[Listed, Listed]:
    train, queries = classes(5)
    rows = [
        (x, torch.tensor([i % 2, i % 3 == 0, 1 - i % 2]).float())
        for x, i in [*train.examples, *queries.examples]
    ]
    return split(rows)


def counts() -> tuple[Listed, Listed]:
    """Integer inputs and integer targets."""
    return split([(x, int(x.sum()) % 5) for x in padded(7, 4)])


Data = Callable[[], tuple[Listed, Listed]]
Declared = tuple[Callable[[], nn.Module], Data, Any, Callable[[nn.Module, Any], Outcome]]
CLASSIFY: tuple[str, Callable] = ("cross_entropy", classified)

DECLARED: dict[str, Declared] = {
    "ridge": (lambda: nn.Linear(5, 1, bias=False), regression, "squared_error", squared),
    "logistic": (
        lambda: nn.Linear(5, 1), lambda: classes(5, num=2), "binary_cross_entropy",
        binary_classified,
    ),
    "digits_mlp": (models.digits_net, digits, *CLASSIFY),
    "uniform_softmax": (models.uniform, lambda: classes(5), *CLASSIFY),
    "frozen": (models.frozen, lambda: classes(5), *CLASSIFY),
    "cnn": (models.cnn, lambda: classes(2, 9, 9), *CLASSIFY),
    "cnn_same": (models.cnn_same, lambda: classes(1, 6, 6), *CLASSIFY),
    "conv1d": (models.conv1d, lambda: classes(3, 8), *CLASSIFY),
    "conv3d": (models.conv3d, lambda: classes(1, 3, 3, 3), *CLASSIFY),
    "norms": (models.norms, lambda: classes(2, 3, 3), *CLASSIFY),
    "tiny_lm": (
        models.tiny_lm, lambda: split([(x[:-1], x[1:]) for x in padded(11, 7)]), sequence_loss,
        plain(next_token),
    ),
    "attention": (models.attention, tokens, *CLASSIFY),
    "encoder_layer": (models.encoder, tokens, *CLASSIFY),
    "sequence_first": (models.sequence_first, lambda: classes(3, 5), *CLASSIFY),
    "flattened": (models.flattened, lambda: classes(3, 5), *CLASSIFY),
    "reused": (models.reused, lambda: classes(5), *CLASSIFY),
    "several_inputs": (models.several_inputs, pairs, pair_loss, plain(distance)),
    "in_place": (models.in_place, lambda: classes(5), *CLASSIFY),
    "direct": (models.direct, lambda: classes(3, 5), *CLASSIFY),
    "einsum": (models.einsum, lambda: classes(3, 5), *CLASSIFY),
    "bilinear": (models.bilinear, lambda: classes(5), *CLASSIFY),
    "weight_norm": (models.normed_weight, lambda: classes(5), *CLASSIFY),
    "lstm": (models.recurrent, lambda: classes(3, 5), *CLASSIFY),
    "multi_label": (models.perceptron, several_labels, "multi_label", plain(labels_on)),
    "several_outputs": (
        models.perceptron, several_labels, "mean_squared_error", plain(mean_squared),
    ),
    "callable_loss": (models.perceptron, several_labels, label_loss, plain(labels_on)),
    "integers": (models.counting, counts, "squared_error", squared),
    "gpt2": (models.gpt2, lambda: hugging_face(causal=True), "causal_lm", plain(next_token)),
    "bert": (models.bert, lambda: hugging_face(causal=False), *CLASSIFY),
}  # fmt: skip

NEEDS_TRANSFORMERS = ("gpt2", "bert")
NAMES = tuple(
    name
    for name in DECLARED
    if name not in NEEDS_TRANSFORMERS or importlib.util.find_spec("transformers")
)


@cache
def problem(name: str) -> Problem:
    """The problem of this name, the same one at every call."""
    make, data, measurement, outcome = DECLARED[name]
    train, queries = data()
    checkpoints = tuple(
        Weights(state(make, seed, noise=0 if name == "uniform_softmax" else 0.1), 10 * seed, eta)
        for seed, eta in enumerate(LEARNING_RATES[: 3 if name in ("ridge", "digits_mlp") else 2], 1)
    )
    return Problem(name, make, checkpoints, train, queries, measurement, outcome)


def state(make: Callable[[], nn.Module], seed: int, noise: float) -> dict[str, Tensor]:
    """Weights of a model drawn from this seed, moved off their special starting values."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.5)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        return {name: value.clone() for name, value in model.state_dict().items()}
