"""Text: sentence embeddings in a sixth of the bytes and less, for search and for classification.

Reuters' stories are embedded by all-MiniLM-L6-v2, and the 384 numbers of each are cut to 16 … 128. How many of the ten
nearest stories are still found? Beside it: scikit-learn's PCA, and the first numbers of the embedding as they are.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import byol_fast as bf

from . import data, embeddings
from .report import Row, Tables, arguments, finish

K = 10


class Corpus(NamedTuple):
    """Embeddings ``[N, 384]`` and categories, for training and for testing."""

    train: Tensor
    train_categories: list[str]
    test: Tensor
    test_categories: list[str]


def reuters() -> dict[str, Corpus]:
    embed = embeddings.cached(data.minilm())
    corpora = {}
    for name in ("r8", "r52"):
        train, test = data.reuters(name)
        corpora[name] = Corpus(embed(train.texts), train.categories, embed(test.texts), test.categories)
    return corpora


def embedded() -> dict[str, Corpus]:
    """A few hundred short texts on three subjects; an embedding is the sum of random vectors, one for each word."""
    subjects = {
        "grain": ["wheat", "corn", "harvest", "tonnes", "export", "crop", "farmers", "soybean", "acres", "drought"],
        "money": ["bank", "rates", "dollar", "currency", "fed", "interest", "market", "yen", "reserves", "deposits"],
        "ships": ["port", "vessel", "strike", "cargo", "tanker", "gulf", "freight", "seamen", "harbour", "canal"],
    }
    common = ["the", "a", "of", "to", "in", "said", "on", "for", "and", "at", "year", "would", "new", "last"]
    generator = torch.Generator().manual_seed(0)

    def pick(words: Sequence[str], count: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (count,), generator=generator).tolist()]

    categories = pick(sorted(subjects), 400)
    texts = [pick(subjects[category], 6) + pick(common, 8) for category in categories]
    vectors = {
        word: torch.randn(384, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        for text in texts
        for word in text
    }
    rows = F.normalize(torch.stack([torch.stack([vectors[word] for word in text]).sum(0) for text in texts]), dim=1)
    return {"subjects": Corpus(rows[:300], categories[:300], rows[300:], categories[300:])}


# ------------------------------------------------------------------------------------------------------------ codes


def nearest(queries: Tensor, documents: Tensor) -> Tensor:
    """Indices of the ten documents of largest inner product."""
    return (queries @ documents.T).topk(K, dim=1).indices


def recall(found: Tensor, wanted: Tensor) -> float:
    return float((found[:, :, None] == wanted[:, None, :]).any(2).double().mean())


def per_second(queries: Tensor, documents: Tensor) -> float:
    """Queries a second, in batches of 256: the median of seven runs."""
    batch, seconds = queries[:256], []
    for _ in range(7):
        begin = time.perf_counter()
        nearest(batch, documents)
        seconds.append(time.perf_counter() - begin)
    return len(batch) / statistics.median(seconds)


def int8(codes: Tensor, scale: Tensor) -> Tensor:
    """What remains of codes stored as 8-bit integers, one scale for each number of the code."""
    return (codes / scale).round().clamp(-127, 127).to(torch.int8).float() * scale


class Method(NamedTuple):
    """How rows ``[N, 384]`` become codes, whose inner product is the score; and the bytes of one."""

    name: str
    encode: Callable[[Tensor], Tensor]
    bytes: int


def methods(train: Tensor, layer: bf.Bottleneck, size: int) -> list[Method]:
    pca = PCA(size, svd_solver="covariance_eigh").fit(train.numpy())
    # Codes are nested: the layer is trained once, and cut.
    cut = layer.truncate(size)

    def components(rows: Tensor) -> Tensor:
        return torch.from_numpy(pca.transform(rows.numpy())).float()

    @torch.no_grad()
    def ours(rows: Tensor) -> Tensor:
        return cut.encode(rows)

    scale = ours(train).abs().amax(dim=0) / 127
    return [
        Method("first numbers", lambda rows: F.normalize(rows[:, :size], dim=1), 4 * size),
        Method("scikit-learn PCA", components, 4 * size),
        Method("scikit-learn PCA, unit length", lambda rows: F.normalize(components(rows), dim=1), 4 * size),
        Method("bottleneck", ours, 4 * size),
        Method("bottleneck, int8", lambda rows: int8(ours(rows), scale), size),
    ]


def probe(corpus: Corpus, encode: Callable[[Tensor], Tensor]) -> float:
    """Accuracy of logistic regression on codes."""
    model = LogisticRegression(C=10, max_iter=200).fit(encode(corpus.train).numpy(), corpus.train_categories)
    return float(model.score(encode(corpus.test).numpy(), corpus.test_categories))


def search(corpora: dict[str, Corpus], sizes: Sequence[int]) -> list[Row]:
    """Every code at every size. Stories of the last corpus are searched, the probe is on all corpora."""
    corpus = list(corpora.values())[-1]
    documents, queries = corpus.train, corpus.test
    # Without biases, the inner product of codes is that of the reconstructions, the mean's share included.
    layer = bf.Bottleneck(documents.shape[1], max(sizes), bias=False)
    bf.pretrain(layer, documents, method="exact", progress=False)
    wanted = nearest(queries, documents)

    def row(size: int, method: Method) -> Row:
        codes, asked = method.encode(documents), method.encode(queries)
        return {
            "code": method.name,
            "numbers": size,
            "bytes a document": method.bytes,
            "recall@10": recall(nearest(asked, codes), wanted),
            "queries a second": per_second(asked, codes),
            **{f"probe, {name}": probe(corpus, method.encode) for name, corpus in corpora.items()},
        }

    whole = Method("whole embedding", lambda rows: rows, 4 * documents.shape[1])
    rows = [row(documents.shape[1], whole)]
    return rows + [row(size, method) for size in sizes for method in methods(documents, layer, size)]


def compressed() -> list[Row]:
    """The encoder itself with bottlenecks in place of its Linears: 48 stories calibrate it, others are searched."""
    dense, tokenizer = embeddings.load_encoder(data.minilm())
    train, test = data.reuters("r8")
    calibration = [embeddings.tokenized(tokenizer, train.texts[first : first + 8]) for first in range(0, 48, 8)]
    small, report = bf.compress(
        dense, calibration, keep=0.5, include="transformer.encoder", gate="none", progress=False
    )
    documents, queries = train.texts[48:248], test.texts[:50]
    batch = embeddings.tokenized(tokenizer, documents[:8])
    embed = embeddings.cached(data.minilm())
    true_codes, wanted = embed(documents), nearest(embed(queries), embed(documents))
    codes, asked = (embeddings.embeddings(small, tokenizer, texts) for texts in (documents, queries))
    return [
        {"encoder": "whole", "parameters": report.parameters_before, "ms, 8 stories": milliseconds(dense, batch)},
        {
            "encoder": "half of its weights",
            "parameters": report.parameters,
            "ms, 8 stories": milliseconds(small, batch),
            "cosine to the whole": float((codes * true_codes).sum(dim=1).mean()),
            "recall@10": recall(nearest(asked, codes), wanted),
        },
    ]


@torch.no_grad()
def milliseconds(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """The median of five runs, after one."""
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        model(*batch)
        seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds[1:])


def main() -> None:
    options = arguments("text", __doc__.splitlines()[0], ("search and classification", "compressed encoder"))
    sizes = (8, 16) if options.embedded else (16, 32, 64, 128)
    tables = {"search and classification": lambda _: search(embedded() if options.embedded else reuters(), sizes)}
    if not options.embedded:
        tables["compressed encoder"] = lambda _: compressed()

    def draw(plt: Any, rows: Tables) -> None:
        whole, *others = rows["search and classification"]
        _, axis = plt.subplots(figsize=(7, 4.5))
        for name in dict.fromkeys(row["code"] for row in others):
            line = [row for row in others if row["code"] == name]
            axis.plot([row["bytes a document"] for row in line], [row["recall@10"] for row in line], "o-", label=name)
        axis.axvline(whole["bytes a document"], color="0.6", linestyle=":", label="whole embedding")
        axis.set(xscale="log", xlabel="bytes a document", ylabel="recall@10 of exact search", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()

    finish("text", options, tables, "search and classification", draw)


if __name__ == "__main__":
    main()
