"""The models and their data: what is calibrated on is not tested on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples import data

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Digits:
    """The MNIST network; 1000 of the 5000 images to calibrate on, the others to test on."""

    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that are recognised."""
        with torch.no_grad():
            found = torch.cat([model(batch).argmax(1) for batch in self.images.split(500)])
        return float((found == self.labels).double().mean())


def digits() -> Digits:
    """Fetch them."""
    pixels, labels = data.mnist_5k()
    images = ((pixels / 255 - 0.1307) / 0.3081).unsqueeze(1)
    return Digits(data.mnist_cnn(), images[:1000], images[1000:], labels[1000:])


class Embedder(nn.Module):
    """A sentence's embedding: the mean over its tokens, normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@dataclass(frozen=True)
class Texts:
    """MiniLM-L6, and batches of texts of Reuters R8.

    Those to calibrate on, to train a probe on, and others, without labels, are different ones of its training half.
    """

    model: nn.Module
    calibration: list[Batch]
    train: list[Batch]
    train_categories: list[str]
    test: list[Batch]
    test_categories: list[str]
    unlabelled: list[Batch]

    @torch.no_grad()
    def embeddings(self, model: nn.Module, batches: list[Batch]) -> Tensor:
        """``[N, 384]``."""
        return torch.cat([model(*batch) for batch in batches])


def texts(
    calibration: int = 256,
    train: int = 400,
    test: int = 400,
    unlabelled: int = 0,
    batch_size: int = 32,
    max_tokens: int = 128,
) -> Texts:
    """Fetch them; so many texts of each kind, at most so many tokens of each."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = data.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def part(source: data.Texts, start: int, count: int) -> tuple[list[Batch], list[str]]:
        order = torch.randperm(len(source.texts), generator=torch.Generator().manual_seed(0))
        chosen = order[start : start + count].tolist()
        # Texts of about one length together, so that little is padding.
        chosen.sort(key=lambda index: len(source.texts[index]))
        batches = []
        for first in range(0, len(chosen), batch_size):
            some = [source.texts[index] for index in chosen[first : first + batch_size]]
            encoded = tokenizer(some, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            batches.append((encoded.input_ids, encoded.attention_mask))
        return batches, [source.categories[index] for index in chosen]

    train_half, test_half = data.reuters("r8")
    bert = AutoModel.from_pretrained(folder).eval()
    calibrated, _ = part(train_half, 0, calibration)
    probe, probe_categories = part(train_half, calibration, train)
    tested, tested_categories = part(test_half, 0, test)
    others, _ = part(train_half, calibration + train, unlabelled)
    return Texts(Embedder(bert).eval(), calibrated, probe, probe_categories, tested, tested_categories, others)
