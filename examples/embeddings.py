"""Sentence embeddings of a text, as all-MiniLM-L6-v2 makes them: the mean over its words, of unit length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from byol_fast.files import replacing

from .data import cache_folder

__all__ = ["Encoder", "cached", "embeddings", "load_encoder", "tokenized"]

# What the model was trained with.
_WORDS = 128
_BATCH = 64
_KEPT = 512


class Encoder(nn.Module):
    """Word numbers and mask ``[N, words]`` → embeddings ``[N, 384]`` of unit length."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        hidden = self.transformer(input_ids=words, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1), dim=1)


def load_encoder(folder: Path) -> tuple[Encoder, object]:
    """The model in a folder, in evaluation mode, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    return Encoder(AutoModel.from_pretrained(folder)).eval(), AutoTokenizer.from_pretrained(folder)


def tokenized(tokenizer: object, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=_WORDS, return_tensors="pt")  # type: ignore
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def embeddings(encoder: Encoder, tokenizer: object, texts: Sequence[str]) -> Tensor:
    """``[N, 384]``; texts of like length share a batch, so little is padded."""
    result = torch.empty(len(texts), 384)
    order = torch.tensor([len(text) for text in texts]).argsort()
    for part in order.split(_BATCH):
        result[part] = encoder(*tokenized(tokenizer, [texts[index] for index in part.tolist()]))
    return result


def cached(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """Embeddings by the model in a folder, each text's computed once and kept in the cache folder."""
    file = cache_folder() / f"{folder.name}-embeddings.pt"
    known: dict[str, Tensor] = torch.load(file, weights_only=True) if file.exists() else {}

    def embed(texts: Sequence[str]) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            print(f"embedding {len(missing):,} texts; this takes minutes, once")
            encoder, tokenizer = load_encoder(folder)
            # Short ones first, and kept in parts: what was done is not done again.
            missing.sort(key=len)
            for first in tqdm(range(0, len(missing), _KEPT), unit_scale=_KEPT, unit="text", disable=None):
                part = missing[first : first + _KEPT]
                known.update(zip(part, embeddings(encoder, tokenizer, part), strict=True))
                with replacing(file) as path:
                    torch.save(known, path)
        return torch.stack([known[text] for text in texts])

    return embed
