"""The processes of a sharded model: the leader tells what is done, and the others follow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tda.cluster.delivery import pack, unpack
from tda.errors import ClusterError, GradientError, TaskError
from tda.gradients.passes import Reduction
from tda.gradients.sharded.passes import LEADER, Leading, Sharded
from tda.gradients.sharded.weights import Weights, gathered_objects, shares
from tda.measurements import Measurement

_FOREVER = timedelta(days=365)  # followers wait while the leader reads, scores or writes
_OPEN: list[Session] = []


def is_open() -> bool:
    """Whether this process leads or follows."""
    return bool(_OPEN)


def session_of(model: nn.Module) -> Session:
    """What `lead` has opened for this model. Raises TaskError if nothing."""
    if _OPEN and _OPEN[-1].model is model:
        return _OPEN[-1]
    raise TaskError(
        "a model that is sharded over processes is worked with by all of them together",
        found="another model than that of tda.lead" if _OPEN else "no tda.lead around this call",
        wanted="every process in tda.lead(model, work), and this call in work",
        do="def work(): … tda.index(tda.Task(model, …), …) …; tda.lead(model, work), started by "
        "torchrun (a command does so by itself, of a task whose checkpoints are given)",
    )


class Session:
    """A sharded model and the processes it lies on, while `tda.lead` is open.

    parameters: by name and in the model's order, as tensors that are whole while they are used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sharded = list(model.parameters())
        self.device = self._sharded[0].device
        self.parameters = gathered_objects(model)
        self._control = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._made: list[Sharded] = []  # the same in every process
        self._reductions: list[Reduction] = []  # likewise
        self._before: dict[str, Tensor] | None = None  # this process's share, once others came
        self._loaded: Weights | None = None
        self.in_step = True

    @contextmanager
    def open(self) -> Iterator[Session]:
        """In eval mode inside; afterwards all is as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        _OPEN.append(self)
        try:
            yield self
        finally:
            _OPEN.remove(self)
            self.restore()
            for module, mode in modes:
                module.training = mode
            dist.destroy_process_group(self._control)

    # The leader's side.

    def passes(self, measurement: Measurement, autocast: torch.dtype | None) -> Leading:
        """Of the model by this measurement, in every process."""
        with self.told("make", measurement, autocast):
            made = Leading(self, len(self._made), measurement, autocast)
            self._made.append(made)
        return made

    def gather(self) -> Weights:
        """The weights the model had when `lead` was called, whole, on the CPU."""
        with self.told("gather"):
            return self._gather()

    def hold(self, weights: Weights) -> None:
        """Have these weights in the model."""
        if weights is not self._loaded:
            self._loaded = None
            with self.told("load", {}):
                self._load(weights)
            self._loaded = weights

    def number_of(self, reduction: Reduction) -> int:
        """By which every process knows it; it is sent once."""
        known = [number for number, r in enumerate(self._reductions) if r is reduction]
        if not known:
            with self.told("keep", reduction):
                self._keep(reduction)
        return known[0] if known else len(self._reductions) - 1

    @contextmanager
    def told(self, name: str, *args: Any) -> Iterator[None]:
        """What is done inside is done by the others as well: ``self._name(*args)``.

        An error inside happens to them in the same place, and all go on from there.
        """
        self._tell(name, *args)
        try:
            yield
        except torch.OutOfMemoryError as error:  # not at the same place in every process
            self.in_step = False
            raise GradientError(
                "a device has no memory for a pass of a model that is sharded",
                found=str(error).partition(". ")[0],
                do="give a smaller batch_size, or spread the model over more processes; finished "
                "chunks are kept, and the same call resumes",
            ) from error
        except Exception:
            if self.in_step:
                self._tell("nothing")  # raises where another process has ended
            raise
        except BaseException:
            self.in_step = False
            raise

    def dismiss(self) -> None:
        """Let the others go. Out of step they find out as this process ends."""
        if self.in_step:
            self._tell("leave")

    def _tell(self, name: str, *args: Any) -> None:
        if not self.in_step:
            raise _lost("this process has left a pass half way")
        message = pack((name, args))
        try:
            dist.broadcast_object_list([message], LEADER, self._control)
            hindered = self._hindered(None)
        except BaseException as error:
            self.in_step = False
            if isinstance(error, RuntimeError):
                raise _lost(str(error).partition("\n")[0]) from error
            raise
        for rank, why in hindered.items():
            raise ClusterError(f"process {rank} cannot take part", found=why)

    def _hindered(self, why: str | None) -> dict[int, str]:
        """What hinders processes, by rank; where anything does, none begins."""
        count = torch.tensor(int(why is not None))
        dist.all_reduce(count, group=self._control)
        if not count:
            return {}
        answers: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, why, self._control)
        return {rank: answer for rank, answer in enumerate(answers) if answer is not None}

    # The followers' side.

    def follow(self) -> None:
        """Serve the leader until it is done. Raises ClusterError where it is gone."""
        with _signals_left_to_the_leader():
            while (asked := self._hear()) != ("leave", ()):
                name, args = asked
                try:
                    getattr(self, f"_{name}")(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception:
                    if not self.in_step:
                        raise
                    continue  # the leader has the same, and decides

    def _hear(self) -> tuple[str, tuple]:
        asked: tuple[str, tuple] = "nothing", ()
        why = None
        try:
            message = [b""]
            dist.broadcast_object_list(message, LEADER, self._control)
            try:
                asked = unpack(message[0])
            except ClusterError as error:
                why = str(error)
            return ("nothing", ()) if self._hindered(why) else asked
        except RuntimeError as error:
            raise _lost(str(error).partition("\n")[0]) from error

    def _nothing(self) -> None:
        pass

    def _make(self, measurement: Measurement, autocast: torch.dtype | None) -> None:
        self._made.append(Sharded(self, measurement, autocast))

    def _pass(self, number: int, name: str, args: tuple) -> None:
        getattr(self._made[number], name)(*args)

    # What every process does.

    def _keep(self, reduction: Reduction) -> None:
        self._reductions.append(reduction)

    def share(self, number: int, num_examples: int) -> tuple[slice, Reduction]:
        """This process's examples of a batch, and the reduction of that number."""
        rank, world = dist.get_rank(), dist.get_world_size()
        ends = num_examples * rank // world, num_examples * (rank + 1) // world
        return slice(*ends), self._reductions[number]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A pass in which processes see different examples: what stops one would hang the others.

        So that process has to end, and they end with it. Raises GradientError.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            self.in_step = False
            raise
        except Exception as error:
            self.in_step = False
            raise GradientError(
                "a pass fails in one of the processes that share a model",
                where=f"process {dist.get_rank()}",
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                do="mend or leave out the example (batch_size=1 shows which it is); finished "
                "chunks are kept, and the same program resumes",
            ) from error

    def collect(self, part: Any) -> list[Any]:
        """On the leader the parts of all, in order. Raises what any gave in place of a part."""
        parts: list[Any] = [None] * dist.get_world_size()
        leads = dist.get_rank() == LEADER
        dist.gather_object(part, parts if leads else None, LEADER, self._control)
        for error in (p for p in parts if isinstance(p, Exception)):
            raise error
        return parts

    def _gather(self) -> Weights:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        self.restore()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)  # type: ignore[return-value]

    def _load(self, weights: Weights) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if self._before is None:
            self._before = {n: v.cpu().clone() for n, v in shares(self.model).items()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(weights), options=options)

    def restore(self) -> None:
        """The weights as they were before any were loaded; on each process by itself."""
        if self._before is not None:
            for name, value in shares(self.model).items():
                value.copy_(self._before[name])
        self._loaded = self._before = None

    @contextmanager
    def using(self, frozen: bool) -> Iterator[None]:
        """A pass; frozen: in which no parameter requires a gradient."""
        required = [parameter.requires_grad for parameter in self._sharded]
        try:
            if frozen:
                for parameter in self._sharded:
                    parameter.requires_grad_(False)  # FSDP2 has the whole ones require the same
            yield
        finally:
            for parameter, before in zip(self._sharded, required, strict=True):
                parameter.requires_grad_(before)
            self.model.reset_iter_state()  # type: ignore[operator]  # an FSDPModule


@contextmanager
def _signals_left_to_the_leader() -> Iterator[None]:
    """All processes are asked to stop; the leader ends the piece at hand before it does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lost(found: str) -> ClusterError:
    return ClusterError(
        "the processes of a sharded model have lost each other",
        found=found,
        do="look at what the other processes said; started again, the same program resumes",
    )
