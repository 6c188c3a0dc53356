"""Recommendation: a linear bottleneck on the sparse matrix of users and items, beside what else is in use.

Top 10 under the protocol of the recommenders project (75 % of each user's items for training, 25 % for testing), and
ratings on a random 80/20 split. Whatever has to be chosen is chosen on parts of the training data. Then the same on
200,000 users and 50,000 items, in a process whose peak memory is read afterwards.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

import byol_fast as bf

from . import data
from .report import Row, Tables, arguments, cost_of, finish

K = 10
EXACT = {"method": "exact"}
JOINT = {
    "method": "joint",
    "epochs": 100,
    "batch_size": 256,
    "optimizer": functools.partial(torch.optim.Adam, lr=1e-2),
    "scheduler": functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100),
    "stop_at": 1.001,
    "progress": False,
}


class Pairs(NamedTuple):
    """User and item of each interaction, numbered from 0."""

    users: Tensor
    items: Tensor

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Dense, 1 where a user has an item: for the baselines, and small enough for them."""
        return torch.zeros(shape).index_put_((self.users, self.items), torch.ones(()))

    def parts(self, share: float, seed: int) -> tuple[Pairs, Pairs]:
        """Each user's items at random in two parts, the first with the given share."""
        order = torch.randperm(len(self.users), generator=torch.Generator().manual_seed(seed))
        order = order[self.users[order].argsort(stable=True)]
        counts = self.users.bincount()
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.users[order]]
        first = place < (share * counts[self.users[order]]).round()
        return tuple(Pairs(self.users[part], self.items[part]) for part in (order[first], order[~first]))


def synthetic(users: int, items: int, per_user: int, seed: int = 0) -> data.Ratings:
    """Ratings by people with tastes, popular items among them."""
    rng = np.random.default_rng(seed)
    tastes, kinds = rng.normal(size=(users, 5)), rng.normal(size=(items, 5))
    liking = tastes @ kinds.T / 5**0.5 + rng.normal(size=items) + rng.gumbel(size=(users, items))
    chosen = np.argsort(-liking, axis=1)[:, :per_user]
    stars = np.clip(np.round(3.5 + np.take_along_axis(tastes @ kinds.T / 5, chosen, 1)), 1, 5).reshape(-1)
    who = np.repeat(np.arange(users), per_user)
    return data.Ratings(*(torch.from_numpy(x) for x in (who, chosen.reshape(-1), stars.astype(np.float32), who)))


# ------------------------------------------------------------------------------------------------- what is compared


def by_scores(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(seen > 0, -torch.inf).topk(K, dim=1).indices


def popularity(train: Tensor) -> Tensor:
    return by_scores(train.sum(0).expand_as(train), train)


def item_cosine(train: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(train, dim=0)
    return by_scores(train @ (unit.T @ unit), train)


def ease(train: Tensor, penalty: float) -> Tensor:
    """Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019: closed form, items × items."""
    gram = train.double().T @ train.double()
    gram.diagonal().add_(penalty)
    inverse = torch.linalg.inv(gram)
    weight = -inverse / inverse.diagonal()
    weight.fill_diagonal_(0)
    return by_scores(train @ weight.float(), train)


def plain_svd(train: Tensor, rank: int) -> Tensor:
    model = TruncatedSVD(rank, random_state=0).fit(train.numpy())
    return by_scores(torch.from_numpy(model.inverse_transform(model.transform(train.numpy()))), train)


def bpr(train: Tensor, rank: int, penalty: float) -> Tensor:
    """Bayesian personalised ranking, Rendle et al., UAI 2009, of the package ``cornac``; steps as others publish it."""
    from cornac.data import Dataset
    from cornac.models import BPR

    users, items = train.shape
    who, what = (column.numpy() for column in train.nonzero(as_tuple=True))
    uid_map, iid_map = ({index: index for index in range(size)} for size in (users, items))
    rows = Dataset(users, items, uid_map, iid_map, (who, what, np.ones(len(who), np.float32)), seed=0)
    # More threads would write over each other's steps, and not be reproducible.
    model = BPR(k=rank, max_iter=200, learning_rate=0.01, lambda_reg=penalty, num_threads=1, seed=0).fit(rows)
    return by_scores(torch.from_numpy(model.u_factors @ model.i_factors.T + model.i_biases), train)


def ours(train: Pairs, users: int, training: Row = EXACT, **options: Any) -> Tensor:
    torch.manual_seed(0)
    model = bf.Recommender(**options)
    model.fit(*train, **training)
    return model.recommend(torch.arange(users), K).items


# --------------------------------------------------------------------------------------------------------- measures


def quality(top: Tensor, test: Tensor) -> Row:
    """Means over users of nDCG, recall and reciprocal rank, an item of the test set being relevant."""
    hits = test.gather(1, top.clamp(min=0)) * (top >= 0)
    relevant = test.sum(1).clamp(min=1)
    discount = 1 / torch.arange(2, K + 2).log2()
    ideal = discount.cumsum(0)[relevant.clamp(max=K).long() - 1]
    first = (hits / torch.arange(1, K + 1)).amax(1)
    measures = {"nDCG@10": (hits @ discount) / ideal, "recall@10": hits.sum(1) / relevant, "MRR": first}
    return {name: float(values.mean()) for name, values in measures.items()}


def chosen(pairs: Pairs, shape: tuple[int, int], ranks: list[int]) -> list[Row]:
    """For each model with something to choose, what has the highest nDCG on three validation sets, and that nDCG."""
    train, _ = pairs.parts(0.75, seed=42)
    splits = [train.parts(0.8, seed) for seed in (7, 8, 9)]
    seen, wanted = ([part.matrix(shape) for part in parts] for parts in zip(*splits, strict=True))

    def row(model: str, candidates: list[Row], run: Callable[..., Tensor], inputs: list[object]) -> Row:
        def ndcg(candidate: Row) -> float:
            tops = [run(given, **candidate) for given in inputs]
            return sum(quality(*pair)["nDCG@10"] for pair in zip(tops, wanted, strict=True)) / len(splits)

        best = max(candidates, key=ndcg)
        return {"model": model, "nDCG@10": ndcg(best), **best}

    by_rank = [{"rank": rank} for rank in ranks]
    grid = [
        {"rank": rank, "user_power": power, "item_power": power, "shrinkage": shrinkage}
        for rank, power, shrinkage in itertools.product(ranks, (0.25, 0.5), (0.0, 1.0, 4.0))
    ]
    rows = [
        row("EASE", [{"penalty": value} for value in (100, 200, 300, 500, 700, 1000)], ease, seen),
        row("truncated SVD", by_rank, plain_svd, seen),
        row("bottleneck", grid, functools.partial(ours, users=shape[0]), [smaller for smaller, _ in splits]),
    ]
    # An extra library, left out where it is not installed.
    if importlib.util.find_spec("cornac") is not None:
        sizes = itertools.product((*ranks, 4 * ranks[-1]), (0.001, 0.01))
        rows.append(row("BPR", [{"rank": rank, "penalty": penalty} for rank, penalty in sizes], bpr, seen))
    return rows


def top_ten(pairs: Pairs, shape: tuple[int, int], choices: list[Row], joint: Row) -> list[Row]:
    """Every model with what was chosen for it."""
    train, test = pairs.parts(0.75, seed=42)
    seen, wanted = train.matrix(shape), test.matrix(shape)
    users, items = shape
    settings = {row["model"]: {name: row[name] for name in row if name not in ("model", "nDCG@10")} for row in choices}
    mine = settings["bottleneck"]
    by_rows = {**mine, "user_power": 0.5, "item_power": 0.0}
    size = 2 * mine["rank"] * items

    def bottleneck(training: Row = EXACT, **options: Any) -> Callable[[], Tensor]:
        return lambda: ours(train, users, training, **{**mine, **options})

    svd, penalty = settings["truncated SVD"], settings["EASE"]["penalty"]
    runs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "popularity": (lambda: popularity(seen), items),
        "item-item cosine": (lambda: item_cosine(seen), items * items),
        f"truncated SVD, rank {svd['rank']}": (lambda: plain_svd(seen, **svd), svd["rank"] * items),
        f"EASE, λ {penalty}": (lambda: ease(seen, penalty), items * items),
        f"bottleneck, rank {mine['rank']}, exact": (bottleneck(), size),
        "the same, tied": (bottleneck(tied=True), size),
        "the same, joint": (bottleneck(joint), size),
        "the same, joint, tied": (bottleneck(joint, tied=True), size),
        "the same, exact, rows normalised": (bottleneck(**by_rows), size),
    }
    if "BPR" in settings:
        options, rank = settings["BPR"], settings["BPR"]["rank"]
        runs[f"BPR, rank {rank}"] = (functools.partial(bpr, seen, **options), (rank + 1) * items + rank * users)
    rows = []
    for name, (run, numbers) in runs.items():
        top, cost = cost_of(run)
        rows.append(
            {"model": name, **quality(top, wanted), "numbers": numbers, "seconds": cost.seconds, "MiB": cost.mib}
        )
    return rows


def rating_errors(ratings: data.Ratings, shape: tuple[int, int], ranks: list[int]) -> list[Row]:
    """Root mean squared error of ratings: biases of user and item, and a bottleneck on what they leave."""
    order = torch.randperm(len(ratings.users), generator=torch.Generator().manual_seed(42))
    train, test = (data.Ratings(*(x[part] for x in ratings)) for part in order.split(len(order) * 4 // 5 + 1))
    # In random order already.
    cut = len(train.users) * 4 // 5
    smaller, held_out = data.Ratings(*(x[:cut] for x in train)), data.Ratings(*(x[cut:] for x in train))

    def error(train: data.Ratings, test: data.Ratings, options: Row | None) -> float:
        guess = biases(train, shape)
        predicted = guess(test)
        if options is not None:
            model = bf.Recommender(**options)
            model.fit(train.users, train.items, train.ratings - guess(train), **EXACT)
            known = torch.isin(test.users, model.user_ids) & torch.isin(test.items, model.item_ids)
            predicted[known] += model.predict(test.users[known], test.items[known])
        return float((predicted.clamp(1, 5) - test.ratings).square().mean().sqrt())

    grid = [
        {"rank": rank, "user_power": a, "item_power": b, "shrinkage": shrinkage}
        for rank, (a, b), shrinkage in itertools.product(ranks, ((0.0, 0.0), (0.25, 0.25)), (0.0, 1.0, 4.0))
    ]
    best = min(grid, key=lambda options: error(smaller, held_out, options))
    return [
        {"model": "mean of user and item", "RMSE": error(train, test, None)},
        {"model": "with a bottleneck on the rest", "RMSE": error(train, test, best), **best},
    ]


def biases(train: data.Ratings, shape: tuple[int, int], damping: float = 5.0) -> Callable[[data.Ratings], Tensor]:
    """Mean + item's deviation + user's deviation from that, damped."""
    mean = float(train.ratings.mean())

    def deviations(ids: Tensor, size: int, rest: Tensor) -> Tensor:
        return torch.zeros(size).index_add_(0, ids, rest) / (ids.bincount(minlength=size) + damping)

    of_items = deviations(train.items, shape[1], train.ratings - mean)
    of_users = deviations(train.users, shape[0], train.ratings - mean - of_items[train.items])
    return lambda ratings: mean + of_items[ratings.items] + of_users[ratings.users]


# ------------------------------------------------------------------------------------------------------------ scale


def scale(users: int, items: int, per_user: int) -> None:
    """Train on a large synthetic matrix in this process, answer for all users of a block, and print what it took."""
    generator = torch.Generator().manual_seed(0)
    who = torch.arange(users).repeat_interleave(per_user)
    # Popular items are chosen more often, and a user stays near a place of its own.
    where = torch.randn(users * per_user, generator=generator) * items / 50 + (who * 7919 % items)
    what = torch.where(
        torch.rand(len(who), generator=generator) < 0.3,
        (torch.rand(len(who), generator=generator) ** 3 * items).long(),
        where.long() % items,
    )
    report: Row = {"users": users, "items": items}
    for method, options in (("exact", {}), ("joint", {"epochs": 1, "batch_size": 8192, "progress": False})):
        begin = time.perf_counter()
        model = bf.Recommender(64)
        model.fit(who, what, method=method, **options)
        report[f"{method}, seconds"] = time.perf_counter() - begin
    report["interactions"] = model.interactions.values().numel()
    begin = time.perf_counter()
    model.recommend(torch.arange(10_000).clamp(max=users - 1), K)
    report["10,000 lists, seconds"] = time.perf_counter() - begin
    print(json.dumps(report))


def scale_in_own_process(users: int, items: int, per_user: int) -> Row:
    import resource

    command = [sys.executable, "-m", "examples.recommend", "--scale", str(users), str(items), str(per_user)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {**json.loads(done.stdout.splitlines()[-1]), "peak MiB": peak}


def main() -> None:
    options = arguments("recommend", __doc__.splitlines()[0], ("chosen", "top 10", "ratings", "scale"))
    ratings = synthetic(300, 200, 40) if options.embedded else data.movielens_100k()
    users, items = (ids.unique(return_inverse=True)[1] for ids in (ratings.users, ratings.items))
    shape = (int(users.max()) + 1, int(items.max()) + 1)
    ranks = [8] if options.embedded else [16, 32, 48]
    joint = {**JOINT, "epochs": 20} if options.embedded else JOINT
    size = (2000, 500, 20) if options.embedded else (200_000, 50_000, 50)
    tables = {
        "chosen": lambda _: chosen(Pairs(users, items), shape, ranks),
        "top 10": lambda rows: top_ten(Pairs(users, items), shape, rows["chosen"], joint),
        "ratings": lambda _: rating_errors(ratings._replace(users=users, items=items), shape, ranks),
        "scale": lambda _: [scale_in_own_process(*size)],
    }

    def draw(plt: Any, rows: Tables) -> None:
        _, axis = plt.subplots(figsize=(8, 5))
        for row in rows["top 10"]:
            mine = row["model"].startswith(("bottleneck", "the same"))
            axis.scatter(row["numbers"], row["nDCG@10"], color="tab:blue" if mine else "0.5")
            axis.annotate(row["model"], (row["numbers"], row["nDCG@10"]), xytext=(5, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="numbers in the model", ylabel="nDCG@10")
        axis.grid(alpha=0.3)

    finish("recommend", options, tables, "top 10", draw)


if __name__ == "__main__":
    if "--scale" in sys.argv:
        scale(*(int(value) for value in sys.argv[sys.argv.index("--scale") + 1 :]))
    else:
        main()
