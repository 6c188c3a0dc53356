"""Images: a bottleneck autoencoder on Fashion-MNIST, frozen, with a classifier on its codes, deployed.

Beside it: the same classifier on the pixels and on scikit-learn's principal components, the same autoencoder trained in
eager PyTorch, and fine-tuning that encodes every batch anew.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

import byol_fast as bf

from . import data
from .report import Row, Tables, arguments, cost_of, finish

HIDDEN = 256
ADAM = functools.partial(torch.optim.Adam, lr=2e-3)


def flat(images: data.Images) -> tuple[Tensor, Tensor]:
    return images.images.flatten(1).float() / 255, images.labels


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits, 1,437 for training and 360 for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, classes = torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels)[order]
    return (pixels[:1437], classes[:1437]), (pixels[1437:], classes[1437:])


def classifier(inputs: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)]


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(test[0]).argmax(dim=1) == test[1]).double().mean())


# A fresh process knows the file and nothing else.
FRESH = """
import sys, numpy, torch, byol_fast as bf
model, images = bf.load(sys.argv[1]), torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    numpy.save(sys.argv[3], model(images).argmax(dim=1).numpy())
"""


def accuracy_deployed(model: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, int]:
    """Of the model written to a file and loaded by a process of its own; and the size of the file."""
    with tempfile.TemporaryDirectory() as folder:
        file, given, answered = Path(folder, "model.safetensors"), Path(folder, "in.npy"), Path(folder, "out.npy")
        bf.deploy(model, file)
        np.save(given, test[0].numpy())
        subprocess.run([sys.executable, "-c", FRESH, str(file), str(given), str(answered)], check=True)
        return float((np.load(answered) == test[1].numpy()).mean()), file.stat().st_size


AUTOENCODERS = {
    "linear, exact": ("identity", "exact"),
    "linear, joint": ("identity", "joint"),
    "gelu, joint": ("gelu", "joint"),
}


def autoencoder(name: str, train: Tensor, rank: int, epochs: int) -> tuple[bf.Bottleneck, float]:
    """The trained layer, and the seconds it took: in closed form, or by gradients."""
    activation, method = AUTOENCODERS[name]
    torch.manual_seed(0)
    layer = bf.Bottleneck(train.shape[1], rank, activation=activation)
    options: Row = {"method": method, "progress": False}
    if method == "joint":
        schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
        options |= {"epochs": epochs, "optimizer": ADAM, "scheduler": schedule}
    return layer, cost_of(lambda: bf.pretrain(layer, train, **options))[1].seconds


def eager_and_fused(
    train: Tensor, rank: int, tied: bool, batch: int, epochs: int
) -> tuple[Row, dict[str, list[float]]]:
    """The same layer, batches and optimiser; only the loss is computed differently."""
    torch.manual_seed(0)
    start = bf.Bottleneck(train.shape[1], rank, tied=tied)
    batches = train[: len(train) // batch * batch].split(batch)

    def eager(layer: bf.Bottleneck, x: Tensor) -> Tensor:
        return F.mse_loss(layer.decoder(layer.encoder(x)), x)

    def fused(layer: bf.Bottleneck, x: Tensor) -> Tensor:
        return layer.reconstruction_loss(x)

    def run(loss_of: Callable[[bf.Bottleneck, Tensor], Tensor]) -> list[float]:
        layer = copy.deepcopy(start)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True)
        losses = []
        for x in list(batches) * epochs:
            loss = loss_of(layer, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    row: Row = {"layer": f"rank {rank}{', tied' if tied else ''}", "batch": batch}
    curves = {}
    for name, loss_of in (("eager", eager), ("fused", fused)):
        # Once for threads and memory to be there.
        run(loss_of)
        curves[name], cost = cost_of(functools.partial(run, loss_of))
        row |= {f"{name}, seconds": cost.seconds, f"{name}, MiB": cost.mib}
    ours, theirs = torch.tensor(curves["fused"]), torch.tensor(curves["eager"])
    row["speed-up"] = row["eager, seconds"] / row["fused, seconds"]
    row["largest relative difference of a loss"] = float(((ours - theirs) / theirs).abs().max())
    return row, curves


def tuning(epochs: int) -> Row:
    return {"loss": F.cross_entropy, "epochs": epochs, "batch_size": 512, "optimizer": ADAM, "progress": False}


def classifiers(train: tuple, test: tuple, layers: dict[str, bf.Bottleneck], rank: int, epochs: int) -> list[Row]:
    """A classifier on pixels, on principal components, and on the codes of frozen bottlenecks."""

    def trained(name: str, inputs: tuple[Tensor, Tensor]) -> tuple[nn.Sequential, Row]:
        head = nn.Sequential(*classifier(inputs[0].shape[1]))
        cost = cost_of(lambda: bf.finetune(head, (inputs[0], train[1]), **tuning(epochs)))[1]
        right = accuracy(head, (inputs[1], test[1]))
        return head, {"classifier on": name, "inputs": inputs[0].shape[1], "seconds": cost.seconds, "accuracy": right}

    rows = [trained("pixels", (train[0], test[0]))[1]]
    pca = PCA(rank, svd_solver="covariance_eigh").fit(train[0].numpy())
    components = tuple(torch.from_numpy(pca.transform(x.numpy())).float() for x in (train[0], test[0]))
    rows.append(trained("scikit-learn PCA", components)[1])
    for name, layer in layers.items():
        with torch.no_grad():
            codes, asked = layer.encode(train[0]), layer.encode(test[0])
        mean = codes.mean(dim=0)
        head, row = trained(f"codes, {name}", (codes - mean, asked - mean))
        # What is deployed: the encoder, frozen all along, and what was trained behind it, the mean in its bias.
        with torch.no_grad():
            head[0].bias -= head[0].weight @ mean
        activation = [] if layer.activation == "identity" else [nn.GELU()]
        model = nn.Sequential(layer.encoder, *activation, *head)
        deployed, size = accuracy_deployed(model, test)
        rows.append({**row, "deployed": deployed, "file, KiB": size / 1024})
    return rows


def latent_cache(train: tuple, test: tuple, layer: bf.Bottleneck, epochs: int) -> list[Row]:
    """A classifier on what a frozen bottleneck reconstructs, whose decoder is folded into it: cached, and not."""
    rows = []
    for dtype, activation in ((torch.float32, nn.ReLU), (torch.float32, nn.GELU), (torch.float64, nn.ReLU)):
        head = classifier(train[0].shape[1])
        head[1] = activation()
        inputs, asked = train[0].to(dtype), test[0].to(dtype)
        cached = nn.Sequential(copy.deepcopy(layer), *head).to(dtype)
        uncached = copy.deepcopy(cached)

        def run_cached(model: nn.Sequential = cached, inputs: Tensor = inputs) -> bf.FinetuneResult:
            head, codes = bf.cache_codes(model, inputs)
            return bf.finetune(head, (codes, train[1]), freeze="none", **tuning(epochs))

        def run(model: nn.Sequential = uncached, inputs: Tensor = inputs) -> bf.FinetuneResult:
            return bf.finetune(model, (inputs, train[1]), **tuning(epochs))

        (ours, cost), (theirs, whole) = cost_of(run_cached), cost_of(run)
        with torch.no_grad():
            logits, truth = cached(asked), uncached(asked)
        rows.append(
            {
                "classifier": f"{activation.__name__}, {str(dtype).removeprefix('torch.')}",
                "seconds, uncached": whole.seconds,
                "seconds, cached": cost.seconds,
                "speed-up": whole.seconds / cost.seconds,
                "difference of losses, first epoch": difference(ours.history[0]["loss"], theirs.history[0]["loss"]),
                "last epoch": difference(ours.history[-1]["loss"], theirs.history[-1]["loss"]),
                "of logits": difference(logits, truth),
                "accuracy, uncached": accuracy(uncached, (asked, test[1])),
                "cached": accuracy(cached, (asked, test[1])),
            }
        )
    return rows


def difference(ours: Tensor | float, theirs: Tensor | float) -> float:
    """Relative."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def compressed() -> list[Row]:
    """A trained network for handwritten digits, whole and compressed; 500 images calibrate it, 4,500 test it."""
    model, digits = data.mnist_cnn(), data.mnist_5k()
    images = (digits.images[:, None].float() / 255 - 0.1307) / 0.3081
    test = images[500:], digits.labels[500:]
    rows = [
        {
            "network": "whole",
            "parameters": sum(p.numel() for p in model.parameters()),
            "accuracy": accuracy(model, test),
        }
    ]
    for keep in (0.3, 0.1, 0.05):
        small, report = bf.compress(model, images[:500], keep=keep, gate="none", progress=False)
        row = {"network": f"keep={keep}", "parameters": report.parameters, "accuracy": accuracy(small, test)}
        rows.append({**row, "relative error of logits": report.error})
    return rows


def main() -> None:
    titles = ("autoencoders", "classifiers", "latent cache", "eager and fused", "compressed network")
    options = arguments("image", __doc__.splitlines()[0], titles)
    train, test = digits() if options.embedded else map(flat, data.fashion_mnist())
    rank, epochs, batch = (16, 20, 512) if options.embedded else (64, 8, 8192)
    curves: dict[str, list[float]] = {}

    @functools.cache
    def trained(name: str) -> tuple[bf.Bottleneck, float]:
        return autoencoder(name, train[0], rank, epochs)

    def layers() -> dict[str, bf.Bottleneck]:
        return {name: trained(name)[0] for name in AUTOENCODERS if name != "linear, joint"}

    @functools.cache
    def best() -> float:
        return bf.StreamingPCA(train[0].shape[1]).partial_fit(train[0]).curve().error_at(rank)

    def losses(_: Tables) -> list[Row]:
        return [
            {
                "autoencoder": f"{name}, rank {rank}",
                "loss": (loss := loss_over(trained(name)[0], train[0])),
                "loss / Eckart-Young": loss / best(),
                "loss, test": loss_over(trained(name)[0], test[0]),
                "seconds": trained(name)[1],
            }
            for name in AUTOENCODERS
        ]

    def speeds(_: Tables) -> list[Row]:
        rows = []
        for size, tied in ((rank // 4, False), (rank, False), (rank, True)):
            row, losses = eager_and_fused(train[0], size, tied, batch, 3)
            curves[row["layer"]] = losses
            rows.append(row)
        return rows

    def draw(plt: Any, rows: Tables) -> None:
        figure = plt.figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subfigures(1, 2)
        shown, side = test[0][:8], round(test[0].shape[1] ** 0.5)
        with torch.no_grad():
            pictures = {"original": shown, **{name: layer(shown) for name, layer in layers().items()}}
        axes = left.subplots(len(pictures), len(shown))
        for line, (name, images) in zip(axes, pictures.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
                axis.set_axis_off()
            line[0].set_title(name, fontsize=9, loc="left")
        axis = right.subplots()
        for (name, losses), style in zip(curves[f"rank {rank}"].items(), ("-", "--"), strict=True):
            axis.plot(losses, style, label=name)
        axis.axhline(best(), color="0.6", label="best possible (Eckart-Young)")
        axis.set(yscale="log", xlabel="step", ylabel="loss", title=f"the same training, rank {rank}")
        axis.legend()

    tables = {
        "autoencoders": losses,
        "classifiers": lambda _: classifiers(train, test, layers(), rank, epochs),
        "latent cache": lambda _: latent_cache(train, test, trained("linear, exact")[0], epochs),
        "eager and fused": speeds,
    }
    if not options.embedded:
        tables["compressed network"] = lambda _: compressed()
    drawn = {"autoencoders", "eager and fused"} <= set(options.tables or tables)
    finish("image", options, tables, "autoencoders", draw if drawn else None)


@torch.no_grad()
def loss_over(layer: bf.Bottleneck, rows: Tensor) -> float:
    return sum(float(layer.reconstruction_loss(part)) * len(part) for part in rows.split(4096)) / len(rows)


if __name__ == "__main__":
    main()
