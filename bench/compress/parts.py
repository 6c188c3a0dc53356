"""What is measured, one function a part."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import nn

import byol_fast as bf
from byol_fast.compression.gate import timed

from . import models

LAYER = "classifier.0"
RANKS = (16, 8, 6, 4)
SHARES = (0.8, 0.6, 0.5)


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


def texts() -> dict[str, Any]:
    """MiniLM at three sizes: cosine to the dense embedding and a linear probe, by the allocation of ranks."""
    case = models.texts()
    probe = _Probe(case)
    rows = []
    for allocation, method in (("output", "data_aware"), ("uniform", "data_aware"), ("uniform", "svd")):
        for keep in SHARES if method == "data_aware" else (0.5,):
            model, report = bf.compress(
                case.model,
                case.calibration,
                keep=keep,
                method=method,
                allocation=allocation,
                include="bert.encoder",
                gate="none",
                progress=False,
            )
            rows.append(
                {"keep": keep, "allocation": allocation, "method": method, **probe.row(model), **_summary(report)}
            )
            print(rows[-1], flush=True)
    return {"dense_probe": probe.dense, "rows": rows}


def texts_recovered() -> dict[str, Any]:
    """MiniLM at half its weights, recovered by distillation on the calibration texts, and on more of them."""
    case = models.texts()
    probe = _Probe(case)
    rows = []
    for more in (None, case.train):
        recovery = bf.Recovery(epochs=8, lr=5e-4, train="all", data=more)
        model, report = bf.compress(
            case.model, case.calibration, keep=0.5, include="bert.encoder", gate="none", recovery=recovery
        )
        count = len(case.calibration if more is None else more) * 32
        rows.append(
            {"texts": count, "keep": 0.5, **probe.row(model), **_summary(report), "epochs": len(report.history)}
        )
        print(rows[-1], flush=True)
    return {"dense_probe": probe.dense, "rows": rows}


def texts_latency() -> dict[str, Any]:
    """MiniLM through the gate: which layers measure faster, and what a batch takes, before and after."""
    case = models.texts(calibration=64, train=32, test=64)
    # The gate judges by the first batch: the longest texts.
    batches = case.calibration[::-1]
    model, report = bf.compress(case.model, batches, keep=0.5, include="bert.encoder", progress=False)
    reference = case.embeddings(case.model, case.test)
    cosine = float((case.embeddings(model, case.test) * reference).sum(1).mean())
    layers = [
        {"name": layer.name, "rank": layer.rank, "dense_ms": layer.dense_ms, "ms": layer.ms, "reason": layer.reason}
        for layer in report.layers
    ]
    return {"shape": list(batches[0][0].shape), "cosine": cosine, **_summary(report), "layers": layers}


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


PARTS = {part.__name__: part for part in (digits, digits_latency, texts, texts_recovered, texts_latency)}
