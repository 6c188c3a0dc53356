"""What is measured, one function a part."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

import byol_fast as bf
from byol_fast.compression import Analysis
from byol_fast.compression.gate import timed

from . import models

LAYER = "classifier.0"
RANKS = (16, 8, 6, 4)
SHARES = (0.5, 0.6, 0.8)
# What a part measured; a part that yields it is saved row by row.
Result: TypeAlias = dict[str, Any]
# Texts that recovery learns from, in batches of 16, and how: others, without labels, or those of the calibration alone.
RECOVERIES = {
    "others": bf.Recovery(epochs=3, hints=1.0, lr=3e-4, train="all"),
    "calibration": bf.Recovery(epochs=8, hints=1.0, lr=3e-4, train="all"),
}
OTHERS = 4800
# Batch and tokens at which the gate judges.
SHAPES = ((1, 32), (8, 64), (8, 128))


def digits() -> dict[str, Any]:
    """The large Linear of the MNIST network at four ranks: accuracy, data-aware and by plain truncated SVD."""
    case = models.digits()
    rows = [
        {"rank": rank, "method": method, "accuracy": case.accuracy(_at_rank(case, rank, method=method))}
        for method in ("data_aware", "svd")
        for rank in RANKS
    ]
    recovery = bf.Recovery(epochs=25, lr=2e-3, train="all", patience=8)
    recovered = _at_rank(case, 4, recovery=recovery, batch_size=25)
    rows.append({"rank": 4, "method": "data_aware, recovered", "accuracy": case.accuracy(recovered)})
    return {"dense": case.accuracy(case.model), "rows": rows}


def digits_latency() -> dict[str, Any]:
    """Milliseconds of that layer, dense and as bottlenecks, and of the model as the gate makes it."""
    case = models.digits()
    rows = []
    dense = case.model.get_submodule(LAYER)
    for batch, rank in itertools.product((1, 32, 256), RANKS):
        input = torch.randn(batch, 3136)
        layer = bf.Bottleneck.from_linear(dense, rank)
        with torch.no_grad():
            before, now = timed(partial(dense, input), partial(layer, input), device=input.device)
        rows.append({"batch": batch, "rank": rank, "dense_ms": before, "ms": now})
    model, report = bf.compress(case.model, case.calibration, keep=0.1, progress=False)
    return {"layer": rows, "accuracy": case.accuracy(model), **_summary(report)}


def _at_rank(case: models.Digits, rank: int, *, batch_size: int = 100, **options: Any) -> nn.Module:
    # A hair above the share of this rank, so that rounding does not decide.
    keep = (rank + 0.01) * (3136 + 128) / (3136 * 128)
    model, report = bf.compress(
        case.model,
        case.calibration,
        keep=keep,
        include=LAYER,
        gate="none",
        batch_size=batch_size,
        progress=False,
        **options,
    )
    found = report.layers[0].rank
    if found != rank:
        raise RuntimeError(f"expected rank {rank}, got {found}")
    return model


def texts() -> Iterator[dict[str, Any]]:
    """MiniLM at three sizes: cosine to the dense embedding and a linear probe, by the allocation of ranks."""
    case, analysis, probe = _analysed()
    found: dict[str, Any] = {"dense_probe": probe.dense, "rows": []}
    for allocation, keep in [*itertools.product(("measured", "uniform"), SHARES), ("output", 0.5)]:
        model, report = analysis.compress(keep=keep, allocation=allocation, progress=False)
        found["rows"].append(_row(keep, "data_aware", allocation, probe.row(model), report))
        yield found
    model, report = bf.compress(case.model, None, keep=0.5, method="svd", include="bert.encoder", gate="none")
    found["rows"].append(_row(0.5, "svd", "uniform", probe.row(model), report))
    yield found


def texts_recovered(source: str) -> dict[str, Any]:
    """MiniLM at half its weights, recovered by distillation."""
    case, analysis, probe = _analysed()
    batches = case.calibration if source == "calibration" else case.unlabelled
    recovery = dataclasses.replace(RECOVERIES[source], data=batches)
    model, report = analysis.compress(keep=0.5, recovery=recovery)
    texts = sum(len(batch[0]) for batch in batches)
    tokens = max(batch[0].shape[1] for batch in batches)
    options = {"texts": texts, "tokens": tokens, "epochs": recovery.epochs, "lr": recovery.lr, "train": recovery.train}
    found = _row(0.5, "data_aware", "measured", probe.row(model), report)
    return {"dense_probe": probe.dense, "source": source, **options, **found, "history": report.history}


def texts_latency(size: int, tokens: int) -> dict[str, Any]:
    """MiniLM through the gate at one shape of batches, then timed again beside the dense model."""
    case = models.texts(calibration=32, train=32, test=64, batch_size=size, max_tokens=tokens)
    # The gate judges by the first batch: the longest texts.
    batches = case.calibration[::-1]
    model, report = bf.compress(case.model, batches, keep=0.5, include="bert.encoder", progress=False)
    reference = case.embeddings(case.model, case.test)
    cosine = float((case.embeddings(model, case.test) * reference).sum(1).mean())
    with torch.no_grad():
        before, now = timed(
            partial(case.model, *batches[0]), partial(model, *batches[0]), device=torch.device("cpu"), seconds=6.0
        )
    layers = [
        {"name": layer.name, "rank": layer.rank, "dense_ms": layer.dense_ms, "ms": layer.ms, "reason": layer.reason}
        for layer in report.layers
    ]
    again = {"dense_ms_again": before, "ms_again": now}
    return {"shape": list(batches[0][0].shape), "cosine": cosine, **_summary(report), **again, "layers": layers}


@functools.cache
def _analysed() -> tuple[models.Texts, Analysis, _Probe]:
    """One calibration pass for all rows."""
    case = models.texts(unlabelled=OTHERS, batch_size=16)
    analysis = Analysis(case.model, case.calibration, include="bert.encoder", gate="none")
    return case, analysis, _Probe(case)


def _row(
    keep: float, method: str, allocation: str, found: dict[str, float], report: bf.CompressionReport
) -> dict[str, Any]:
    row = {"keep": keep, "allocation": allocation, "method": method, **found, **_summary(report)}
    print(row, flush=True)
    return row


class _Probe:
    """Embeddings judged: cosine to the dense ones, and accuracy of a logistic regression on them."""

    def __init__(self, case: models.Texts) -> None:
        self.case = case
        self.test = case.embeddings(case.model, case.test)
        self.dense = self._accuracy(case.embeddings(case.model, case.train), self.test)

    def row(self, model: nn.Module) -> dict[str, float]:
        train, test = (self.case.embeddings(model, batches) for batches in (self.case.train, self.case.test))
        return {"cosine": float((test * self.test).sum(1).mean()), "probe": self._accuracy(train, test)}

    def _accuracy(self, train: torch.Tensor, test: torch.Tensor) -> float:
        from sklearn.linear_model import LogisticRegression

        classifier = LogisticRegression(C=10.0, max_iter=1000)
        classifier.fit(train.numpy(), self.case.train_categories)
        return float(classifier.score(test.numpy(), self.case.test_categories))


def _summary(report: bf.CompressionReport) -> dict[str, Any]:
    return {
        "kept": report.kept,
        "error": report.error,
        "error_before_recovery": report.error_before_recovery,
        "dense_ms": report.dense_ms,
        "ms": report.ms,
        "replaced": len(report.replaced),
        "looked_at": len(report.layers),
    }


PARTS: dict[str, Callable[[], Result | Iterator[Result]]] = {
    **{part.__name__: part for part in (digits, digits_latency, texts)},
    **{f"texts_recovered_{source}": partial(texts_recovered, source) for source in RECOVERIES},
    **{f"texts_latency_{size}x{tokens}": partial(texts_latency, size, tokens) for size, tokens in SHAPES},
}
