"""The training loop that pre-training and fine-tuning share."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from . import processes
from .batches import Batch, Batches
from .checkpoint import check_same_run, load_checkpoint, save_checkpoint

__all__ = ["History", "Loop", "MakeOptimizer", "MakeScheduler", "Options", "Row", "last"]

Row: TypeAlias = dict[str, float]
History: TypeAlias = list[Row]
MakeOptimizer: TypeAlias = "Optimizer | Callable[[list[nn.Parameter]], Optimizer]"
MakeScheduler: TypeAlias = "LRScheduler | Callable[[Optimizer], LRScheduler]"


@dataclass(frozen=True)
class Options:
    """How to train; the arguments that :func:`byol_fast.pretrain` and :func:`byol_fast.finetune` have in common."""

    epochs: int
    optimizer: MakeOptimizer | None
    scheduler: MakeScheduler | None
    patience: int | None
    clip_norm: float | None
    autocast: torch.dtype | None
    seed: int
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int | None
    resume: bool
    progress: bool

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise ValueError(f"epochs: expected an integer ≥ 0, got {self.epochs!r}")
        for name in ("patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer ≥ 1 or None, got {value!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number > 0 or None, got {self.clip_norm!r}")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {self.autocast!r}")
        if (self.resume or self.checkpoint_every is not None) and self.checkpoint is None:
            name = "resume" if self.resume else "checkpoint_every"
            raise ValueError(f"{name}: expected checkpoint=path with it, got checkpoint=None")


@dataclass
class Loop:
    """Train ``module`` on batches.

    The whole state is the module, the optimiser, the scheduler, torch's generators and the table ``history``. A
    checkpoint is a copy of it, so a resumed run goes on bit-equal. The table alone says whether the run is over.

    Attributes:
        phase: what the run is, in the words of its checkpoint.
        loss: from the tensors of a batch to their mean loss.
        halves: groups of parameters that are updated in turn, with a gradient of their own; one group: all together.
        prepare: called before the first step, when parameters are those to start or to continue from.
        after_backward: called when gradients are there.
        solve: sets the parameters in closed form and returns the loss; an epoch then is a call of it, without batches.
        measure: further columns of an epoch's row.
        is_enough: whether the table says that the goal is reached.
    """

    phase: dict[str, Any]
    module: nn.Module
    loss: Callable[..., Tensor]
    options: Options
    halves: Sequence[Sequence[nn.Parameter]]
    prepare: Callable[[], None] = lambda: None
    after_backward: Callable[[], None] = lambda: None
    solve: Callable[[], float] | None = None
    measure: Callable[[], Row] = dict
    is_enough: Callable[[History], bool] = lambda history: False
    history: History = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [parameter for half in self.halves for parameter in half]
        if not self.parameters:
            raise ValueError("module: expected a parameter to train, got none that requires a gradient")
        self.device = self.parameters[0].device
        self.dtype = self.parameters[0].dtype
        self.optimizer = _optimizer(self.options.optimizer, self.parameters)
        self.scheduler = _scheduler(self.options.scheduler, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.autocast == torch.float16)
        self.step = 0
        self.sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.rows = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None

    def run(self, train: Batches, held_out: Batches | None) -> History:
        """Train until ``epochs``, ``patience`` or ``is_enough`` says stop; returns the table, a row an epoch."""
        self.phase = {**self.phase, "seed": self.options.seed, **train.identity(), "processes": processes.size()}
        if self.options.patience is not None and processes.is_sharded(self.module):
            raise ValueError(
                "patience: expected None for a module sharded over processes, whose best state is not kept"
            )
        processes.synchronize_(self.module)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _training(self.module), _Interrupt() as interrupt:
            torch.manual_seed(self.options.seed + processes.rank())
            if self.options.resume and self.options.checkpoint and os.path.exists(self.options.checkpoint):
                self._load(self.options.checkpoint)
            self.prepare()
            with self._bar(train) as bar:
                while not self._is_over():
                    self._epoch(train, held_out, interrupt, bar)
            if self.best is not None:
                self.module.load_state_dict(self.best["model"])
        return self.history

    # ------------------------------------------------------------------------------------------------ an epoch

    def _epoch(self, train: Batches, held_out: Batches | None, interrupt: _Interrupt, bar: Any) -> None:
        begin = time.perf_counter() - self.seconds
        if self.solve is None:
            self._steps(train, interrupt, bar, begin)
        else:
            self.sum.fill_(self.solve())
            self.rows = 1
            self.seconds = time.perf_counter() - begin
            bar.update()
        self.history.append(self._row(held_out))
        bar.set_postfix(self._postfix(self.history[-1]["loss"]), refresh=False)
        self.seconds = time.perf_counter() - begin
        self.step, self.rows = 0, 0
        self.sum.zero_()
        self._keep_best()
        self._schedule()
        self._save()
        if processes.sum_(torch.tensor(int(interrupt.raised))):
            self._stop()

    def _steps(self, train: Batches, interrupt: _Interrupt, bar: Any, begin: float) -> None:
        for batch, total in _in_step(train.epoch(self.options.seed, len(self.history), self.step), interrupt):
            loss = self._update(batch, total)
            self.sum += loss.double() * batch.rows
            self.rows += batch.rows
            self.step += 1
            self.seconds = time.perf_counter() - begin
            bar.update()
            if self.device.type == "cpu":
                bar.set_postfix(self._postfix(loss), refresh=False)
            if self.options.checkpoint_every and self.step % self.options.checkpoint_every == 0:
                self._save()
            if interrupt.stops:
                self._stop()

    def _update(self, batch: Batch, total: int) -> Tensor:
        """A step of the optimiser for each half; returns the loss before the last."""
        tensors = tuple(self._placed(tensor) for tensor in batch.tensors)
        # The mean over processes of what they compute is then the mean over the rows of all of them.
        weight = batch.rows * processes.size() / total
        for half in self.halves:

            def closure(half: Sequence[nn.Parameter] = half) -> Tensor:
                self.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(self.device.type, self.options.autocast, self.options.autocast is not None):
                    loss = self.loss(*tensors)
                if self.device.type == "cpu":
                    self._check_finite(float(loss.detach()))
                self.scaler.scale(loss * weight).backward()
                self.after_backward()
                if processes.size() > 1 and not processes.is_sharded(self.module):
                    processes.average_gradients_(half)
                if self.options.clip_norm is not None:
                    self.scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(half, self.options.clip_norm)
                return loss.detach()

            with _only(half, self.parameters):
                if self.scaler.is_enabled():
                    loss = closure()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                else:
                    loss = cast(Tensor, self.optimizer.step(closure))  # type: ignore[arg-type]
        return loss

    def _placed(self, tensor: Tensor) -> Tensor:
        # Labels and indices keep their type.
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None, non_blocking=True)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} in epoch {len(self.history) + 1}, step {self.step + 1}; "
                "try a smaller learning rate or clip_norm, and look for NaN in the data"
            )

    def _row(self, held_out: Batches | None) -> Row:
        total, rows = processes.sum_(torch.stack((self.sum, self.sum.new_tensor(self.rows)))).tolist()
        if not rows:
            raise ValueError("data: expected at least one row, got none")
        # Not to wait for an accelerator at every step, its losses are looked at here.
        self._check_finite(total)
        row = {"epoch": len(self.history) + 1, "loss": total / rows}
        if self.solve is None:
            row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        if held_out is not None:
            row["validation_loss"] = self._validation_loss(held_out)
        return {**row, **self.measure(), "seconds": self.seconds}

    @torch.no_grad()
    def _validation_loss(self, held_out: Batches) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with _training(self.module, False):
            for batch, _ in _in_step(held_out.in_order()):
                with torch.autocast(self.device.type, self.options.autocast, self.options.autocast is not None):
                    loss = self.loss(*(self._placed(tensor) for tensor in batch.tensors))
                if batch.rows:
                    sums += torch.stack((loss.double() * batch.rows, sums.new_tensor(batch.rows)))
        total, rows = processes.sum_(sums).tolist()
        if not rows:
            raise ValueError("validation: expected at least one row, got none")
        return float(total / rows)

    def _postfix(self, loss: Tensor | float) -> dict[str, str]:
        shown = {"loss": f"{float(loss):.4g}"}
        if self.history and "certificate" in self.history[-1]:
            shown["certificate"] = f"{self.history[-1]['certificate']:.4f}"
        return shown

    def _bar(self, train: Batches) -> Any:
        steps = train.steps() if self.solve is None else 1
        total = None if steps is None else steps * self.options.epochs
        done = (steps or 0) * len(self.history) + self.step
        hidden = True if not self.options.progress or processes.rank() else None
        from tqdm import tqdm

        return tqdm(total=total, initial=done, desc=str(self.phase["phase"]), unit="step", disable=hidden)

    def _schedule(self) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(self._goal(self.history[-1]))
        elif self.scheduler is not None:
            self.scheduler.step()

    # -------------------------------------------------------------------------------------------- when to stop

    @staticmethod
    def _goal(row: Row) -> float:
        return row.get("validation_loss", row["loss"])

    def _keep_best(self) -> None:
        if self.options.patience is None:
            return
        goal = self._goal(self.history[-1])
        if self.best is None or goal < self.best["goal"]:
            model = {key: value.detach().clone() for key, value in self.module.state_dict().items()}
            self.best = {"goal": goal, "model": model}

    def _is_over(self) -> bool:
        if len(self.history) >= self.options.epochs or self.is_enough(self.history):
            return True
        if self.options.patience is None or not self.history:
            return False
        goals = [self._goal(row) for row in self.history]
        return len(goals) - 1 - goals.index(min(goals)) >= self.options.patience

    def _stop(self) -> None:
        self._save()
        raise KeyboardInterrupt

    # --------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        if self.options.checkpoint is None:
            return
        self._check_finite(float(self.sum))
        own = {"sum": float(self.sum), "rows": self.rows, "random": self._random()}
        model, optimizer = processes.whole_state(self.module, self.optimizer)
        state = {
            "phase": self.phase,
            "model": model,
            "optimizer": optimizer,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "processes": processes.gathered(own),
        }
        if processes.rank() == 0:
            save_checkpoint(self.options.checkpoint, state)

    def _load(self, path: str | os.PathLike[str]) -> None:
        state = load_checkpoint(path)
        check_same_run(path, self.phase, state["phase"])
        try:
            processes.load_whole_state(self.module, self.optimizer, state["model"], state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: expected a checkpoint of this module and optimiser, found another ({reason})"
            ) from error
        self.scaler.load_state_dict(state["scaler"])
        self.history[:] = state["history"]
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        own = state["processes"][processes.rank()]
        self.sum.fill_(own["sum"])
        self.rows = own["rows"]
        self._set_random(own["random"])

    def _random(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)


def last(history: History, key: str = "loss") -> float:
    """The last entry of a column; NaN for a run of no epochs."""
    return history[-1].get(key, math.nan) if history else math.nan


def _optimizer(given: MakeOptimizer | None, parameters: list[nn.Parameter]) -> Optimizer:
    if isinstance(given, Optimizer):
        return given
    made = torch.optim.Adam(parameters) if given is None else given(parameters) if callable(given) else given
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, or a class or function that makes one, got {made!r}"
        )
    return made


def _scheduler(given: MakeScheduler | None, optimizer: Optimizer) -> LRScheduler | None:
    if given is None or isinstance(given, LRScheduler):
        return given
    made = given(optimizer) if callable(given) else given
    if not isinstance(made, LRScheduler):
        raise TypeError(
            f"scheduler: expected an LRScheduler, or a function that makes one of an optimiser, got {made!r}"
        )
    return made


def _in_step(batches: Iterator[Batch], interrupt: _Interrupt | None = None) -> Iterator[tuple[Batch, int]]:
    """Each batch, and the rows of the batch in all processes; batches without rows are left out.

    Processes that run out of batches go on with their last one, without weight, until all have. They also agree on when
    a Ctrl-C that reached one of them stops all.
    """
    batch: Batch | None = None
    while True:
        following = next(batches, None)
        rows = 0 if following is None else following.rows
        if following is not None and len(following.tensors[0]):
            batch = following
        elif batch is not None:
            batch = Batch(batch.tensors, 0)
        raised = interrupt is not None and interrupt.raised
        running, total, lost = int(following is not None), rows, batch is None
        if processes.size() > 1:
            flags = torch.tensor([running, total, int(lost), int(raised)])
            running, total, lost, raised = processes.sum_(flags).tolist()
        if interrupt is not None:
            interrupt.agreed = bool(raised)
        if not running:
            return
        if total and (lost or batch is None):
            raise ValueError("data: expected at least one batch in every process, got none in one of them")
        if total and batch is not None:
            yield batch, total


class _Interrupt:
    """While active, Ctrl-C only raises a flag, for the step under way to be finished; a second one stops at once.

    ``agreed`` is what all processes know about it since the last step began.
    """

    def __init__(self) -> None:
        self.raised = False
        self.agreed = False
        self._previous: Any = None
        # Python delivers signals to its main thread only, and nobody else may install handlers.
        self._active = threading.current_thread() is threading.main_thread()

    @property
    def stops(self) -> bool:
        return self.agreed if processes.size() > 1 else self.raised

    def __enter__(self) -> _Interrupt:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


@contextmanager
def _training(module: nn.Module, mode: bool = True) -> Iterator[None]:
    """Set the mode of every submodule, and restore it."""
    modes = [(child, child.training) for child in module.modules()]
    module.train(mode)
    try:
        yield
    finally:
        for child, was in modes:
            child.training = was


@contextmanager
def _only(half: Iterable[nn.Parameter], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters require gradients; the others are not even computed."""
    chosen = {id(parameter) for parameter in half}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
