"""scikit-learn's digits through all three phases: pre-train, fine-tune, deploy; and a fresh process that loads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..phases import deploy, finetune, plain
from .extras import required
from .figure import Panel
from .ranks import curve_of, result_at

__all__ = ["run"]

_EPOCHS = 60


def run(ranks: Sequence[int], output: Path) -> Panel:
    """Accuracy of a dense classifier, and of the same one behind a frozen bottleneck, deployed and loaded again."""
    train, test = _digits()
    print(f"\ndigits: {len(train[0])} for training, {len(test[0])} for testing, {train[0].shape[1]} numbers each")
    curve = curve_of(train[0])
    dense = _classifier(train[0].shape[1])
    finetune(dense, train, loss=F.cross_entropy, freeze="none", epochs=_EPOCHS)
    dense_accuracy = _accuracy(_predictions(dense, test[0]), test[1])
    results = []
    for rank in ranks:
        result, layer = result_at("digits", train[0], rank, curve)
        model = nn.Sequential(layer, *_classifier(layer.out_features))
        finetune(model, train, loss=F.cross_entropy, epochs=_EPOCHS)
        path = output / f"digits-{rank}.safetensors"
        deploy(model, path)
        predictions = _predictions_of_fresh_process(path, test[0], output)
        if not torch.equal(predictions, _predictions(model, test[0])):
            raise RuntimeError(f"{path}: expected the predictions of the model that was deployed, found others")
        result.dense_accuracy, result.accuracy = dense_accuracy, _accuracy(predictions, test[1])
        results.append(result)
    print("  a fresh process loaded each deployed model and gave the same predictions")
    return Panel("digits", curve, results)


Split = tuple[Tensor, Tensor]


def _digits() -> tuple[Split, Split]:
    """Images ``[n, 64]`` in 0 … 1 and labels ``[n]``, four fifths for training."""
    datasets = required("sklearn.datasets", "scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    first, last = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (inputs[first], targets[first]), (inputs[last], targets[last])


def _classifier(in_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, 64), nn.ReLU(), nn.Linear(64, 10))


@torch.no_grad()
def _predictions(model: nn.Module, inputs: Tensor) -> Tensor:
    predictions: Tensor = model(inputs).argmax(dim=1)
    return predictions


# plain.py, copied next to the models, is all that a process without byol_fast needs.
_FRESH_PROCESS = """
import sys, numpy, torch
from plain import load
model = load(sys.argv[1])
assert "byol_fast" not in sys.modules
with torch.no_grad():
    numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).argmax(dim=1).numpy())
"""


def _predictions_of_fresh_process(model: Path, inputs: Tensor, folder: Path) -> Tensor:
    """What the deployed model predicts in a process of its own that has only torch."""
    shutil.copy(plain.__file__, folder / "plain.py")
    given, answered = folder / "inputs.npy", folder / "predictions.npy"
    np.save(given, inputs.numpy())
    subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, model.name, given.name, answered.name], cwd=folder, check=True
    )
    return torch.from_numpy(np.load(answered))


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions == labels).double().mean())
