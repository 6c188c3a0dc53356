"""Phase one: train a bottleneck to reconstruct."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..nn import Bottleneck
from ..pca import StreamingPCA, certificate
from . import processes
from .batches import Batches, Data, training_and_validation
from .linear import alternate_, best_loss, has_certificate, principal_components, set_optimum_, start_at_optimum_
from .loop import History, Loop, MakeOptimizer, MakeScheduler, Options, Row, last

__all__ = ["PretrainResult", "pretrain"]

_METHODS = ("auto", "exact", "alternate", "joint")


@dataclass(frozen=True)
class PretrainResult:
    """What :func:`pretrain` did.

    Attributes:
        module: the module that was given, trained in place.
        method: ``"exact"``, ``"alternate"`` or ``"joint"``.
        history: a table, one dictionary an epoch (``pandas.DataFrame(history)`` reads it), with the columns ``epoch``,
            ``loss`` (mean over the epoch's batches; for ``exact`` and exact half-steps: of the result), ``lr``,
            ``validation_loss``, ``certificate`` and ``seconds`` where there are such.
        pca: the principal components of the training rows, with their yield curve, where they were computed: for a
            bottleneck that reconstructs its input and is linear or started from the best linear one; not for ``joint``
            where the features are too many for a certificate.
    """

    module: nn.Module
    method: str
    history: History
    pca: StreamingPCA | None = None

    @property
    def loss(self) -> float:
        """Loss of the last row of the table; NaN if there is none."""
        return last(self.history)

    @property
    def certificate(self) -> float:
        """Achieved loss / best possible loss at this rank, over the training rows; NaN where it is not defined."""
        return last(self.history, "certificate")


def pretrain(
    module: nn.Module,
    data: Data,
    *,
    method: str = "auto",
    epochs: int = 100,
    batch_size: int | None = 1024,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    stop_at: float | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    warm_start: bool = True,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Minimise ``module.reconstruction_loss`` over the data, in place.

    A linear bottleneck that reconstructs its input has a closed solution, principal components, and every other method
    is told how far it is from it: the *certificate* of an epoch is the loss / the best possible loss at this rank, in
    float64 from the covariance, and 1 is optimal.

    * ``"exact"``: the closed solution, from one pass over the data (two where the features are too many for their
      covariance).
    * ``"alternate"``: encoder and decoder in turn. For a linear bottleneck, each half-step is the exact ridge
      least-squares solution, on Gram matrices from one pass; an epoch is a round of two. For any other, each half-step
      is a step of the optimiser on one half.
    * ``"joint"``: steps of the optimiser on everything, through the fused loss.
    * ``"auto"``: exact where there is a closed solution, else joint.

    Ctrl-C finishes the step under way, writes the checkpoint and raises KeyboardInterrupt; a second one stops at once.
    The pass for the covariance, which comes before the first step, has no checkpoint: Ctrl-C stops it at once.
    A resumed run goes on bit-equal to one that was never stopped, as far as randomness comes from torch's generators.

    With ``torch.distributed`` initialised, every process calls this with the same module and data, and works on its
    share of each batch; a DataLoader gives each process batches of its own. Gradients and covariances are averaged over
    all rows, so the result is that of one process. A module sharded by FSDP2 (``fully_shard``) stays sharded. The first
    process writes the checkpoint, which is whole.

    Args:
        module: a :class:`byol_fast.Bottleneck`, or any module with a method ``reconstruction_loss``.
        data: rows ``[N, in_features]`` as a tensor, an array (memory-mapped or not) or a sparse matrix (torch's or
            SciPy's; no dense row is made of it); a pair of such: input, target; a Dataset; or a DataLoader. A batch is
            the arguments of ``reconstruction_loss``: input, or input and target.
            It is moved to the module's device and cast to its dtype, be it floating-point or integer.
        method: see above.
        epochs: passes over the data at most.
        batch_size: rows of a batch; None means all at once. A DataLoader brings its own.
        optimizer: class or function that makes an optimiser of a list of parameters, or an optimiser; default Adam.
        scheduler: function that makes a scheduler of an optimiser, or a scheduler; it takes a step after each epoch.
        stop_at: stop when the certificate is at most this, for instance 1.01.
        validation: data, or a share of ``data``'s rows, to measure ``validation_loss`` on after each epoch.
        patience: stop after so many epochs without a better validation loss (training loss, without validation), and
            go back to the best.
        warm_start: whether a non-linear bottleneck that reconstructs its input starts from the best linear one.
        clip_norm: gradients are scaled down to this norm.
        autocast: ``torch.bfloat16`` or ``torch.float16`` (whose loss is scaled); None trains in the module's dtype.
        seed: of the order of the rows, and of torch's generators; those of the caller stay as they are.
        checkpoint: file that is replaced, in one step, after each epoch.
        checkpoint_every: replace it after so many steps of an epoch, too.
        resume: continue from ``checkpoint`` if it exists.
        progress: show a bar, where there is a terminal.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FloatingPointError: the loss became NaN or infinite. The last checkpoint is from before.
    """
    module = processes.unwrapped(module)
    if not isinstance(module, nn.Module) or not hasattr(module, "reconstruction_loss"):
        raise TypeError(f"module: expected a module with a reconstruction_loss, got {type(module).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    options = Options(
        epochs,
        optimizer,
        scheduler,
        patience,
        clip_norm,
        autocast,
        seed,
        checkpoint,
        checkpoint_every,
        resume,
        progress,
    )
    train, held_out = training_and_validation(data, validation, batch_size, seed)
    layer = module if isinstance(module, Bottleneck) and _reconstructs(module, train) else None
    linear = layer is not None and layer.activation == "identity"
    method = _resolved(method, module, linear)
    if stop_at is not None and not linear:
        raise ValueError(
            "stop_at: expected None, because only a linear bottleneck that reconstructs its input has a certificate"
        )
    if layer is not None and linear:
        return _pretrain_linear(layer, train, held_out, method, stop_at, options)
    pca = None
    if layer is not None and warm_start and not _continues(options):
        pca = principal_components(layer, train, progress)
        start_at_optimum_(layer, pca, train)
    return PretrainResult(module, method, _loop(module, method, options).run(train, held_out), pca)


def _reconstructs(module: Bottleneck, data: Batches) -> bool:
    """Whether the input is the target and has to go through the code, so that principal components say what is best."""
    return module.out_features == module.in_features and not module.residual and data.width() == 1


def _resolved(method: str, module: nn.Module, linear: bool) -> str:
    if method == "auto":
        return "exact" if linear else "joint"
    if method == "exact" and not linear:
        raise ValueError(
            'method: expected "alternate" or "joint", got "exact", which is for a linear bottleneck without '
            "residual that reconstructs its input"
        )
    if method == "alternate" and (not isinstance(module, Bottleneck) or module.tied):
        raise ValueError(
            'method: expected "exact" or "joint", got "alternate", which is for a Bottleneck whose decoder '
            "has a weight of its own"
        )
    return method


def _continues(options: Options) -> bool:
    return options.resume and options.checkpoint is not None and os.path.exists(options.checkpoint)


def _loop(module: nn.Module, method: str, options: Options) -> Loop:
    if method == "alternate" and isinstance(module, Bottleneck):
        halves = [list(module.encoder.parameters()), list(module.decoder.parameters())]
    else:
        halves = [list(module.parameters())]
    halves = [[parameter for parameter in half if parameter.requires_grad] for half in halves]
    reconstruction_loss = processes.method(module, "reconstruction_loss")
    dtype = next(module.parameters()).dtype

    def loss(*tensors: Tensor) -> Tensor:
        return reconstruction_loss(*(tensor.to(dtype) for tensor in tensors))

    return Loop({"phase": "pretrain", "method": method}, module, loss, options, halves)


def _pretrain_linear(
    module: Bottleneck,
    train: Batches,
    held_out: Batches | None,
    method: str,
    stop_at: float | None,
    options: Options,
) -> PretrainResult:
    """With the optimum known from the start."""
    begin = time.perf_counter()
    certified = has_certificate(module)
    if not certified and (stop_at is not None or method == "alternate"):
        name = "stop_at" if stop_at is not None else "method"
        raise ValueError(f"{name}: expected few enough features for their covariance, got {module.in_features}")
    if method == "joint" and not certified:
        # Nothing that principal components say is needed, and they take longer than an epoch.
        return PretrainResult(module, method, _loop(module, method, options).run(train, held_out))
    pca = principal_components(module, train, options.progress)

    def measure() -> Row:
        return {"certificate": certificate(module, pca)} if certified else {}

    def is_enough(history: History) -> bool:
        return stop_at is not None and bool(history) and history[-1]["certificate"] <= stop_at

    loop = _loop(module, method, replace(options, epochs=1) if method == "exact" else options)
    loop.measure, loop.is_enough, loop.seconds = measure, is_enough, time.perf_counter() - begin
    if method == "joint":
        return PretrainResult(module, method, loop.run(train, held_out), pca)

    def solve() -> float:
        set_optimum_(module, pca) if method == "exact" else alternate_(module, pca)
        return best_loss(module, pca) * measure().get("certificate", 1.0)

    loop.solve = solve
    return PretrainResult(module, method, loop.run(train, held_out), pca)
