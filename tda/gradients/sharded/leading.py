"""`lead`: rank 0 works with a model that is sharded over processes, and the others follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from tda.cluster.leaving import on_sigterm
from tda.errors import TaskError
from tda.gradients.sharded.passes import LEADER
from tda.gradients.sharded.session import Session, is_open
from tda.layout import FSDP2, bare, require_numbers, require_whole, sharded_by

T = TypeVar("T")


def lead(model: nn.Module, work: Callable[[], T]) -> T | None:
    """``work()``, with all of tda at hand for a model that ``fully_shard`` has spread.

    Every process of the group calls this with its share of the model. On rank 0 it returns what
    ``work`` returns: tasks of this model are made there, and indexed and asked as ever. On the
    others ``work`` is not called: they serve rank 0 until it is done, and return None. So nothing
    in ``work`` may wait for them. Afterwards the model has the weights, mode and gradients' flags
    it had before.

    Rows are computed by all processes, each of some of a batch's examples (with a metric other than
    "euclidean", and in passes that fit a curvature, by each of all); batches of size "auto" are
    larger by their number.

    What ``work`` raises is raised on rank 0 once the others are let go. Where a process dies, or a
    pass fails in one alone, the others end as well; the same program resumes.

    Raises TaskError unless torch.distributed is initialised and the model is sharded by FSDP2, the
    root included; ClusterError where the processes lose each other.
    """
    if not callable(work):
        raise TaskError(
            "tda.lead takes a model and a function without arguments",
            found=type(work).__name__,
            wanted="tda.lead(model, work)",
            do="give what is to be done as a function: tda.lead(model, lambda: tda.index(…))",
        )
    with leading(model) as leads:
        if not leads:
            return None
        with on_sigterm():
            return work()


@contextmanager
def leading(model: nn.Module) -> Iterator[bool]:
    """Whether this process leads inside; one that does not has followed until the leader was done.

    Raises TaskError, ClusterError.
    """
    model = bare(model)
    _require(model)
    with Session(model).open() as session:
        if dist.get_rank() != LEADER:
            session.follow()
            yield False
            return
        try:
            yield True
        finally:
            session.dismiss()


def _require(model: Any) -> None:
    """Raises TaskError for what cannot be led."""
    if not isinstance(model, nn.Module):
        raise TaskError(
            "the model is not a torch module",
            found=type(model).__name__,
            wanted="tda.lead(model, work)",
        )
    by = sharded_by(model)
    if by is None:
        raise TaskError(
            "the model is whole in this process: nobody has to be led",
            wanted="a model that torch's fully_shard has spread",
            do="call the work itself; or fully_shard the model first",
        )
    if by != FSDP2:
        require_whole(model)
    require_numbers(model)
    if not dist.is_initialized():
        raise TaskError(
            "the processes of the model are not connected",
            do="call torch.distributed.init_process_group() first; start the program with torchrun",
        )
    if is_open():
        raise TaskError("tda.lead is open already", do="do everything in one work")
    _require_layout(model)


def _require_layout(model: nn.Module) -> None:
    """Raises TaskError for kinds of shards that are not those of FSDP2 alone."""
    from torch.distributed.fsdp import FSDPModule

    whole = [n for n, p in model.named_parameters() if type(p).__name__ != "DTensor"]
    if whole or not isinstance(model, FSDPModule):
        raise TaskError(
            "a part of the model is not sharded",
            where=whole[0] if whole else type(model).__name__,
            wanted="every parameter in a module that fully_shard was called on",
            do="after its parts, call fully_shard(model) on the model as a whole",
        )
    for name, parameter in model.named_parameters():
        there, here = parameter.device_mesh.device_type, parameter.device.type  # type: ignore[attr-defined]
        if there != here:
            raise TaskError(
                "the model's shards are offloaded",
                where=name,
                found=f"on {here}, computed with on {there}",
                do="shard it without CPUOffloadPolicy, over more processes if need be",
            )
