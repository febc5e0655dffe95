"""How long a peer takes to index: in its own environment, nothing of tda is imported.

python jobs/peers/speed.py METHOD WORKLOAD NUMBER OUT.json      (of jobs/benchmarks/workloads.py)

OUT.json has ``busy``, processor seconds for NUMBER examples with whatever the peer must do before
the first query, and ``plain``, those of a plain pass over the same examples in the same process.
captum and kronfluence keep no gradients: theirs is the scoring of one query, as much for each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.workloads import Workload, batches_of, workloads

DIM = 2048
WARM = 8  # examples


def loader(work: Workload) -> Any:
    if isinstance(work.data, dict):
        parts = zip(*work.data.values(), strict=True)
        return DataLoader([dict(zip(work.data, p, strict=True)) for p in parts], work.batch_size)
    return DataLoader(TensorDataset(*work.data), work.batch_size)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    own = logits.gather(1, targets[:, None])
    return own[:, 0] - logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1)


def traker(work: Workload) -> None:
    from trak import TRAKer
    from trak.modelout_functions import ImageClassificationModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in work.model.parameters()), proj_dim=DIM, seed=0,
        proj_type=ProjectionType.rademacher, device=torch.device("cpu"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made: Any = TRAKer(
            model=work.model, task=ImageClassificationModelOutput(),
            train_set_size=len(work.data[0]), save_dir=folder, device="cpu", projector=projector,
            proj_dim=DIM, use_half_precision=False,
        )  # fmt: skip
        made.load_checkpoint(work.model.state_dict(), model_id=0)
        for batch in loader(work):
            made.featurize(batch=batch, num_samples=len(batch[0]))
        made.finalize_features()


def dattri_trak(work: Workload) -> None:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    def loss(params: Any, data: Any) -> Tensor:
        return margin(functional_call(work.model, params, (data[0][None],)), data[1][None])[0]

    def probability(params: Any, data: Any) -> Tensor:
        logits = functional_call(work.model, params, (data[0][None],))
        return logits.softmax(1)[0, data[1]]

    attributor = TRAKAttributor(
        task=AttributionTask(loss_func=loss, model=work.model, checkpoints=work.model.state_dict()),
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": DIM, "device": "cpu"},
    )
    with torch.no_grad():
        attributor.cache(loader(work))


def dattri_layers(work: Workload, name: str) -> None:
    """Layer by layer, linear ones alone, ``DIM`` shared out evenly and no curvature.

    It takes layers with positions only: vectors are given one.
    """
    import dattri.algorithm.factgrass as factgrass
    import dattri.algorithm.logra as logra
    from dattri.task import AttributionTask

    kinds = {"LoGra": "LoGraAttributor", "FactGraSS": "FactGraSSAttributor"}
    number = sum(isinstance(module, nn.Linear) for module in work.model.modules())
    side = round((DIM / number) ** 0.5)

    if work.name == "MLP":
        work = replace(work, data=(work.data[0][:, None], work.data[1]))

    def loss(model: nn.Module, batch: Any, device: str) -> Tensor:
        if work.name == "MLP":
            return F.cross_entropy(model(batch[0])[:, 0], batch[1])
        return work.loss(model, batch)

    task = AttributionTask(loss_func=loss, model=work.model, checkpoints=work.model.state_dict())
    module: Any = logra if name == "LoGra" else factgrass
    kind = getattr(module, kinds[name])
    kind(task=task, hessian="Identity", proj_dim=side**2, offload="cpu").cache(loader(work))


class Sum(nn.Module):
    reduction = "sum"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")


def captum(work: Workload) -> None:
    from captum.influence import TracInCP

    tracer = TracInCP(
        work.model, TensorDataset(*work.data), checkpoints=[0], loss_fn=Sum(),
        checkpoints_load_func=lambda model, index: 1.0, batch_size=work.batch_size,
        sample_wise_grads_per_batch=True,
    )  # fmt: skip
    tracer.influence((work.data[0][:1], work.data[1][:1]))


def kronfluence(work: Workload) -> None:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classified(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if sample else batch[1]
            return F.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    data, query = TensorDataset(*work.data), TensorDataset(*(part[:1] for part in work.data))
    with tempfile.TemporaryDirectory() as folder:
        task = Classified()
        model = prepare_model(work.model, task)
        made = Analyzer("speed", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        made.fit_all_factors(
            factors_name="f", dataset=data, per_device_batch_size=work.batch_size,
            factor_args=FactorArguments(strategy="ekfac"),
        )  # fmt: skip
        made.compute_pairwise_scores(
            scores_name="s", factors_name="f", query_dataset=query,
            train_dataset=data, per_device_query_batch_size=1,
            per_device_train_batch_size=work.batch_size,
        )  # fmt: skip


METHODS: dict[str, Callable[[Workload], None]] = {
    "traker TRAK": traker,
    "dattri TRAK": dattri_trak,
    "dattri LoGra": lambda work: dattri_layers(work, "LoGra"),
    "dattri FactGraSS": lambda work: dattri_layers(work, "FactGraSS"),
    "captum TracInCP": captum,
    "kronfluence EK-FAC": kronfluence,
}


def some_of(work: Workload, number: int) -> Workload:
    if isinstance(work.data, dict):
        return replace(work, data={name: values[:number] for name, values in work.data.items()})
    return replace(work, data=tuple(values[:number] for values in work.data))


def main() -> None:
    method, name, number, out = sys.argv[1:]
    torch.set_num_threads(1)
    work = some_of(next(w for w in workloads() if w.name == name), int(number))

    def plain() -> None:
        for batch in batches_of(work):
            work.model.zero_grad()
            work.loss(work.model, batch).backward()

    plain()
    begin = time.process_time()
    plain()
    spent = time.process_time() - begin
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # dattri writes into the folder it is in
        METHODS[method](some_of(work, WARM))  # imports, and whatever is made once
        begin = time.process_time()
        METHODS[method](work)
        busy = time.process_time() - begin
    Path(out).write_text(json.dumps({"busy": busy, "plain": spent, "number": int(number)}))


if __name__ == "__main__":
    main()
